"""One page to open first after training: how good the model is, what it gets wrong and why, and what to do about the data.

    python analysis/report.py --dataset_dir data --params_path ./checkpoint --report_dir report
    python analysis/report.py --dataset_dir data --report_dir report --interpreter gradshap --num_cases 20 --baseline

Reads   dataset_dir/train.txt, dev.txt, label.txt; params_path (made by train.py).
Writes  report_dir: report.html, self-contained: the evaluation as evaluate.py --report_dir gives it; the wrong dev texts with
        their words shaded (as word_interpret.py) and the nearest training rows (sent_interpret.py); the training rows whose
        labels are suspect and near-duplicates with different labels (dirty.py); the dev texts that the training data cover
        least (sparse.py). metrics.json and pictures as of evaluate.py.
        cache_dir: features of the training rows, for the next run with this model.
"""

import numpy as np

from textcls.analysis.attributions import STEPS, interpret
from textcls.analysis.duplicates import find_conflicts
from textcls.analysis.evaluation_report import score_splits, train_baseline, write_report
from textcls.analysis.features import cached_features, sparse_scores
from textcls.analysis.influence import find_influences
from textcls.analysis.label_errors import find_label_errors
from textcls.analysis.words import make_segments
from textcls.common.digests import rows_id
from textcls.common.errors import UserError, run_script
from textcls.common.log import get_logger
from textcls.common.options import add_model_options, make_parser, positive_int, seed_number
from textcls.common.outputs import check_output_folder
from textcls.common.probabilities import softmax
from textcls.models.device import select_device
from textcls.models.loading import load_with_data, read_splits
from textcls.training.scoring import find_bad_cases

FOLDS = 5  # for the suspect labels
NUM_NEAREST = 3  # training rows shown per text, and those whose similarity decides how well a text is covered


def parse_arguments():
    parser = make_parser(__doc__)
    add_model_options(parser, train_file=True, dev_file=True, cache_dir=True)
    parser.add_argument("--report_dir", default="report", help="folder of report.html")
    parser.add_argument("--interpreter", choices=list(STEPS), default="ig", help="how words are shaded, see word_interpret.py")
    parser.add_argument("--num_cases", type=positive_int, default=100,
                        help="wrong dev texts that are explained, the most confident first; the others are only listed")
    parser.add_argument("--num_suspects", type=positive_int, default=50, help="training rows with suspect labels to show")
    parser.add_argument("--num_uncovered", type=positive_int, default=50, help="least covered dev texts to show")
    parser.add_argument("--baseline", action="store_true",
                        help="also train character TF-IDF + logistic regression and show its accuracy")
    parser.add_argument("--seed", type=seed_number, default=3, help="of the folds for suspect labels and of the interpreters")
    return parser.parse_args()


def explain_cases(checkpoint, args, cases, train, train_outputs, outputs):
    """Bad cases (as of `scoring.find_bad_cases`) with their shaded words and nearest training rows.

    train_outputs, outputs: (features, logits) of the training rows and of the cases.
    """
    if not cases:
        return []  # the model gets all of dev right
    texts = [case["text"] for case in cases]
    explained = interpret(checkpoint, texts, args.interpreter, args.batch_size, seed=args.seed)
    found = find_influences(checkpoint.labels, train, train_outputs, texts, outputs, NUM_NEAREST,
                            temperature=checkpoint.temperature)
    return [{**case, "segments": make_segments(case["text"], answer.words), "window": answer.window, "nearest": rows["positive"]}
            for case, answer, rows in zip(cases, explained, found)]


def describe_rows(train, indices, labels):
    """Dicts of line (from 1), text and label of training rows."""
    return [{"line": int(index) + 1, "text": train[0][index], "label": labels[train[1][index]]} for index in indices]


def list_suspects(args, train, labels):
    """The template's entries on the labels of train: estimate, suspects, conflicts and num_conflicts."""
    try:
        suspects = find_label_errors(*train, len(labels), FOLDS, args.seed)
        rows, estimate = describe_rows(train, suspects.order[:args.num_suspects], labels), suspects.estimated
        for row, index in zip(rows, suspects.order):
            row.update(score=suspects.score[index], suggestion=labels[suspects.suggested[index]])
    except UserError as error:
        get_logger().warning(f"No suspect labels in the report: too little training data ({error}).")
        rows, estimate = [], "–"
    conflicts = find_conflicts(*train)
    return {"estimate": estimate, "suspects": rows, "num_conflicts": len(conflicts),
            "conflicts": [{"similarity": similarity, "rows": describe_rows(train, group, labels)}
                          for similarity, group in conflicts[:args.num_suspects]]}


def list_uncovered(args, train, dev, train_features, dev_features, guesses, labels):
    """The template's entries on the dev texts that are farthest from the training rows. guesses: int64 [num_dev]."""
    scores, nearest, cosines = sparse_scores(train_features, dev_features, NUM_NEAREST)
    worst = np.argsort(scores, kind="stable")[:args.num_uncovered]
    uncovered = []
    for index in worst:
        rows = describe_rows(train, nearest[index], labels)
        for row, cosine in zip(rows, cosines[index]):
            row["score"] = cosine
        uncovered.append({"text": dev[0][index], "label": labels[dev[1][index]], "prediction": labels[guesses[index]],
                          "score": scores[index], "nearest": rows})
    return {"uncovered": uncovered, "uncovered_accuracy": float((guesses == dev[1])[worst].mean()),
            "num_nearest": nearest.shape[1]}


def main():
    args = parse_arguments()
    check_output_folder(args.report_dir, "--report_dir")
    select_device(args.device)
    checkpoint, (train, dev) = load_with_data(args, lambda *found: read_splits(args, *found))
    labels = checkpoint.labels

    outputs = [cached_features(checkpoint, args.params_path, split[0], args.batch_size, args.cache_dir, name)
               for name, split in (("train", train), ("dev", dev))]
    features, logits = [split[0] for split in outputs], [split[1] for split in outputs]
    metrics = score_splits(labels, [train[1], dev[1]], logits, checkpoint.temperature, checkpoint.fitted_on == rows_id(*dev))
    guesses = logits[1].argmax(axis=1)
    bad_cases = find_bad_cases(*dev, softmax(logits[1], checkpoint.temperature), labels)
    most_confident = sorted(range(len(bad_cases)), key=lambda i: -bad_cases[i]["confidence"])[:args.num_cases]
    get_logger().info(f"Explaining {len(most_confident)} of {len(bad_cases)} bad cases, it will take some time...")
    rows = np.flatnonzero(guesses != dev[1])[most_confident]  # of the cases in dev
    cases = explain_cases(checkpoint, args, [bad_cases[i] for i in most_confident], train, outputs[0],
                          [array[rows] for array in outputs[1]])
    analysis = {"interpreter": args.interpreter, "cases": cases, **list_suspects(args, train, labels),
                **list_uncovered(args, train, dev, *features, guesses, labels)}
    baseline = train_baseline(train, dev, labels, metrics[1]) if args.baseline else None
    write_report(args.report_dir, labels, *metrics, bad_cases, baseline, args.params_path, analysis)


if __name__ == "__main__":
    run_script(main)
