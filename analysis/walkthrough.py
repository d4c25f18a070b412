"""Measure what cleaning and augmenting the training data are worth: the experiment of analysis/README.md, step by step.

    python analysis/walkthrough.py --source_dir KUAKE_QIC --model_name_or_path data --output_dir build/walkthrough

For every seed: hold out a part of train for choosing the best epoch, keep dev.txt as the test set that nothing else looks at,
replace --noise of the labels of train at random, and train and test on: the clean rows; the noisy rows; the noisy rows without
those that dirty.py lists; the noisy rows with those that dirty.py lists relabelled (a person is stood in for by the true
labels); the clean rows with aug.py's added; the clean rows twice, as many steps of training as the last but no new rows. Every
command is printed as it runs.

Reads   source_dir/train.txt, dev.txt, label.txt.
Writes  output_dir/seed-N/NAME/: data files, checkpoint and metrics.json of each; a training that is done is not done again.
        output_dir/results.tsv and the same table on standard output.
"""

import json
import os
import shutil

import numpy as np

from textcls.analysis.experiments import check_options, model_files, run
from textcls.analysis.label_errors import plant
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.options import make_parser, positive_int, seed_number
from textcls.common.outputs import check_output_folder, complete_file
from textcls.data.files import read_labelled, read_labels, write_rows
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import load_checkpoint
from textcls.models.device import select_device
from textcls.models.inference import predict_probs
from textcls.training.scoring import score

HELD_OUT = 0.1  # share of train.txt that the best epoch is chosen on


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--source_dir", required=True, help="folder of train.txt, dev.txt and label.txt")
    parser.add_argument("--model_name_or_path", required=True, help="the model to train, as for train.py")
    parser.add_argument("--output_dir", default="build/walkthrough", help="folder of all data and results")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[1, 2, 3])
    parser.add_argument("--noise", type=float, default=0.2, help="share of the labels of train replaced at random")
    parser.add_argument("--learning_rate", default="5e-4")
    parser.add_argument("--num_train_epochs", type=positive_int, default=4)
    parser.add_argument("--device", help="as for train.py; None: the GPU if there is one")
    args = parser.parse_args()
    if not 0 < args.noise < 1:
        parser.error(f"--noise {args.noise}: expected a number between 0 and 1")
    return args


def read_rows(path):
    """(texts, label names) of a file that one of the scripts wrote."""
    with open(path, encoding="utf-8", newline="\n") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return [row[0] for row in rows], [row[1] for row in rows]


def make_folder(folder, source_dir, train, held_out):
    """A data folder whose test.txt is the source's dev.txt. train, held_out: (texts, label names)."""
    os.makedirs(folder, exist_ok=True)
    write_rows(os.path.join(folder, "train.txt"), *train)
    write_rows(os.path.join(folder, "dev.txt"), *held_out)
    shutil.copy(os.path.join(source_dir, "dev.txt"), os.path.join(folder, "test.txt"))
    shutil.copy(os.path.join(source_dir, "label.txt"), folder)


def train_and_test(folder, args, seed, test):
    """(accuracy, macro-F1), 0 to 1, on test (list of str, int64 label ids) of a model trained on the folder."""
    checkpoint_dir = os.path.join(folder, "checkpoint")
    if not os.path.isfile(os.path.join(checkpoint_dir, "config.json")):
        run("train.py", "--model_name_or_path", args.model_name_or_path, "--data_dir", folder, "--output_dir", checkpoint_dir,
            "--learning_rate", args.learning_rate, "--num_train_epochs", args.num_train_epochs, "--seed", seed,
            "--per_device_train_batch_size", 32, "--per_device_eval_batch_size", 32, "--do_train", "--do_eval",
            "--metric_for_best_model", "accuracy", "--load_best_model_at_end", "--evaluation_strategy", "epoch",
            "--save_strategy", "epoch", "--save_total_limit", 1, "--overwrite_output_dir",
            *(["--device", args.device] if args.device else []))
    checkpoint = load_checkpoint(checkpoint_dir)
    metrics = score(test[1], predict_probs(checkpoint, tokenize(test[0], checkpoint.encode), 32))
    with complete_file(os.path.join(folder, "metrics.json")) as file:
        json.dump(metrics, file, ensure_ascii=False, indent=2)
    return metrics["accuracy"], metrics["macro_f1"]


