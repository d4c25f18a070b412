"""List the training rows whose labels are probably wrong, and like texts with different labels, for a person to read again.

    python analysis/dirty.py --dataset_dir data --dirty_num 100                        # seconds, needs no trained model
    python analysis/dirty.py --dataset_dir data --dirty_num 100 --fold_model both --model_name_or_path ernie-3.0-medium-zh \\
        --device gpu --learning_rate 3e-5 --num_train_epochs 5                          # better, fine-tunes five models
    python analysis/dirty.py --dataset_dir data --dirty_num 100 --method representer --params_path ./checkpoint

Reads   dataset_dir/train.txt, label.txt; params_path (made by train.py) with --method representer only.
Writes  into dataset_dir: dirty_file, the dirty_num most suspicious rows, most suspicious first, and rest_file, the others in
        their order (both <text><tab><label>); report_file: a header, then for each row of dirty_file its rank, line in
        train_file, score, text, label, the suggested label and its probability; duplicate_file: a header, then groups of
        like texts with different labels. After correcting dirty_file: cat rest_file dirty_file > train_clean.txt.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import read_labelled, read_labels, read_lines, softmax, tokenize
from textcls.checkpoints import load_checkpoint
from textcls.device import select_device
from textcls.errors import Problems, UserError, run_script
from textcls.inference import predict_logits
from textcls.log import get_logger
from textcls.options import add_model_options, find_label_file, positive_int, seed_number
from textcls.outputs import check_outputs, complete_file
from analysis.parts.baseline import baseline_probs
from analysis.parts.duplicates import comparison_key, find_conflicts
from analysis.parts.influence import cached_features, fit_representer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BASELINE_C = 3.0  # less than evaluate.py's 10: the labels are noisy
BASELINE_MIN_DF = 2  # an n-gram of one row says nothing about others
OWN_TRAIN_OPTIONS = {"--data_dir", "--output_dir", "--do_train", "--save_strategy", "--report_to", "--resume_from_checkpoint"}
REPRESENTER_L2 = 0.1  # strong, so that the layer cannot learn wrong labels by heart


class Suspects(NamedTuple):
    """All rows, ranked. Arrays of length num_rows in the order of the file, but for `order`."""

    order: np.ndarray  # int64, row indices, most suspicious first
    score: np.ndarray  # float64, 0 to 1: the probability that the label is wrong, as the model sees it
    suggested: np.ndarray  # int64, the most probable class; the row's own where the model agrees with it
    probability: np.ndarray  # float64, of the suggested class
    estimated: int  # how many labels are wrong by cleanlab's estimate


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="With --fold_model finetune or both, options not listed here go to train.py (--learning_rate 5e-4 ...); its "
               "--do_eval reads dataset_dir/dev.txt. Names of data and output files are within dataset_dir.")
    add_model_options(parser)
    parser.add_argument("--train_file", default="train.txt", help="training file in dataset_dir")
    parser.add_argument("--method", choices=["confident", "representer"], default="confident",
                        help="confident: models that have not seen the row judge its label; representer: the checkpoint's last "
                             "layer is fitted again, and a row that it needs much force to fit is suspicious")
    parser.add_argument("--fold_model", choices=["tfidf", "finetune", "both"], default="tfidf",
                        help="what judges with --method confident: TF-IDF + logistic regression, train.py, both together")
    parser.add_argument("--folds", type=positive_int, default=5, help="parts of the data, each judged by a model of the others")
    parser.add_argument("--model_name_or_path", help="pretrained model for --fold_model finetune; None: train.py's default")
    parser.add_argument("--seed", type=seed_number, default=3, help="seed of the folds and of the training")
    parser.add_argument("--dirty_num", type=positive_int, default=100, help="rows to list")
    parser.add_argument("--dirty_file", default="train_dirty.txt", help="where the suspicious rows go")
    parser.add_argument("--rest_file", default="train_dirty_rest.txt", help="where the other rows go")
    parser.add_argument("--report_file", default="train_dirty_report.tsv", help="where scores and suggested labels go")
    parser.add_argument("--duplicate_file", default="train_duplicates.tsv",
                        help='where like texts with different labels go; "": do not look for them')
    parser.add_argument("--duplicate_threshold", type=float, default=0.8,
                        help="cosine from which texts are alike, above 0 up to 1 (1: equal but for punctuation and case)")
    parser.add_argument("--cache_dir", default=".analysis_cache",
                        help='folder for the training features (--method representer); "": keep none')
    args, args.train_options = parser.parse_known_args()
    trains = args.method == "confident" and args.fold_model != "tfidf"
    if args.train_options and not trains:
        parser.error(f"unknown option {' '.join(args.train_options)} (only --fold_model finetune and both hand options on to "
                     "train.py)")
    owned = OWN_TRAIN_OPTIONS & {option.split("=")[0] for option in args.train_options}
    if owned:
        parser.error(f"{', '.join(sorted(owned))}: set by this script for every fold")
    if args.folds < 2:
        parser.error(f"--folds {args.folds}: expected 2 or more")
    if not 0 < args.duplicate_threshold <= 1:
        parser.error(f"--duplicate_threshold {args.duplicate_threshold}: expected above 0, up to 1")
    return args


# ---------------------------------------------------------------- probabilities of the labels


def split_folds(texts, label_ids, folds, seed):
    """Fold of each row: int64 [num_rows], 0 to folds - 1. Every class is spread evenly, also one with few rows.

    Equal texts share a fold, or each would vouch for the other's label. UserError where the rows are too few.
    """
    from sklearn.model_selection import StratifiedKFold

    groups = {}
    group_of = np.array([groups.setdefault(comparison_key(text), len(groups)) for text in texts])
    first_ids = label_ids[np.unique(group_of, return_index=True)[1]]
    check_folds(first_ids, folds)
    fold_of = np.empty(len(groups), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer rows than folds, which is fine here
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(first_ids, first_ids)
        for fold, (_, held_out) in enumerate(splits):
            fold_of[held_out] = fold
    return fold_of[group_of]


def out_of_fold(predict, texts, label_ids, num_classes, fold_of, bar=True):
    """Probabilities float32 [num_rows, num_classes] of every row by a model of the other folds' rows.

    predict: function of (description, training texts, training label ids, texts), returns float32 [num_texts, num_classes].
    bar: show progress here, where `predict` does not log it.
    """
    probs = np.zeros((len(texts), num_classes), np.float32)
    folds = fold_of.max() + 1
    for fold in tqdm(range(folds), desc="Judging folds", unit=" folds", delay=2, leave=False, disable=not bar):
        inside, outside = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        probs[inside] = predict(f"Fold {fold + 1} of {folds}", [texts[i] for i in outside], label_ids[outside],
                                [texts[i] for i in inside])
    return probs


def predict_tfidf(num_classes):
    """The `predict` of `out_of_fold` that needs no Paddle."""
    def predict(description, train_texts, train_ids, texts):
        return baseline_probs(train_texts, train_ids, texts, num_classes, BASELINE_C, BASELINE_MIN_DF)
    return predict


def predict_finetuned(args, labels, device):
    """The `predict` of `out_of_fold` that runs train.py. args: as of this script; labels: list of str."""
    def predict(description, train_texts, train_ids, texts):
        with tempfile.TemporaryDirectory(prefix="dirty-") as folder:
            train_checkpoint(args, device, labels, train_texts, train_ids, folder, description)
            checkpoint = load_checkpoint(os.path.join(folder, "checkpoint"))
            tokens = tokenize(texts, checkpoint.encode, description=f"Tokenizing {description}")
            return softmax(predict_logits(checkpoint, tokens, args.batch_size))
    return predict


def train_checkpoint(args, device, labels, texts, label_ids, folder, description):
    """Run train.py on these rows; the model is saved in folder/checkpoint. UserError with its message where it fails."""
    train_file = os.path.join(folder, "train.txt")
    write_rows(train_file, texts, label_ids, labels, range(len(texts)))
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--data_dir", args.dataset_dir, "--train_file", train_file,
               "--label_file", args.label_file, "--output_dir", os.path.join(folder, "checkpoint"), "--do_train",
               "--device", device, "--seed", str(args.seed), "--save_strategy", "no", "--report_to", "none"]
    for name in ("model_name_or_path", "max_seq_length"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    get_logger().info(f"{description}: training on {len(texts)} rows ...")
    process = subprocess.run(command + args.train_options, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
                             errors="replace")
    if process.returncode:
        said = [line for line in process.stderr.splitlines() if line.strip() and not line.startswith("[20")]
        raise UserError(f"{description}: train.py ended with code {process.returncode}\n" + "\n".join(said[-10:]))


def combine(first, second, label_ids):
    """Geometric mean of two models' out-of-fold probabilities, with the weight of 0, 0.1, ... 1 that fits the labels best.

    Logarithmic opinion pool: the better of two models gets more say, without knowing which labels are wrong. first, second: float
    [num_rows, num_classes]; label_ids: int64 [num_rows]. Returns (float64 [num_rows, num_classes], the second's weight).
    """
    logs, best = [np.log(np.maximum(probs.astype(np.float64), 1e-6)) for probs in (first, second)], None
    for weight in np.arange(11) / 10:
        probs = softmax((1 - weight) * logs[0] + weight * logs[1])
        fit = np.log(probs[np.arange(len(probs)), label_ids]).mean()
        if best is None or fit > best[0]:
            best = fit, probs, weight
    return best[1:]


# ---------------------------------------------------------------- from probabilities to suspects


def rank_suspects(label_ids, probs, method="self_confidence"):
    """Rank rows by the probability that a model which has not seen them gives to another label than theirs.

    label_ids: int64 [num_rows]; probs: float [num_rows, num_classes], out of fold. The score is 1 - cleanlab's label quality
    (Northcutt et al. 2021, arXiv:1911.00068). The only row of a class cannot be judged, since no model knows the class:
    it counts as right. Returns Suspects.
    """
    from cleanlab.count import num_label_issues
    from cleanlab.rank import get_label_quality_scores

    probs = np.maximum(probs.astype(np.float64), 1e-12)
    single = np.bincount(label_ids, minlength=probs.shape[1])[label_ids] == 1
    probs[single] = np.eye(probs.shape[1])[label_ids[single]]
    probs /= probs.sum(axis=1, keepdims=True)
    score = 1 - get_label_quality_scores(label_ids, probs, method=method)
    return Suspects(np.argsort(-score, kind="stable"), score, probs.argmax(axis=1), probs.max(axis=1),
                    int(num_label_issues(label_ids, probs)))


def representer_probs(features, label_ids, num_classes):
    """Probabilities of the last layer refitted to the gold labels: float64 [num_rows, num_classes].

    A row's representer point at its own class is (1 - this probability of its label) / (2 * l2 * num_rows): ranking by the one
    is ranking by the other. features: float32 [num_rows, hidden_size], of a model trained on these rows.
    """
    _, weights = fit_representer(features, np.eye(num_classes)[label_ids], REPRESENTER_L2)
    return softmax(features @ weights[:-1] + weights[-1])


def find_label_errors(texts, label_ids, num_classes, folds=5, seed=3):
    """Suspects of (list of str, int64 [num_rows]) by TF-IDF folds; UserError where the rows are too few for it."""
    fold_of = split_folds(texts, label_ids, folds, seed)
    probs = out_of_fold(predict_tfidf(num_classes), texts, label_ids, num_classes, fold_of)
    return rank_suspects(label_ids, probs)


def check_folds(label_ids, folds):
    """UserError where the rows cannot be split into so many folds, or say nothing about labels."""
    counts = np.bincount(label_ids)
    if (counts > 0).sum() < 2:
        raise UserError("the training rows are all of one class, expected at least two")
    if folds > counts.max():
        raise UserError(f"--folds {folds}: the largest class has {counts.max()} different texts, expected no more folds")


# ---------------------------------------------------------------- outputs


def write_rows(path, texts, label_ids, labels, indices):
    """Write `<text>\\t<label>` for these row indices, in this order."""
    with complete_file(path, newline="\n") as output:
        output.writelines(f"{texts[i]}\t{labels[label_ids[i]]}\n" for i in indices)


def write_report(path, texts, label_ids, labels, suspects, count):
    """Write the first `count` suspects with scores and suggested labels."""
    with complete_file(path, newline="\n") as output:
        output.write("rank\tline\tscore\ttext\tlabel\tsuggested_label\tprobability\n")
        for rank, i in enumerate(suspects.order[:count].tolist(), 1):
            output.write(f"{rank}\t{i + 1}\t{suspects.score[i]:.6f}\t{texts[i]}\t{labels[label_ids[i]]}\t"
                         f"{labels[suspects.suggested[i]]}\t{suspects.probability[i]:.6f}\n")


def keep_corrections(path, texts, label_ids, labels):
    """UserError where dirty_file has rows that are not training rows: somebody has corrected them, but not yet joined."""
    if not os.path.isfile(path):
        return
    rows = {f"{text}\t{labels[label]}" for text, label in zip(texts, label_ids)}
    corrected = [number for number, row in read_lines(path, Problems()) if row not in rows]
    if corrected:
        raise UserError(f"{path}:{corrected[0]}: {len(corrected)} of its rows are not in the training file, so they seem to be "
                        "corrected by hand and would be lost, expected another --dirty_file, or this one moved away")


def write_conflicts(path, texts, label_ids, labels, conflicts):
    """Write groups of like texts with different labels, one row per text."""
    with complete_file(path, newline="\n") as output:
        output.write("group\tsimilarity\tline\ttext\tlabel\n")
        for number, (similarity, rows) in enumerate(conflicts, 1):
            output.writelines(f"{number}\t{similarity:.4f}\t{i + 1}\t{texts[i]}\t{labels[label_ids[i]]}\n" for i in rows)


def main():
    args = parse_arguments()
    device, info = select_device(args.device), get_logger().info
    train_path, label_path = os.path.join(args.dataset_dir, args.train_file), find_label_file(args)
    names = [args.dirty_file, args.rest_file, args.report_file] + ([args.duplicate_file] if args.duplicate_file else [])
    outputs = [os.path.join(args.dataset_dir, name) for name in names]
    check_outputs(outputs, [train_path, label_path, args.params_path], args.dataset_dir)
    problems, checkpoint, labels = Problems(), None, []
    if args.method == "confident" or os.path.isfile(label_path):
        labels = read_labels(label_path, problems)
        texts, label_ids = read_labelled(train_path, [] if problems.count else labels, problems, label_path)
        problems.report()  # before the model is loaded, which would report label.txt alone
    if args.method == "representer":
        checkpoint = load_checkpoint(args.params_path, label_path, args.max_seq_length)
        if not labels:
            labels = checkpoint.labels
            texts, label_ids = read_labelled(train_path, labels, problems, label_path)
            problems.report()
    if args.dirty_num > len(texts):
        raise UserError(f"--dirty_num {args.dirty_num}: {train_path} has {len(texts)} rows, expected at most that many")
    keep_corrections(outputs[0], texts, label_ids, labels)
    if args.method == "confident":
        fold_of = split_folds(texts, label_ids, args.folds, args.seed)
    else:
        check_folds(label_ids, 2)
    single = np.flatnonzero(np.bincount(label_ids, minlength=len(labels)) == 1)
    if len(single):
        names = ", ".join(labels[i] for i in single[:5]) + (", ..." if len(single) > 5 else "")
        get_logger().warning(f"Classes with a single row, which nothing can judge, so that it is listed last: {names}")

    conflicts = find_conflicts(texts, label_ids, args.duplicate_threshold) if args.duplicate_file else []
    if checkpoint is not None:
        features, _ = cached_features(checkpoint, args.params_path, texts, args.batch_size, args.cache_dir, "train")
        probs = representer_probs(features, label_ids, len(labels))
    else:
        parts = []
        if args.fold_model != "tfidf":
            predict = predict_finetuned(args, labels, device)
            parts.append(out_of_fold(predict, texts, label_ids, len(labels), fold_of, bar=False))
        if args.fold_model != "finetune":
            parts.append(out_of_fold(predict_tfidf(len(labels)), texts, label_ids, len(labels), fold_of))
        probs = parts[0]
        if len(parts) == 2:
            probs, weight = combine(*parts[::-1], label_ids)
            info(f"Weight of the fine-tuned models beside TF-IDF: {weight:.1f}")
    suspects = rank_suspects(label_ids, probs)

    dirty = suspects.order[:args.dirty_num]
    if args.duplicate_file:
        write_conflicts(outputs[3], texts, label_ids, labels, conflicts)
    write_report(outputs[2], texts, label_ids, labels, suspects, args.dirty_num)
    write_rows(outputs[1], texts, label_ids, labels, np.setdiff1d(np.arange(len(texts)), dirty))
    write_rows(outputs[0], texts, label_ids, labels, dirty)
    info(f"Estimated label errors in {train_path}: {suspects.estimated} of {len(texts)} rows")
    info(f"Dirty data saved in {outputs[0]}: {args.dirty_num} rows, most suspicious first")
    info(f"Rest data saved in {outputs[1]}: {len(texts) - args.dirty_num} rows")
    info(f"Scores and suggested labels saved in {outputs[2]}")
    if args.duplicate_file:
        info(f"Like texts with different labels saved in {outputs[3]}: {sum(s == 1 for s, _ in conflicts)} groups of equal, "
             f"{sum(s < 1 for s, _ in conflicts)} pairs of similar texts")
    clean = "train_clean.txt" if "train_clean.txt" not in map(os.path.basename, outputs) else "train_cleaned.txt"
    paths = [shlex.quote(path) for path in (outputs[1], outputs[0], os.path.join(args.dataset_dir, clean))]
    info(f"Next: correct the labels in {outputs[0]} by hand, then run: cat {paths[0]} {paths[1]} > {paths[2]}")
    info(f"Then train again: train.py --train_file {clean} ...")


if __name__ == "__main__":
    run_script(main)
