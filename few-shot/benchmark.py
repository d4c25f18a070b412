"""Compare prompts with fine-tuning, TF-IDF and SetFit on small training sets: accuracy as mean and standard deviation.

    python few-shot/benchmark.py --model_name_or_path folder --label_file label.txt --test_file test.txt \\
        --train_files train_0.txt train_1.txt --max_steps 150 --prompt A B C --unlabelled_files train_0.txt train_1.txt
    python few-shot/benchmark.py --model_name_or_path folder --label_file label.txt --test_file dev.txt \\
        --train_files train.txt --shots 16 --seeds 1 2 3 4 5 --max_steps 110 --methods prompt fine_tuning tfidf
    python few-shot/benchmark.py ... --shots 4 16 64 0 --max_steps 150 150 600 --figure curve.png      # 0: all rows

Methods: prompts (one model per --prompt, their mean, and with --unlabelled_files one model distilled from all), prompt (the
first --prompt alone), fine_tuning (train.py), tfidf (characters and logistic regression), setfit (needs --setfit_python, the
Python of an environment made from requirements-setfit.txt). All train on the same rows for the same number of steps.
Reads   files of <text><tab><label>; label_file as of few-shot/train.py; of unlabelled_files only the texts, without those that
        are trained on or tested.
Writes  output_dir/: results.json; data and models of each run. What it holds is not run again. Prints the table.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import get_logger
from textcls.common.options import make_parser, positive_int
from textcls.common.outputs import check_output, complete_file
from textcls.data.files import draw_shots, read_json, read_label_words, read_labelled, read_lines
from textcls.training.baseline import baseline_probs
from textcls.training.calibration import cross_fit, measure_confidence
from textcls.training.scoring import score_classes

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("prompts", "prompt", "fine_tuning", "tfidf", "setfit")
# These decide what is run, not how; the number of steps stands beside each result.
FREE_OPTIONS = ("methods", "shots", "seeds", "max_steps", "figure", "output_dir", "setfit_python")


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="masked language model, a folder or built-in name")
    parser.add_argument("--train_files", nargs="+", required=True, help="training sets; with --shots one file to draw from")
    parser.add_argument("--test_file", required=True, help="rows that all results are measured on")
    parser.add_argument("--label_file", required=True, help="`label` or `label==word` per line")
    parser.add_argument("--unlabelled_files", nargs="*", default=[], help="texts to distill several prompts on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["prompts", "fine_tuning", "tfidf"])
    parser.add_argument("--prompt", nargs="+", default=["{'mask','length':2}：{'text'}"], help="templates")
    parser.add_argument("--shots", nargs="+", type=int, help="rows per class to draw; 0: all rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="of draw and training; without --shots the first one")
    parser.add_argument("--max_steps", nargs="+", type=positive_int, default=[150],
                        help="training steps: one number, or one for each of --shots that is not 0")
    parser.add_argument("--epochs_of_all", type=float, default=3, help="epochs in the place of --max_steps for --shots 0")
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--learning_rate", default="1e-4", help="of prompts")
    parser.add_argument("--fine_tuning_learning_rate", default="1e-4")
    parser.add_argument("--ppt_learning_rate", default="1e-3", help="of the prompts' own parameters")
    parser.add_argument("--max_seq_length", type=positive_int, default=64)
    parser.add_argument("--setfit_python", help="Python of SetFit's environment")
    parser.add_argument("--setfit_learning_rate", default="5e-5")
    parser.add_argument("--figure", help="picture of accuracy over shots to write")
    parser.add_argument("--output_dir", default="few-shot-benchmark")
    args = parser.parse_args()
    if args.shots and len(args.train_files) > 1:
        parser.error("--shots draws from one training file, expected one --train_files")
    counted = [shots for shots in args.shots or [None] if shots != 0]
    if len(args.max_steps) not in (1, len(counted)):
        parser.error("--max_steps: expected one number, or one for each of --shots that is not 0")
    args.max_steps = dict(zip(counted, args.max_steps if len(args.max_steps) > 1 else args.max_steps * len(counted)))
    if "prompts" in args.methods and (len(args.prompt) < 2 or "prompt" in args.methods):
        parser.error("--methods prompts measures each of several --prompt, expected several, and no `prompt` beside it")
    if "setfit" in args.methods and (not args.setfit_python or 0 in (args.shots or [])):
        parser.error("--methods setfit needs --setfit_python, and has no --shots 0")
    return args


def run(command, log):
    """Run a command line, its output in a file. Returns its seconds. UserError where it fails."""
    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") as output:
        code = subprocess.run([str(word) for word in command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise UserError(f"{log}: the command ended with code {code}, expected 0")
    return time.perf_counter() - start


def make_sets(args, labels):
    """The training sets: list of (name, shots or None, seed, texts, label ids)."""
    problems, sets = Problems(), []
    files = [read_labelled(path, labels, problems, args.label_file) for path in args.train_files]
    problems.report()
    if not args.shots:
        return [(f"set-{number}", None, args.seeds[0], *rows) for number, rows in enumerate(files)]
    texts, label_ids = files[0]
    for shots in args.shots:
        for seed in args.seeds:
            if np.bincount(label_ids, minlength=len(labels)).min() < shots:
                raise UserError(f"--shots {shots}: {args.train_files[0]} has fewer rows of a class")
            rows = draw_shots(texts, label_ids, shots, seed) if shots else np.arange(len(texts))
            sets.append((f"shots-{shots}-seed-{seed}", shots, seed, [texts[row] for row in rows], label_ids[rows]))
    return sets


def write_data(folder, args, labels, texts, label_ids, unlabelled):
    """The data folder of one training set, with the test rows as test.txt."""
    os.makedirs(folder, exist_ok=True)
    tested = {line.rpartition("\t")[0] for _, line in read_lines(args.test_file, Problems())}
    left = [text for text in dict.fromkeys(unlabelled) if text not in tested and text not in set(texts)]
    contents = {"label.txt": Path(args.label_file).read_text(encoding="utf-8"),
                "test.txt": Path(args.test_file).read_text(encoding="utf-8"),
                "train.txt": "".join(f"{text}\t{labels[label]}\n" for text, label in zip(texts, label_ids))}
    if left:
        contents["data.txt"] = "".join(text + "\n" for text in left)
    for name, content in contents.items():
        with complete_file(os.path.join(folder, name), newline="\n") as output:
            output.write(content)


def train(script, folder, output, args, learning_rate, shots, seed, *options):
    """Run train.py or few-shot/train.py, with the options that they share and its own. Returns its seconds."""
    steps = ["--max_steps", args.max_steps[shots]] if shots in args.max_steps else ["--num_train_epochs", args.epochs_of_all]
    return run([sys.executable, script, "--data_dir", folder, "--output_dir", output, "--do_train", "--overwrite_output_dir",
                "--model_name_or_path", args.model_name_or_path, *steps, "--per_device_train_batch_size", args.batch_size,
                "--per_device_eval_batch_size", 32, "--learning_rate", learning_rate, "--warmup_ratio", 0.1, "--seed", seed,
                "--max_seq_length", args.max_seq_length, "--save_strategy", "no", "--report_to", "none", *options],
               output + ".log")


def measure(logits, label_ids):
    """Accuracy, macro-F1, and expected calibration error as it comes and with a temperature fitted on other folds."""
    scaled = measure_confidence(logits, label_ids, cross_fit(logits, label_ids))
    scores = score_classes(label_ids, logits.argmax(axis=1), logits.shape[1])
    return {"accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"],
            "ece": measure_confidence(logits, label_ids).error, "ece_scaled": scaled.error}


def predict(folder, texts):
    """Logits of a checkpoint, float32 [num_texts, num_classes]; in a process that has not imported Paddle before it is needed."""
    from textcls.data.tokens import tokenize
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.device import select_device
    from textcls.models.inference import predict_logits

    select_device(None)
    checkpoint = load_checkpoint(folder)
    return predict_logits(checkpoint, tokenize(texts, checkpoint.encode), 32)


def run_prompts(args, folder, shots, seed, test, count):
    """few-shot/train.py with the first `count` prompts. Returns {name: results}."""
    output = os.path.join(folder, "prompts" if count > 1 else "prompt")
    seconds = train("few-shot/train.py", folder, output, args, args.learning_rate, shots, seed, "--ppt_learning_rate",
                    args.ppt_learning_rate, "--folds", 0, "--prompt", *args.prompt[:count])
    if count == 1:
        return {"prompt": {**measure(predict(output, test[0]), test[1]), "seconds": seconds}}
    members = [os.path.join(output, f"prompt-{number}-seed-{seed}") for number in range(1, count + 1)]
    logits = [predict(member, test[0]) for member in members]
    results = {}
    for number, (member, own) in enumerate(zip(members, logits), 1):
        own_seconds = read_json(os.path.join(member, "train_results.json"))["train_runtime"]
        results[f"prompt {number}"] = {**measure(own, test[1]), "seconds": own_seconds}
    results["mean of prompts"] = {**measure(np.mean(logits, axis=0), test[1]),
                                  "seconds": sum(result["seconds"] for result in results.values())}
    if os.path.isfile(os.path.join(folder, "data.txt")):
        results["distilled"] = {**measure(predict(output, test[0]), test[1]), "seconds": seconds}
    return results


def run_method(method, args, folder, training_set, labels, test):
    """Train and measure one method on one training set. Returns {name: results}."""
    _, shots, seed, texts, label_ids = training_set
    if method in ("prompt", "prompts"):
        return run_prompts(args, folder, shots, seed, test, len(args.prompt) if method == "prompts" else 1)
    output = os.path.join(folder, method)
    if method == "fine_tuning":
        seconds = train("train.py", folder, output, args, args.fine_tuning_learning_rate, shots, seed)
        return {method: {**measure(predict(output, test[0]), test[1]), "seconds": seconds}}
    if method == "tfidf":
        start = time.perf_counter()
        probs = baseline_probs(texts, label_ids, test[0], len(labels))
        return {method: {**measure(np.log(probs + 1e-9), test[1]), "seconds": time.perf_counter() - start}}
    run([args.setfit_python, "few-shot/benchmark_setfit.py", "--model_name_or_path", args.model_name_or_path, "--train_file",
         os.path.join(folder, "train.txt"), "--test_file", args.test_file, "--label_file", args.label_file, "--max_steps",
         args.max_steps[shots], "--batch_size", args.batch_size, "--learning_rate", args.setfit_learning_rate, "--seed", seed,
         "--max_seq_length", args.max_seq_length, "--output", output + ".json"], output + ".log")
    found = read_json(output + ".json")
    return {method: {"accuracy": found["accuracy"], "macro_f1": found["macro_f1"], "seconds": found["train_seconds"]}}


def print_table(results):
    """Mean ± sd over the training sets of each number of shots and method; times in seconds."""
    print(f"{'shots':>5} {'method':16} {'sets':>4} {'accuracy':>14} {'min':>6} {'max':>6} {'macro-F1':>14} {'ECE':>6} "
          f"{'scaled':>6} {'time':>7}")
    for shots, name in dict.fromkeys((result["shots"], result["name"]) for result in results):
        rows = [result for result in results if (result["shots"], result["name"]) == (shots, name)]
        accuracy, macro_f1 = (100 * np.array([row[key] for row in rows]) for key in ("accuracy", "macro_f1"))
        errors = [f"{np.mean([row[key] for row in rows]):6.3f}" if key in rows[0] else " " * 6 for key in ("ece", "ece_scaled")]
        print(f"{'' if shots is None else shots or 'all':>5} {name:16} {len(rows):4} {spread(accuracy)} {accuracy.min():6.2f} "
              f"{accuracy.max():6.2f} {spread(macro_f1)} {' '.join(errors)} {np.mean([row['seconds'] for row in rows]):7.1f}")


def spread(values):
    return "{:6.2f} ± {:5.2f}".format(*mean_and_sd(values))


def mean_and_sd(values):
    """Mean and standard deviation (0 for a single value) of a list of float."""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


def draw_figure(results, path):
    """Accuracy over the rows per class, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    shots = sorted({result["shots"] for result in results if result["shots"] is not None}, key=lambda count: count or 10**9)
    for name in dict.fromkeys(result["name"] for result in results):
        found = [[100 * result["accuracy"] for result in results if (result["name"], result["shots"]) == (name, count)]
                 for count in shots]
        places = [place for place, values in enumerate(found) if values]
        means, deviations = zip(*(mean_and_sd(found[place]) for place in places))
        axes.errorbar(places, means, deviations, marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(shots)), [str(count or "all") for count in shots])
    axes.set(xlabel="training rows per class", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    args = parse_arguments()
    problems = Problems()
    labels = list(read_label_words(args.label_file, problems))
    test = read_labelled(args.test_file, labels, problems, args.label_file)
    unlabelled = [line.partition("\t")[0] for path in args.unlabelled_files for _, line in read_lines(path, problems)]
    problems.report()
    path = os.path.join(args.output_dir, "results.json")
    options = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    results = read_json(path)["results"] if os.path.isfile(path) else []
    if results and read_json(path)["options"] != options:
        raise UserError(f"{path}: was measured with other options, expected the same ones, or another --output_dir")
    if args.figure:
        check_output(args.figure, [args.label_file, args.test_file], os.path.dirname(args.label_file))
    for training_set in make_sets(args, labels):
        name, shots, seed, texts, label_ids = training_set
        folder = os.path.abspath(os.path.join(args.output_dir, name))
        for method in args.methods:
            stored = [result for result in results if (result["set"], result["method"]) == (name, method)]
            if any(result["max_steps"] != args.max_steps.get(shots) for result in stored):
                raise UserError(f"{path}: {method} on {name} was measured with --max_steps {stored[0]['max_steps']}, expected "
                                f"{args.max_steps.get(shots)}, or another --output_dir")
            if stored:
                continue
            get_logger().info(f"{name}: {method} on {len(texts)} rows ...")
            write_data(folder, args, labels, texts, label_ids, unlabelled)
            for found, measured in run_method(method, args, folder, training_set, labels, test).items():
                results.append({"set": name, "method": method, "name": found, "shots": shots, "seed": seed,
                                "max_steps": args.max_steps.get(shots), **measured})
            with complete_file(path) as output:
                json.dump({"results": results, "options": options}, output, ensure_ascii=False, indent=1)
    print_table(results)
    if args.figure:
        draw_figure(results, args.figure)


if __name__ == "__main__":
    run_script(main)
