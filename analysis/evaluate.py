"""Evaluate a trained classifier on train and dev, class by class, and list the texts it gets wrong.

    python analysis/evaluate.py --device "gpu" --max_seq_length 128 --batch_size 32 --bad_case_file "bad_case.txt" \\
        --dataset_dir "data" --params_path "./checkpoint"
    python analysis/evaluate.py --dataset_dir data --params_path ./checkpoint --baseline --report_dir report
    python analysis/evaluate.py --dev_file test.txt --wanted_precision 0.95 --save_threshold
    python analysis/evaluate.py --dev_file test_unknown.txt --unknown_label 无关 --least_known 0.5
    python analysis/evaluate.py --out_of_fold checkpoint/out_of_fold.npz         # after train.py --folds, without dev.txt
    python -m textcls.launch --nproc_per_node 2 analysis/evaluate.py --device cpu --dataset_dir data

Reads   dataset_dir/train.txt, dev.txt (not with --out_of_fold), label.txt; params_path (made by train.py).
        train_file and dev_file may also be .txt.gz, or .parquet with a column of texts and one of labels.
Writes  bad_case_file: `Text\\tLabel\\tPrediction`, one wrong dev text per line; with --report_dir also metrics.json,
        confusion_matrix.png, reliability.png, risk_coverage.png and report.html (one self-contained page of all of it); with
        --save_threshold the threshold into params_path/config.json, for --threshold auto.
"""

import os
import tempfile

import numpy as np

from textcls.analysis.evaluation_report import (
    Answers,
    as_shown,
    join_answers,
    keep_answers,
    log_unknown,
    score_answers,
    score_unknown,
    train_baseline,
    write_report,
)
from textcls.common.confidence import CONFIDENCE, explain_no_threshold, find_threshold, precision_bound
from textcls.common.digests import file_id, rows_id, sha256
from textcls.common.errors import UserError, count_ranks, is_main_rank, run_script
from textcls.common.log import get_logger, progress_bar
from textcls.common.options import (
    add_column_options,
    add_model_options,
    find_label_file,
    make_parser,
    probability,
    share_below_one,
)
from textcls.common.outputs import check_output, check_output_folder, check_writable, complete_file, is_stream
from textcls.data.files import check_splits, store_labelled
from textcls.data.folds import read_out_of_fold
from textcls.data.parquet import check_columns, check_pyarrow, is_parquet, new_parquet
from textcls.data.tokens import tokenize
from textcls.models.configs import change_config
from textcls.models.device import select_device
from textcls.models.inference import predict_known
from textcls.models.loading import data_paths, load_with_data
from textcls.models.processes import begin_processes, compare_records, gather_rows, this_rank, wait_for_all
from textcls.models.weights import WEIGHTS
from textcls.runtime.parts import hash_files
from textcls.training.scoring import BadCases

CHUNK = 1 << 16  # texts of a process whose tokens and logits are in memory at a time


def parse_arguments():
    parser = make_parser(__doc__)
    add_model_options(parser, train_file=True, dev_file=True)
    add_column_options(parser, labelled=True)
    parser.add_argument("--bad_case_file", default="bad_case.txt", help="where the wrong dev texts go")
    parser.add_argument("--bad_case_confidence", action="store_true", help="add the column Confidence to bad_case_file")
    parser.add_argument("--report_dir", help="folder for metrics.json, pictures and report.html")
    parser.add_argument("--out_of_fold", help="out_of_fold.npz of train.py --folds: in the place of dev_file, evaluate the rows "
                                              "of train_file, each by a model that has not seen it")
    parser.add_argument("--baseline", action="store_true",
                        help="also train character TF-IDF + logistic regression and print its accuracy")
    parser.add_argument("--wanted_precision", type=share_below_one,
                        help="find the lowest --threshold from which on at least this share of the answers is right")
    parser.add_argument("--save_threshold", action="store_true", help="keep it in the checkpoint, for --threshold auto")
    parser.add_argument("--unknown_label", help="what stands in dev_file in the place of a label for texts of none of them: how "
                        "well they are told is measured")
    parser.add_argument("--least_known", type=probability, default=0.5,
                        help="with --unknown_label: texts that are less probably of a known label count as unknown")
    args = parser.parse_args()
    if args.save_threshold and args.wanted_precision is None:
        parser.error("--save_threshold keeps what --wanted_precision finds, expected --wanted_precision too, such as 0.95")
    if args.out_of_fold:
        args.dev_file = args.train_file
        if args.unknown_label is not None:
            parser.error("--unknown_label is for texts of a dev_file, expected it without --out_of_fold")
        if args.baseline:
            parser.error("--baseline: would be asked about its own training rows with --out_of_fold, expected only one of them")
    return args


