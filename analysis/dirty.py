"""List the training rows whose labels are probably wrong, and like texts with different labels, for a person to read again.

    python analysis/dirty.py --dataset_dir data --dirty_num 100                        # seconds, needs no trained model
    python analysis/dirty.py --dataset_dir data --dirty_num 100 --fold_model vectors --model_name_or_path ernie-3.0-medium-zh
    python analysis/dirty.py --dataset_dir data --dirty_num 100 --fold_model both --model_name_or_path ernie-3.0-medium-zh \\
        --device gpu --learning_rate 3e-5 --num_train_epochs 5                          # fine-tunes five models
    python analysis/dirty.py --dataset_dir data --dirty_num 100 --out_of_fold checkpoint/out_of_fold.npz   # has train.py --folds
    python analysis/dirty.py --dataset_dir data --dirty_num 100 --method representer --params_path ./checkpoint

Reads   dataset_dir/train.txt, label.txt; params_path (made by train.py) with --method representer only; out_of_fold.
Writes  into dataset_dir: dirty_file, the dirty_num most suspicious rows, most suspicious first, and rest_file, the others in
        their order (both <text><tab><label>); report_file: a header, then for each row of dirty_file its rank, line in
        train_file, score, text, label, the suggested label and its probability; duplicate_file: a header, then groups of
        like texts with different labels. After correcting dirty_file: cat rest_file dirty_file > train_clean.txt.
"""

import os
import shlex

import numpy as np

from textcls.analysis.duplicates import find_conflicts
from textcls.analysis.features import cached_features
from textcls.analysis.label_errors import (
    FOLD_MODELS,
    combine,
    judge_by_vectors,
    out_of_fold,
    predict_finetuned,
    predict_tfidf,
    rank_suspects,
    representer_probs,
)
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import get_logger
from textcls.common.options import add_model_options, find_label_file, make_parser, positive_int, seed_number
from textcls.common.outputs import check_outputs, complete_file
from textcls.common.probabilities import softmax
from textcls.data.files import read_labelled, read_lines, write_rows
from textcls.data.folds import check_folds, read_out_of_fold, split_folds
from textcls.models.device import select_device
from textcls.models.loading import load_with_data, read_known_labels

NAMES = {"vectors": "the vectors", "both": "the fine-tuned models"}  # of what stands beside TF-IDF
# what every fold's training sets itself
FOLD_OPTIONS = {"--data_dir", "--output_dir", "--do_train", "--save_strategy", "--report_to", "--resume_from_checkpoint"}


def parse_arguments():
    parser = make_parser(
        __doc__, epilog="With --fold_model finetune or both, options not listed here go to train.py (--learning_rate 5e-4 ...); "
        "its --do_eval reads dataset_dir/dev.txt. Names of data and output files are within dataset_dir.")
    add_model_options(parser, train_file=True, cache_dir=True)
    parser.add_argument("--method", choices=["confident", "representer"], default="confident",
                        help="confident: models that have not seen the row judge its label; representer: the checkpoint's last "
                             "layer is fitted again, and a row that it needs much force to fit is suspicious")
    parser.add_argument("--fold_model", choices=FOLD_MODELS,
                        help="what judges with --method confident: TF-IDF + logistic regression; the same together with logistic "
                             "regression on the vectors of --model_name_or_path as it is; train.py; TF-IDF and train.py "
                             "together; None: tfidf, with --out_of_fold finetune")
    parser.add_argument("--out_of_fold", help="out_of_fold.npz of train.py --folds on these rows: nothing is fine-tuned here")
    parser.add_argument("--folds", type=positive_int, default=5, help="parts of the data, each judged by a model of the others")
    parser.add_argument("--model_name_or_path", help="pretrained model for --fold_model vectors, finetune, both; None: "
                        "train.py's default")
    parser.add_argument("--seed", type=seed_number, default=3, help="seed of the folds and of the training")
    parser.add_argument("--dirty_num", type=positive_int, default=100, help="rows to list")
    parser.add_argument("--dirty_file", default="train_dirty.txt", help="where the suspicious rows go")
    parser.add_argument("--rest_file", default="train_dirty_rest.txt", help="where the other rows go")
    parser.add_argument("--report_file", default="train_dirty_report.tsv", help="where scores and suggested labels go")
    parser.add_argument("--duplicate_file", default="train_duplicates.tsv",
                        help='where like texts with different labels go; "": do not look for them')
    parser.add_argument("--duplicate_threshold", type=float, default=0.8,
                        help="cosine from which texts are alike, above 0 up to 1 (1: equal but for punctuation and case)")
    args, args.train_options = parser.parse_known_args()
    args.fold_model = args.fold_model or ("finetune" if args.out_of_fold else "tfidf")
    finetunes = args.method == "confident" and args.fold_model in ("finetune", "both")
    if args.out_of_fold and not finetunes:
        parser.error("--out_of_fold is what fine-tuned models say, expected with it --method confident and --fold_model finetune "
                     "or both")
    if args.fold_model == "vectors" and not args.model_name_or_path:
        parser.error("--fold_model vectors: expected --model_name_or_path, whose vectors they are")
    if args.train_options and (not finetunes or args.out_of_fold):
        parser.error(f"unknown option {' '.join(args.train_options)} (only --fold_model finetune and both hand options on to "
                     "train.py)")
    fixed = FOLD_OPTIONS & {option.split("=")[0] for option in args.train_options}
    if fixed:
        parser.error(f"{', '.join(sorted(fixed))}: set by this script for every fold")
    if args.folds < 2:
        parser.error(f"--folds {args.folds}: expected 2 or more")
    if not 0 < args.duplicate_threshold <= 1:
        parser.error(f"--duplicate_threshold {args.duplicate_threshold}: expected above 0, up to 1")
    return args


