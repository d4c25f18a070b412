"""Measure how texts of labels that an index has never seen are answered: after these labels were added by a few texts, or told
apart from all others.

    python retrieval_based/benchmark.py --model_name_or_path folder --data_dir data --leave_out 3 --shots 5 --seeds 1 2 3 \\
        --train_options --num_train_epochs 3 --learning_rate 1e-4
    python retrieval_based/benchmark.py --model_name_or_path encoder --as_it_is --data_dir clinc150 --known_share 0.25 0.5 0.75 \\
        --test_file test_oos.txt --unknown_label oos --seeds 1 2 3

Reads   data_dir/: train.txt, dev.txt (what build_index.py is fitted on), test.txt (what is measured), label.txt.
Writes  output_dir/seed-N/ or output_dir/known-SHARE-seed-N/: the data without these labels, encoder, export and index;
        results.json. A training that is there is not run again; one of other options or data is refused.
Prints  --leave_out: for each seed the accuracy on texts of the old labels before and after the others were added, the share of
        the new labels' texts that get their label, and the AUROC of `known`, by which unknown labels are told. --known_share,
        the protocol of published tables: only this share of the labels, drawn at random, is known, and the test has all; where
        known is below 0.5 a text counts as unknown: F1 of the unknown (F1-open), macro F1 of the known labels, accuracy, AUROC.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from textcls.common.digests import sha256
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.known import auroc
from textcls.common.log import get_logger
from textcls.common.options import make_parser, positive_int, seed_number, share_below_one
from textcls.common.outputs import check_output_folder, complete_file
from textcls.data.files import draw_shots, read_json, read_label_words, read_labelled
from textcls.retrieval.fitting import NEW_LABEL_COST
from textcls.training.scoring import score_open

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="pretrained model, a folder or built-in name")
    parser.add_argument("--as_it_is", action="store_true", help="do not train the encoder")
    parser.add_argument("--data_dir", default="./data", help="folder with train.txt, dev.txt, test.txt, label.txt")
    parser.add_argument("--test_file", default="test.txt", help="what is measured, in data_dir")
    parser.add_argument("--unknown_label", help="what stands in --test_file in the place of a label for texts of none")
    parser.add_argument("--leave_out", type=positive_int, default=3, help="labels that the training does not see")
    parser.add_argument("--known_share", type=share_below_one, nargs="+", default=[],
                        help="shares of the labels that are known, in the place of --leave_out and --shots")
    parser.add_argument("--unknown_share", type=share_below_one, default=0.5,
                        help="of build_index.py, with --known_share; 0.5: neither known nor unknown texts are expected more")
    parser.add_argument("--new_label_cost", type=share_below_one, default=NEW_LABEL_COST, help="of build_index.py")
    parser.add_argument("--shots", type=positive_int, default=5, help="training texts by which each of them is added")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[1], help="of what is drawn, and of the training")
    parser.add_argument("--output_dir", default="retrieval-benchmark")
    parser.add_argument("--train_options", nargs=argparse.REMAINDER, default=[], help="last of all: options of train.py")
    return parser.parse_args()


def run(log, script, *options):
    """Run a script of this folder, its messages into a file. UserError where it fails."""
    with open(log, "w", encoding="utf-8") as output:
        command = [sys.executable, str(ROOT / "retrieval_based" / f"{script}.py"), *map(str, options)]
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise UserError(f"{log}: retrieval_based/{script}.py ended with code {code}, expected 0")


def read_rows(args):
    """(labels, {"train", "dev", "test": (texts, label ids)}); the id of texts of no label is len(labels)."""
    problems, path = Problems(), os.path.join(args.data_dir, "label.txt")
    labels = list(read_label_words(path, problems))
    rows = {name: read_labelled(os.path.join(args.data_dir, f"{name}.txt"), labels, problems, path) for name in ("train", "dev")}
    known = labels + ([args.unknown_label] if args.unknown_label else [])
    rows["test"] = read_labelled(os.path.join(args.data_dir, args.test_file), known, problems, path)
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


def describe_training(args, folder):
    """What the training on the data in a folder goes by: a dict of what training.json holds."""
    return {"model_name_or_path": args.model_name_or_path, "train_options": args.train_options,
            **{name: sha256(os.path.join(folder, f"{name}.txt")) for name in ("label", "train", "dev")}}


def train_encoder(args, folder, seed, checkpoint, export):
    """Train and export an encoder on the data in a folder, unless it is there. UserError where another one is there."""
    path, wanted = os.path.join(folder, "training.json"), describe_training(args, folder)
    if os.path.isfile(os.path.join(export, "deploy.json")):
        if os.path.isfile(path) and read_json(path) != wanted:
            raise UserError(f"{folder}: holds the training of another model, with other options or of other data, expected "
                            "another --output_dir")
        return
    with complete_file(path) as output:
        json.dump(wanted, output, ensure_ascii=False)
    run(f"{folder}/train.log", "train", "--model_name_or_path", args.model_name_or_path, "--data_dir", folder, "--output_dir",
        checkpoint, "--seed", seed, "--overwrite_output_dir", "--do_train", *args.train_options)
    run(f"{folder}/export.log", "export_model", "--params_path", checkpoint, "--output_path", export)


def make_index(args, folder, seed, *options):
    """Train and export an encoder on the data in a folder, unless it is there or is taken as it is, and build an index of it in
    folder/index. options: of build_index.py. Returns the encoder's path."""
    checkpoint, export = (os.path.join(folder, name) for name in ("checkpoint", "export"))
    encoder = args.model_name_or_path if args.as_it_is else export
    if not args.as_it_is:
        train_encoder(args, folder, seed, checkpoint, export)
    run(f"{folder}/build.log", "build_index", "--params_path", encoder, "--data_dir", folder, "--index_dir",
        os.path.join(folder, "index"), "--overwrite", *options)
    return encoder