def read_rows(args, labels, problems):
    """Train and dev: (texts, label ids) of each; with --out_of_fold both are those of train_file.

    The texts stay in temporary files beside bad_case_file. Rows with --unknown_label have the id len(labels).
    """
    paths, label_path, unknown = data_paths(args), find_label_file(args), args.unknown_label
    folder = tempfile.gettempdir() if is_stream(args.bad_case_file) else os.path.dirname(os.path.abspath(args.bad_case_file))

    def read(path, allowed):
        return store_labelled(path, allowed, problems, label_path, (args.text_column, args.label_column), folder)

    if unknown is not None and unknown in labels:
        raise UserError(f"--unknown_label {unknown}: is a label of {label_path}, expected one that is not")
    train = dev = read(paths[0], labels)
    if not args.out_of_fold:
        dev = read(paths[1], labels + [unknown] if labels and unknown is not None else labels)
        if not problems.count:
            check_splits(*paths, train, dev, labels, problems)
    problems.report()
    return train, dev


def write_bad_cases(path, bad_cases, with_confidence):
    """Write bad_case.txt: header, then one tab-separated row per wrong text; or a Parquet file, by its name."""
    columns = ["text", "label", "prediction"] + (["confidence"] if with_confidence else [])
    if is_parquet(path):
        with new_parquet(path, {name: float if name == "confidence" else str for name in columns}) as output:
            return output.writerows([case[name] for name in columns] for case in bad_cases)
    with complete_file(path) as output:
        output.write("\t".join(column.capitalize() for column in columns) + "\n")
        for case in bad_cases:
            row = {**case, "confidence": f"{case['confidence']:.4f}"}
            output.write("\t".join(row[column] for column in columns) + "\n")


def run_model(checkpoint, split, batch_size, name, is_measured=False, with_logits=False):
    """The Answers to a split (texts, label ids), whose texts several processes share: CHUNK of them at a time.

    is_measured, with_logits: as of `keep_answers`.
    """
    rank, ranks = this_rank(), count_ranks()
    texts, label_ids = split[0][rank::ranks], split[1][rank::ranks]
    parts = []
    with progress_bar(len(texts), f"Evaluating {name}", disable=rank > 0) as progress:
        for start in range(0, len(texts), CHUNK):
            rows = slice(start, start + CHUNK)
            tokens = tokenize(texts[rows], checkpoint.encode, description=f"Tokenizing {name}")
            logits, known = predict_known(checkpoint, tokens, batch_size, progress)
            ids = label_ids[rows] if is_measured else None
            parts.append(keep_answers(logits, checkpoint.temperature, known, ids, with_logits))
    wait_for_all(f"logits of {name}")
    answers = join_answers(parts)
    if ranks == 1:
        return answers
    return Answers._make(None if values is None else gather_rows(values, len(split[0])) for values in answers)


def take_out_of_fold(args, checkpoint, rows, with_logits):
    """The Answers of --out_of_fold to the rows of train_file, (texts, label ids): each by a model that had not seen it."""
    logits = read_out_of_fold(args.out_of_fold, checkpoint.labels, rows, data_paths(args)[0])
    get_logger().info(f"Dev is here: the rows of {args.train_file}, each by a model that had not seen it")
    return join_answers([keep_answers(logits[start:start + CHUNK], checkpoint.temperature, None, rows[1][start:start + CHUNK],
                                      with_logits) for start in range(0, len(logits), CHUNK)])


def check_shares(args, splits):
    """UserError where the processes of a run have different files, or some of them would have no rows. splits: None: no file."""
    compare_records("data", {**{f"the SHA-256 of {os.path.basename(path)}": sha256(path) for path in data_paths(args)},
                             "the SHA-256 of the files in --params_path": hash_files(args.params_path)})
    fewest = min(len(split[0]) for split in splits if split is not None)
    if fewest < count_ranks():
        raise UserError(f"a data file has {fewest} rows for {count_ranks()} processes, expected at least one row for each")


def split_unknown(args, splits, num_labels):
    """Part the texts of no label from dev: (train, dev, unknown), each (texts, label ids); unknown is None where nobody asks."""
    train, (texts, label_ids) = splits
    if args.unknown_label is None:
        return train, (texts, label_ids), None
    parts = [(texts[rows], label_ids[rows]) for rows in (np.flatnonzero(label_ids < num_labels),
                                                         np.flatnonzero(label_ids == num_labels))]
    for part, what in zip(parts, ("of known labels", f"with the label {args.unknown_label} (--unknown_label)")):
        if not len(part[0]):
            raise UserError(f"{data_paths(args)[1]}: holds no texts {what}, expected some of both kinds")
    return train, *parts