# ---------------------------------------------------------------- data and judgement


def read_train(args, labels, problems):
    """The training rows: (texts, label ids int64 [num_rows]). Reports all problems."""
    label_path = os.path.join(args.dataset_dir, args.label_file)
    rows = read_labelled(os.path.join(args.dataset_dir, args.train_file), labels, problems, label_path)
    problems.report()
    return rows


def load_data(args):
    """Returns (Checkpoint, or None where --method needs none, labels, texts, label ids). UserError naming all problems."""
    if args.method == "representer":
        checkpoint, rows = load_with_data(args, lambda *found: read_train(args, *found))
        return checkpoint, checkpoint.labels, *rows
    problems = Problems()
    labels = read_known_labels(find_label_file(args), problems)
    return None, labels, *read_train(args, labels, problems)


def warn_of_single_rows(label_ids, labels):
    """Say which classes have a single row."""
    single = np.flatnonzero(np.bincount(label_ids, minlength=len(labels)) == 1)
    if len(single):
        names = ", ".join(labels[i] for i in single[:5]) + (", ..." if len(single) > 5 else "")
        get_logger().warning(f"Classes with a single row, which nothing can judge, so that it is listed last: {names}")


def judge_by_folds(args, device, labels, texts, label_ids, fold_of, finetuned):
    """Probabilities float [num_rows, num_classes] of every row by models that have not seen it. finetuned: those of
    --out_of_fold, or None."""
    num_classes = len(labels)
    if args.fold_model in ("finetune", "both") and finetuned is None:
        finetuned = out_of_fold(predict_finetuned(args, labels, device), texts, label_ids, num_classes, fold_of, bar=False)
    if args.fold_model == "finetune":
        return finetuned
    other = finetuned
    if args.fold_model == "vectors":
        other = judge_by_vectors(args, device, texts, label_ids, num_classes, fold_of)
    tfidf = out_of_fold(predict_tfidf(num_classes), texts, label_ids, num_classes, fold_of)
    if args.fold_model == "tfidf":
        return tfidf
    probs, weight = combine(tfidf, other, label_ids)
    get_logger().info(f"Weight of {NAMES[args.fold_model]} beside TF-IDF: {weight:.1f}")
    return probs


# ---------------------------------------------------------------- outputs


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


def log_results(args, paths, num_rows, suspects, conflicts):
    """Say what was found, where it is and what to do next. paths: of dirty_file, rest_file, report_file[, duplicate_file]."""
    info, train_path = get_logger().info, os.path.join(args.dataset_dir, args.train_file)
    info(f"Estimated label errors in {train_path}: {suspects.estimated} of {num_rows} rows")
    info(f"Dirty data saved in {paths[0]}: {args.dirty_num} rows, most suspicious first")
    info(f"Rest data saved in {paths[1]}: {num_rows - args.dirty_num} rows")
    info(f"Scores and suggested labels saved in {paths[2]}")
    if args.duplicate_file:
        info(f"Like texts with different labels saved in {paths[3]}: {sum(s == 1 for s, _ in conflicts)} groups of equal, "
             f"{sum(s < 1 for s, _ in conflicts)} pairs of similar texts")
    clean = "train_clean.txt" if "train_clean.txt" not in map(os.path.basename, paths) else "train_cleaned.txt"
    dirty, rest, joined = (shlex.quote(path) for path in (paths[0], paths[1], os.path.join(args.dataset_dir, clean)))
    info(f"Next: correct the labels in {paths[0]} by hand, then run: cat {rest} {dirty} > {joined}")
    info(f"Then train again: train.py --train_file {clean} ...")


def main():
    args = parse_arguments()
    device = select_device(args.device)
    train_path = os.path.join(args.dataset_dir, args.train_file)
    names = [args.dirty_file, args.rest_file, args.report_file] + ([args.duplicate_file] if args.duplicate_file else [])
    paths = [os.path.join(args.dataset_dir, name) for name in names]
    check_outputs(paths, [train_path, find_label_file(args), args.params_path, args.out_of_fold or train_path], args.dataset_dir)
    checkpoint, labels, texts, label_ids = load_data(args)
    if args.dirty_num > len(texts):
        raise UserError(f"--dirty_num {args.dirty_num}: {train_path} has {len(texts)} rows, expected at most that many")
    finetuned = None
    if args.out_of_fold:
        finetuned = softmax(read_out_of_fold(args.out_of_fold, labels, (texts, label_ids), train_path))
    keep_corrections(paths[0], texts, label_ids, labels)
    if checkpoint is None:
        fold_of = split_folds(texts, label_ids, args.folds, args.seed)
    else:
        check_folds(label_ids, 2)
    warn_of_single_rows(label_ids, labels)

    conflicts = find_conflicts(texts, label_ids, args.duplicate_threshold) if args.duplicate_file else []
    if checkpoint is None:
        probs = judge_by_folds(args, device, labels, texts, label_ids, fold_of, finetuned)
    else:
        features, _ = cached_features(checkpoint, args.params_path, texts, args.batch_size, args.cache_dir, "train")
        probs = representer_probs(features, label_ids, len(labels))
    suspects = rank_suspects(label_ids, probs)

    dirty = suspects.order[:args.dirty_num]
    rest = np.setdiff1d(np.arange(len(texts)), dirty)
    if args.duplicate_file:
        write_conflicts(paths[3], texts, label_ids, labels, conflicts)
    write_report(paths[2], texts, label_ids, labels, suspects, args.dirty_num)
    for path, indices in ((paths[1], rest), (paths[0], dirty)):
        write_rows(path, [texts[i] for i in indices], [labels[label_ids[i]] for i in indices])
    log_results(args, paths, len(texts), suspects, conflicts)


if __name__ == "__main__":
    run_script(main)
