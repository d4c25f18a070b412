"""Measure how labels that the encoder has never seen are answered: some are left out of the training and added by a few texts.

    python retrieval_based/benchmark.py --model_name_or_path folder --data_dir data --leave_out 3 --shots 5 --seeds 1 2 3 \\
        --train_options --num_train_epochs 3 --learning_rate 1e-4

Reads   data_dir/: train.txt, dev.txt (what build_index.py is fitted on), test.txt (what is measured), label.txt.
Writes  output_dir/seed-N/: the data without these labels, encoder, export and index; results.json. A training that is there is
        not run again. Prints for each seed the accuracy on texts of the old labels before and after the others were added, the
        share of the new labels' texts that get their label, and the AUROC of `known`, by which unknown labels are told.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import get_logger
from textcls.common.options import make_parser, positive_int, seed_number
from textcls.common.outputs import check_output_folder, complete_file
from textcls.data.files import draw_shots, read_label_words, read_labelled

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="pretrained model, a folder or built-in name")
    parser.add_argument("--data_dir", default="./data", help="folder with train.txt, dev.txt, test.txt, label.txt")
    parser.add_argument("--leave_out", type=positive_int, default=3, help="labels that the training does not see")
    parser.add_argument("--shots", type=positive_int, default=5, help="training texts by which each of them is added")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[1], help="of what is drawn, and of the training")
    parser.add_argument("--output_dir", default="retrieval-benchmark")
    parser.add_argument("--train_options", nargs=argparse.REMAINDER, default=[], help="last of all: options of train.py")
    return parser.parse_args()


def run(log, script, *options):
    """Run a script of this folder, its messages into a file. UserError where it fails."""
    with open(log, "w", encoding="utf-8") as output:
        command = [sys.executable, f"retrieval_based/{script}.py", *map(str, options)]
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise UserError(f"{log}: retrieval_based/{script}.py ended with code {code}, expected 0")


def read_rows(data_dir):
    """(labels, {"train", "dev", "test": (texts, label ids)})"""
    problems, path = Problems(), os.path.join(data_dir, "label.txt")
    labels = list(read_label_words(path, problems))
    rows = {name: read_labelled(os.path.join(data_dir, f"{name}.txt"), labels, problems, path)
            for name in ("train", "dev", "test")}
    problems.report()
    return labels, rows


def write_known(folder, labels, rows, new):
    """The data folder without the labels whose ids are in new; texts.txt holds all texts of test."""
    os.makedirs(folder, exist_ok=True)
    contents = {"label": [label for index, label in enumerate(labels) if index not in new], "texts": rows["test"][0]}
    for name in ("train", "dev"):
        contents[name] = [f"{text}\t{labels[index]}" for text, index in zip(*rows[name]) if index not in new]
    for name, lines in contents.items():
        with complete_file(os.path.join(folder, f"{name}.txt"), newline="\n") as output:
            output.writelines(line + "\n" for line in lines)


def answer(folder, name):
    """What predict.py says of texts.txt: (list of labels, float [num_texts] probabilities of a known label)."""
    output = os.path.join(folder, f"{name}.jsonl")
    run(os.path.join(folder, f"{name}.log"), "predict", "--params_path", os.path.join(folder, "export"), "--index_dir",
        os.path.join(folder, "index"), "--dataset_dir", folder, "--data_file", "texts.txt", "--output_format", "jsonl",
        "--output_file", output)
    with open(output, encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    return [row["label"] for row in answers], np.array([row["known"] for row in answers])


def measure(args, seed, labels, rows):
    """Train without some labels, add them, and measure: a dict of what results.json holds for a seed."""
    from sklearn.metrics import roc_auc_score

    folder = os.path.abspath(os.path.join(args.output_dir, f"seed-{seed}"))
    new = np.random.default_rng(seed).choice(len(labels), args.leave_out, replace=False)
    write_known(folder, labels, rows, set(new.tolist()))
    paths = {name: os.path.join(folder, name) for name in ("checkpoint", "export", "index")}
    if not os.path.isfile(os.path.join(paths["export"], "deploy.json")):
        run(f"{folder}/train.log", "train", "--model_name_or_path", args.model_name_or_path, "--data_dir", folder, "--output_dir",
            paths["checkpoint"], "--seed", seed, "--overwrite_output_dir", "--do_train", *args.train_options)
        run(f"{folder}/export.log", "export_model", "--params_path", paths["checkpoint"], "--output_path", paths["export"])
    run(f"{folder}/build.log", "build_index", "--params_path", paths["export"], "--data_dir", folder, "--index_dir",
        paths["index"], "--overwrite")
    truth, is_new = np.array([labels[index] for index in rows["test"][1]]), np.isin(rows["test"][1], new)
    before, known = answer(folder, "before")
    texts, label_ids = rows["train"]
    drawn = draw_shots(texts, label_ids, args.shots, seed)
    for label in new:
        chosen = [texts[index] for index in drawn if label_ids[index] == label]
        run(f"{folder}/add.log", "index", "add", labels[label], "--texts", *chosen, "--index_dir", paths["index"],
            "--params_path", paths["export"])
    after, _ = answer(folder, "after")
    is_right = {"before": truth == np.array(before), "after": truth == np.array(after)}
    return {"seed": seed, "new labels": [labels[index] for index in new], "old before": is_right["before"][~is_new].mean(),
            "old after": is_right["after"][~is_new].mean(), "new recall": is_right["after"][is_new].mean(),
            "auroc of unknown": roc_auc_score(~is_new, known)}


def main():
    args = parse_arguments()
    labels, rows = read_rows(args.data_dir)
    if args.leave_out > len(labels) - 2:
        raise UserError(f"--leave_out {args.leave_out}: of {len(labels)} labels, expected to leave two or more")
    check_output_folder(args.output_dir, "--output_dir", {"the data folder": args.data_dir})
    os.makedirs(args.output_dir, exist_ok=True)
    results = []
    for seed in args.seeds:
        get_logger().info(f"Seed {seed} of {len(args.seeds)} ...")
        results.append(measure(args, seed, labels, rows))
    with complete_file(os.path.join(args.output_dir, "results.json")) as output:
        json.dump(results, output, ensure_ascii=False, indent=1)
    names = ["old before", "old after", "new recall", "auroc of unknown"]
    print(f"{'seed':8}" + "".join(f"{name:>18}" for name in names))
    for result in results:
        print(f"{result['seed']:<8}" + "".join(f"{100 * result[name]:18.2f}" for name in names))
    print(f"{'mean':8}" + "".join(f"{100 * np.mean([result[name] for result in results]):18.2f}" for name in names))


if __name__ == "__main__":
    run_script(main)