def choose_threshold(args, checkpoint, label_ids, answers, dev_id):
    """Log the threshold of --wanted_precision on dev, and save it if that is asked for; None where there is none.

    label_ids: int64 [num_texts] of dev; answers: to dev; dev_id: `rows_id` of dev. Returns a dict of JSON.
    """
    num_texts = len(label_ids)
    if dev_id == checkpoint.fitted_on:
        get_logger().warning(f"{args.dev_file} has also decided the temperature, and perhaps which model is best: its threshold "
                             "may promise a little too much, expected a file that the training has not seen.")
    found = find_threshold(as_shown(answers.confidences), answers.guesses == label_ids, args.wanted_precision)
    what = f"threshold for a precision of {args.wanted_precision:g} in {args.dev_file}"
    if found is None:
        get_logger().warning(f"No {what}: {explain_no_threshold(num_texts, args.wanted_precision)}."
                             + (" Nothing is saved." if args.save_threshold else ""))
        return None
    observed, coverage = found.right / found.rows, found.rows / num_texts
    get_logger().info(f"The {what}: {found.value:.6f} | coverage {coverage * 100:.2f}% ({found.rows} of {num_texts} texts) | "
                      f"precision there {observed * 100:.2f}%, with a confidence of {CONFIDENCE * 100:.0f}% at least "
                      f"{precision_bound(found.right, found.rows) * 100:.2f}%")
    threshold = {"value": found.value, "precision": args.wanted_precision, "coverage": coverage, "observed_precision": observed,
                 "rows": num_texts, "file": args.dev_file, "rows_id": dev_id}
    if args.save_threshold:
        weights = file_id(os.path.join(args.params_path, WEIGHTS))
        change_config(args.params_path, threshold={
            **threshold, "temperature": checkpoint.temperature, "weights": weights, "max_seq_length": checkpoint.max_seq_length})
        get_logger().info(f"Threshold saved in {os.path.join(args.params_path, 'config.json')}")
    return threshold


def main():
    args = parse_arguments()
    begin_processes(vars(args))
    check_columns(args, data_paths(args))
    select_device(args.device)
    check_output(args.bad_case_file, [*data_paths(args), find_label_file(args), args.params_path], args.dataset_dir)
    if is_parquet(args.bad_case_file):
        check_pyarrow(args.bad_case_file)
    if args.report_dir:
        check_output_folder(args.report_dir, "--report_dir")
    if args.save_threshold:
        check_writable("--save_threshold", args.params_path)
    checkpoint, splits = load_with_data(args, lambda *found: read_rows(args, *found))
    labels = checkpoint.labels
    train_split, dev_split, unknown_split = split_unknown(args, splits, len(labels))
    check_shares(args, (train_split, dev_split, unknown_split))
    dev_id = rows_id(*dev_split)
    is_fitted_on_dev = dev_id == checkpoint.fitted_on
    train_answers = run_model(checkpoint, train_split, args.batch_size, "train")
    if args.out_of_fold:
        dev_answers = take_out_of_fold(args, checkpoint, dev_split, is_fitted_on_dev)
    else:
        dev_answers = run_model(checkpoint, dev_split, args.batch_size, "dev", True, is_fitted_on_dev)
    others = None if unknown_split is None else run_model(checkpoint, unknown_split, args.batch_size, "unknown texts")
    if not is_main_rank():
        return
    train, dev = score_answers(labels, [train_split[1], dev_split[1]], train_answers, dev_answers, checkpoint.temperature)
    wrong_rows = np.flatnonzero(dev_answers.guesses != dev_split[1])
    bad_cases = BadCases(dev_split[0], wrong_rows, dev_split[1], dev_answers.guesses, dev_answers.confidences, labels)
    write_bad_cases(args.bad_case_file, bad_cases, args.bad_case_confidence)
    get_logger().info(f"Bad case in dev dataset saved in {args.bad_case_file}")
    if args.wanted_precision is not None:
        dev["threshold"] = choose_threshold(args, checkpoint, dev_split[1], dev_answers, dev_id)
    if others is not None:
        dev["unknown"] = score_unknown(checkpoint, dev_answers, others, dev_split[1], args.least_known)
        log_unknown(dev["unknown"])
    baseline = train_baseline(train_split, dev_split, labels, dev) if args.baseline else None
    if args.report_dir:
        write_report(args.report_dir, labels, train, dev, bad_cases, baseline, args.params_path)


if __name__ == "__main__":
    run_script(main)