def run_seed(args, seed, texts, label_ids, test, labels):
    """Results of one seed: {name: (number of training rows, accuracy, macro-F1)}."""
    names = np.array(labels)
    order = np.random.default_rng(seed).permutation(len(texts))
    held_out, kept = np.split(order, [round(HELD_OUT * len(texts))])
    noisy_ids, _ = plant(label_ids, len(labels), args.noise, seed)

    def rows(indices, ids):
        return [texts[i] for i in indices], names[ids[indices]].tolist()

    def folder(name):
        return os.path.join(os.path.abspath(args.output_dir), f"seed-{seed}", name)

    results = {}

    def measure(name, train, ids):
        make_folder(folder(name), args.source_dir, train, rows(held_out, ids))
        results[name] = (len(train[0]), *train_and_test(folder(name), args, seed, test))

    measure("clean", rows(kept, label_ids), label_ids)
    measure("noisy", rows(kept, noisy_ids), noisy_ids)

    dirty, rest = (os.path.join(folder("noisy"), name) for name in ("train_dirty.txt", "train_dirty_rest.txt"))
    if not os.path.isfile(dirty):
        run("analysis/dirty.py", "--dataset_dir", folder("noisy"), "--dirty_num", round(args.noise * len(kept)),
            "--dirty_file", "train_dirty.txt", "--rest_file", "train_dirty_rest.txt", "--seed", seed)
    listed, unlisted = read_rows(dirty), read_rows(rest)
    with open(os.path.join(folder("noisy"), "train_dirty_report.tsv"), encoding="utf-8", newline="\n") as file:
        lines = [int(row.split("\t")[1]) for row in list(file)[1:]]
    relabelled = names[label_ids[kept[np.array(lines) - 1]]].tolist()  # what a person would write
    print(f"seed {seed}: {np.mean([a != b for a, b in zip(listed[1], relabelled)]):.1%} of the {len(relabelled)} rows that "
          "dirty.py lists are wrong", flush=True)
    measure("dropped", unlisted, noisy_ids)
    measure("relabelled", (unlisted[0] + listed[0], unlisted[1] + relabelled), noisy_ids)

    augmented = os.path.join(folder("clean"), "train_aug.txt")
    if not os.path.isfile(augmented):
        run("analysis/aug.py", "--train_path", os.path.join(folder("clean"), "train.txt"), "--aug_path", augmented,
            "--aug_strategy", "mix", "--aug_type", "custom", "--custom_file_path", "data/synonyms.json", "--create_n", 1,
            "--seed", seed)
    train, extra = rows(kept, label_ids), read_rows(augmented)
    measure("augmented", (train[0] + extra[0], train[1] + extra[1]), label_ids)
    measure("repeated", (train[0] * 2, train[1] * 2), label_ids)
    return results


def main():
    args = parse_arguments()
    check_output_folder(args.output_dir, "--output_dir")
    args.source_dir = os.path.abspath(args.source_dir)
    if os.path.isdir(args.model_name_or_path):
        args.model_name_or_path = os.path.abspath(args.model_name_or_path)
    problems = Problems()
    labels = read_labels(os.path.join(args.source_dir, "label.txt"), problems)
    texts, label_ids = read_labelled(os.path.join(args.source_dir, "train.txt"), labels, problems)
    test = read_labelled(os.path.join(args.source_dir, "dev.txt"), labels, problems)
    problems.report()
    if round(HELD_OUT * len(texts)) < 1 or len(texts) < 2 * len(labels):
        raise UserError(f"{args.source_dir}/train.txt: {len(texts)} rows are too few to hold out a tenth of them, expected more")
    files = [os.path.join(args.source_dir, name) for name in ("train.txt", "dev.txt", "label.txt")]
    options = {name: value for name, value in vars(args).items() if name not in ("output_dir", "seeds", "device")}
    check_options(args.output_dir, options, [*files, *model_files(args.model_name_or_path)])
    select_device(args.device)
    results = [run_seed(args, seed, texts, label_ids, test, labels) for seed in dict.fromkeys(args.seeds)]
    lines = ["data\tseeds\ttrain rows\taccuracy %\tmacro-F1 %\taccuracy of each seed"]
    for name in results[0]:
        rows, accuracy, f1 = (np.array([result[name][place] for result in results]) for place in range(3))
        spread = [f"{values.mean() * 100:.2f}" + (f" ± {values.std(ddof=1) * 100:.2f}" if len(values) > 1 else "")
                  for values in (accuracy, f1)]
        lines.append("\t".join([name, str(len(results)), f"{rows.mean():.0f}", *spread,
                                " ".join(f"{value * 100:.2f}" for value in accuracy)]))
    with complete_file(os.path.join(args.output_dir, "results.tsv")) as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