def answer(folder, name, encoder):
    """What predict.py says of texts.txt: (list of labels, float [num_texts] probabilities of a known label)."""
    output = os.path.join(folder, f"{name}.jsonl")
    run(os.path.join(folder, f"{name}.log"), "predict", "--params_path", encoder, "--index_dir", os.path.join(folder, "index"),
        "--dataset_dir", folder, "--data_file", "texts.txt", "--output_format", "jsonl",
        "--output_file", output)
    with open(output, encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    return [row["label"] for row in answers], np.array([row["known"] for row in answers])


def measure_added(args, seed, labels, rows):
    """Make an index without some labels, add them, and measure: a dict of what results.json holds for a seed."""
    folder = os.path.abspath(os.path.join(args.output_dir, f"seed-{seed}"))
    new = np.random.default_rng(seed).choice(len(labels), args.leave_out, replace=False)
    write_known(folder, labels, rows, set(new.tolist()))
    encoder = make_index(args, folder, seed, "--new_label_cost", args.new_label_cost)
    truth, is_new = np.array([*labels, ""])[rows["test"][1]], np.isin(rows["test"][1], new)
    is_known = ~is_new & (rows["test"][1] < len(labels))
    before, known = answer(folder, "before", encoder)
    texts, label_ids = rows["train"]
    drawn = draw_shots(texts, label_ids, args.shots, seed)
    for label in new:
        chosen = [texts[index] for index in drawn if label_ids[index] == label]
        run(f"{folder}/add.log", "index", "add", labels[label], "--texts", *chosen, "--index_dir", os.path.join(folder, "index"),
            "--params_path", encoder)
    after, _ = answer(folder, "after", encoder)
    is_right = {"before": truth == np.array(before), "after": truth == np.array(after)}
    return {"seed": seed, "new labels": [labels[index] for index in new], "old before": is_right["before"][is_known].mean(),
            "old after": is_right["after"][is_known].mean(), "new recall": is_right["after"][is_new].mean(),
            "auroc of unknown": auroc(known, is_known)}


def measure_open(args, share, seed, labels, rows):
    """Make an index of a share of the labels, and measure how texts of all others are told: a dict of what results.json holds."""
    folder = os.path.abspath(os.path.join(args.output_dir, f"known-{share:g}-seed-{seed}"))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(labels))[:round(share * len(labels))])
    write_known(folder, labels, rows, set(range(len(labels))) - set(drawn.tolist()))
    encoder = make_index(args, folder, seed, "--unknown_share", args.unknown_share)
    guesses, known = answer(folder, "answers", encoder)
    places = {labels[label]: place for place, label in enumerate(drawn)}
    label_ids = np.array([places.get(label, len(drawn)) for label in np.array([*labels, ""])[rows["test"][1]]])
    scores = score_open(label_ids, np.array([places[label] for label in guesses]), known, len(drawn))
    return {"known share": share, "seed": seed, "known labels": [labels[label] for label in drawn], "F1 of unknown":
            scores["unknown_f1"], "F1 of known": scores["known_f1"], "accuracy": scores["accuracy"],
            "auroc of unknown": auroc(known, label_ids < len(drawn))}


def print_table(results, names):
    """Print figures of each seed, and their means. names: of the figures in results."""
    print(f"{'seed':8}" + "".join(f"{name:>18}" for name in names))
    for result in results:
        print(f"{result['seed']:<8}" + "".join(f"{100 * result[name]:18.2f}" for name in names))
    print(f"{'mean':8}" + "".join(f"{100 * np.mean([result[name] for result in results]):18.2f}" for name in names))


def main():
    args = parse_arguments()
    labels, rows = read_rows(args)
    if args.leave_out > len(labels) - 2:
        raise UserError(f"--leave_out {args.leave_out}: of {len(labels)} labels, expected to leave two or more")
    if args.known_share and round(min(args.known_share) * len(labels)) < 2:
        raise UserError(f"--known_share {min(args.known_share):g}: of {len(labels)} labels, expected to leave two or more")
    check_output_folder(args.output_dir, "--output_dir", {"the data folder": args.data_dir})
    os.makedirs(args.output_dir, exist_ok=True)
    results = []
    for share in args.known_share or [None]:
        for seed in args.seeds:
            get_logger().info(f"Seed {seed} of {args.seeds}" + (f", known share {share:g} ..." if share else " ..."))
            results.append(measure_open(args, share, seed, labels, rows) if share else measure_added(args, seed, labels, rows))
    with complete_file(os.path.join(args.output_dir, "results.json")) as output:
        json.dump(results, output, ensure_ascii=False, indent=1)
    if not args.known_share:
        print_table(results, ["old before", "old after", "new recall", "auroc of unknown"])
    for share in args.known_share:
        print(f"known labels: {share * 100:g} %")
        print_table([result for result in results if result["known share"] == share],
                    ["F1 of unknown", "F1 of known", "accuracy", "auroc of unknown"])


if __name__ == "__main__":
    run_script(main)
