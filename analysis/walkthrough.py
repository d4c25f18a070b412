"""Measure what cleaning and augmenting the training data are worth: the experiment of analysis/README.md, step by step.

    python analysis/walkthrough.py --source_dir KUAKE_QIC --model_name_or_path data --output_dir build/walkthrough
    python analysis/walkthrough.py --source_dir KUAKE_QIC --model_name_or_path zh_bert --fold_model both --learning_rate 1e-4 \\
        --num_train_epochs 2

For every seed: hold out a part of train for choosing the best epoch, keep dev.txt as the test set that nothing else looks at,
replace --noise of the labels of train at random, and train and test on: the clean rows; the noisy rows; the noisy rows without
those that dirty.py lists; the noisy rows with those that dirty.py lists relabelled (a person is stood in for by the true
labels); the clean rows with aug.py's added; the clean rows twice, as many steps of training as the last but no new rows; half
of the clean rows; that half and what sparse.py --annotate chooses of the other half; that half and as many random rows of the
other. Every command is printed as it runs.

Reads   source_dir/train.txt, dev.txt, label.txt.
Writes  output_dir/seed-N/NAME/: data files, checkpoint and metrics.json of each; a training that is done is not done again.
        output_dir/results.tsv and the same table on standard output.
"""

import json
import os
import shutil

import numpy as np

from textcls.analysis.experiments import check_options, model_files, run
from textcls.analysis.label_errors import FOLD_MODELS, plant
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
SUPPORT = 0.2  # sparse texts of the held-out rows, and at most support of half the rows, as a share of them


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--source_dir", required=True, help="folder of train.txt, dev.txt and label.txt")
    parser.add_argument("--model_name_or_path", required=True, help="the model to train, as for train.py")
    parser.add_argument("--output_dir", default="build/walkthrough", help="folder of all data and results")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[1, 2, 3])
    parser.add_argument("--noise", type=float, default=0.2, help="share of the labels of train replaced at random")
    parser.add_argument("--fold_model", choices=FOLD_MODELS, default="tfidf", help="as of dirty.py")
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


def list_suspects(args, seed, folder, count):
    """Let dirty.py list `count` rows of a data folder. Returns (what it lists, the rest), each (texts, label names), and the
    rows that are listed, counted from 0."""
    dirty, rest = (os.path.join(folder, name) for name in ("train_dirty.txt", "train_dirty_rest.txt"))
    if not os.path.isfile(dirty):
        model = [] if args.fold_model == "tfidf" else ["--model_name_or_path", args.model_name_or_path]
        training = [] if args.fold_model in ("tfidf", "vectors") else [
            "--learning_rate", args.learning_rate, "--num_train_epochs", args.num_train_epochs,
            "--per_device_train_batch_size", 32]
        run("analysis/dirty.py", "--dataset_dir", folder, "--dirty_num", count, "--dirty_file", "train_dirty.txt", "--rest_file",
            "train_dirty_rest.txt", "--seed", seed, "--fold_model", args.fold_model, *model, *training)
    with open(os.path.join(folder, "train_dirty_report.tsv"), encoding="utf-8", newline="\n") as file:
        lines = [int(row.split("\t")[1]) for row in list(file)[1:]]
    return read_rows(dirty), read_rows(rest), np.array(lines) - 1


def choose_support(folder, pool, num_sparse, count):
    """Let sparse.py choose at most `count` texts of pool (list of str) for the model trained on a data folder. Returns them."""
    support = os.path.join(folder, "support.txt")
    if not os.path.isfile(support):
        with complete_file(os.path.join(folder, "pool.txt")) as file:
            file.writelines(f"{text}\n" for text in pool)
        run("analysis/sparse.py", "--dataset_dir", folder, "--params_path", os.path.join(folder, "checkpoint"), "--annotate",
            "--unlabeled_file", "pool.txt", "--sparse_num", num_sparse, "--support_num", count)
    with open(support, encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def run_seed(args, seed, texts, label_ids, test, labels):
    """Results of one seed: {name: (number of training rows, accuracy, macro-F1)}."""
    names, generator = np.array(labels), np.random.default_rng(seed)
    held_out, kept = np.split(generator.permutation(len(texts)), [round(HELD_OUT * len(texts))])
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

    listed, unlisted, suspects = list_suspects(args, seed, folder("noisy"), round(args.noise * len(kept)))
    relabelled = names[label_ids[kept[suspects]]].tolist()  # what a person would write
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

    half, pool = np.split(kept, [len(kept) // 2])
    measure("half", rows(half, label_ids), label_ids)
    chosen = set(choose_support(folder("half"), rows(pool, label_ids)[0], round(SUPPORT * len(held_out)),
                                round(SUPPORT * len(half))))
    support = [row for row in pool if texts[row] in chosen]
    measure("half and support", rows([*half, *support], label_ids), label_ids)
    measure("half and random", rows([*half, *generator.choice(pool, len(support), replace=False)], label_ids), label_ids)
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
