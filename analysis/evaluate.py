"""Evaluate a trained classifier on train and dev, class by class, and list the texts it gets wrong.

    python analysis/evaluate.py --device "gpu" --max_seq_length 128 --batch_size 32 --bad_case_file "bad_case.txt" \\
        --dataset_dir "data" --params_path "./checkpoint"
    python analysis/evaluate.py --dataset_dir data --params_path ./checkpoint --baseline --report_dir report

Reads   dataset_dir/train.txt, dev.txt, label.txt; params_path (made by train.py).
Writes  bad_case_file: `Text\\tLabel\\tPrediction`, one wrong dev text per line; with --report_dir also metrics.json,
        confusion_matrix.png, reliability.png and report.html (one self-contained page of all of it).
"""

import argparse
import base64
import json
import os
import sys
from pathlib import Path

import numpy as np
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import check_splits, read_labelled, read_labels, softmax, tokenize
from textcls.checkpoints import load_checkpoint
from textcls.device import select_device
from textcls.errors import Problems, run_script
from textcls.inference import predict_logits
from textcls.log import get_logger, progress_bar
from textcls.options import add_model_options, find_label_file
from textcls.outputs import check_output, check_output_folder, complete_file, complete_folder
from analysis.parts.baseline import baseline_probs

CALIBRATION_BINS = 10
MATRIX_LABELS = 40  # up to so many classes the confusion matrix shows names and numbers, above only shades
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei",
             "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti TC", "Arial Unicode MS")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--train_file", default="train.txt", help="training file in dataset_dir")
    parser.add_argument("--dev_file", default="dev.txt", help="development file in dataset_dir")
    parser.add_argument("--bad_case_file", default="bad_case.txt", help="where the wrong dev texts go")
    parser.add_argument("--bad_case_confidence", action="store_true", help="add the column Confidence to bad_case_file")
    parser.add_argument("--report_dir", help="folder for metrics.json, pictures and report.html")
    parser.add_argument("--baseline", action="store_true",
                        help="also train character TF-IDF + logistic regression and print its accuracy")
    return parser.parse_args()


def read_splits(args, labels, problems):
    """Read train and dev: two pairs (texts, label ids). Reports what is wrong with them and what `problems` held before."""
    paths = [os.path.join(args.dataset_dir, name) for name in (args.train_file, args.dev_file)]
    label_path = os.path.join(args.dataset_dir, args.label_file)
    train, dev = (read_labelled(path, labels, problems, label_path) for path in paths)
    if not problems.count:
        check_splits(*paths, train, dev, labels, problems)
    problems.report()
    return train, dev


def score(label_ids, probs):
    """Metrics of one split. label_ids: int64 [num_texts]; probs: float32 [num_texts, num_classes].

    Returns a dict: size, accuracy, macro_*, top_k accuracies (k below the number of classes), per_class lists.
    All shares are 0 to 1. Macro averages go over the classes that occur in labels or predictions, as in train.py.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    num_classes = probs.shape[1]
    ranking = np.argsort(-probs, axis=1, kind="stable")
    precision, recall, f1, count = precision_recall_fscore_support(
        label_ids, ranking[:, 0], labels=range(num_classes), zero_division=0)
    seen = np.union1d(label_ids, ranking[:, 0])
    metrics = {"size": len(label_ids), "accuracy": float((ranking[:, 0] == label_ids).mean())}
    for k in (2, 3):
        if k < num_classes:
            metrics[f"top_{k}_accuracy"] = float((ranking[:, :k] == label_ids[:, None]).any(axis=1).mean())
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        metrics[f"macro_{name}"] = float(values[seen].mean())
    metrics["per_class"] = {"count": count.tolist(), "precision": precision.tolist(), "recall": recall.tolist(),
                            "f1": f1.tolist()}
    metrics["confusion_matrix"] = confusion_matrix(label_ids, ranking[:, 0], labels=range(num_classes)).tolist()
    return metrics


def calibration(label_ids, probs):
    """Expected calibration error and its bins (Guo et al. 2017, arXiv:1706.04599).

    Returns (error, bins): bins are dicts of count, confidence and accuracy, empty bins left out.
    """
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == label_ids
    index = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [{"count": int((index == i).sum()), "confidence": float(confidence[index == i].mean()),
             "accuracy": float(correct[index == i].mean())} for i in range(CALIBRATION_BINS) if (index == i).any()]
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(label_ids)
    return error, bins


def log_metrics(labels, train, dev):
    """Print both splits' metrics. The wording is an interface: users' scripts read it."""
    info = get_logger().info
    info("-----Evaluate model-------")
    info(f"Train dataset size: {train['size']}")
    info(f"Dev dataset size: {dev['size']}")
    info(f"Accuracy in dev dataset: {dev['accuracy'] * 100:.2f}%")
    for k in (2, 3):
        if f"top_{k}_accuracy" in dev:
            info(f"Top-{k} accuracy in dev dataset: {dev[f'top_{k}_accuracy'] * 100:.2f}%")
    for index, label in enumerate(labels):
        info(f"Class name: {label}")
        for name, metrics in (("train", train), ("dev", dev)):
            count, precision, recall, f1 = (metrics["per_class"][key][index] for key in
                                            ("count", "precision", "recall", "f1"))
            if count == 0:
                info(f"Evaluation examples in {name} dataset: 0 (0%)")
            else:
                info(f"Evaluation examples in {name} dataset: {count}({count / metrics['size'] * 100:.1f}%) | precision: "
                     f"{precision * 100:.2f} | recall: {recall * 100:.2f} | F1 score {f1 * 100:.2f}")
        info("----------------------------")
    for name, metrics in (("train", train), ("dev", dev)):
        info(f"Macro average in {name} dataset | precision: {metrics['macro_precision'] * 100:.2f} | recall: "
             f"{metrics['macro_recall'] * 100:.2f} | F1 score {metrics['macro_f1'] * 100:.2f}")


def find_bad_cases(texts, label_ids, probs, labels):
    """The wrong dev texts in file order: dicts of text, label, prediction and confidence."""
    guesses = probs.argmax(axis=1)
    return [{"text": texts[i], "label": labels[label_ids[i]], "prediction": labels[guesses[i]],
             "confidence": float(probs[i, guesses[i]])} for i in np.flatnonzero(guesses != label_ids)]


def write_bad_cases(path, bad_cases, with_confidence):
    """Write bad_case.txt: header, then one tab-separated row per wrong text."""
    columns = ["text", "label", "prediction"] + (["confidence"] if with_confidence else [])
    with complete_file(path) as output:
        output.write("\t".join(column.capitalize() for column in columns) + "\n")
        for case in bad_cases:
            row = {**case, "confidence": f"{case['confidence']:.4f}"}
            output.write("\t".join(row[column] for column in columns) + "\n")


def train_baseline(train, dev, labels):
    """Accuracy and macro-F1 on dev of character 1-2-gram TF-IDF + logistic regression (C=10) trained on train."""
    get_logger().info("Training the baseline: character TF-IDF + logistic regression ...")
    probs = baseline_probs(*train, dev[0], len(labels))
    metrics = score(dev[1], probs)
    return {"accuracy": metrics["accuracy"], "macro_f1": metrics["macro_f1"]}


def draw_pictures(folder, labels, dev):
    """Write confusion_matrix.png and reliability.png. Classes go by their ids where no Chinese font is installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [font for font in CJK_FONTS if font in installed]
    names = labels if fonts or all(label.isascii() for label in labels) else [str(i) for i in range(len(labels))]
    with matplotlib.rc_context({"font.sans-serif": fonts + ["DejaVu Sans"], "axes.unicode_minus": False}):
        matrix = np.array(dev["confusion_matrix"])
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        size = 2.5 + 0.55 * min(len(labels), MATRIX_LABELS)
        figure, axes = pyplot.subplots(figsize=(size + 1, size), dpi=120)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(labels) <= MATRIX_LABELS:
            for i, j in np.argwhere(matrix > 0):
                axes.text(j, i, matrix[i, j], ha="center", va="center", fontsize=8,
                          color="white" if shares[i, j] > 0.5 else "black")
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
            axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="Prediction", ylabel="Label", title="Confusion matrix, dev (shade: share of the row)")
        figure.colorbar(image, fraction=0.046)
        figure.savefig(os.path.join(folder, "confusion_matrix.png"), bbox_inches="tight")
        pyplot.close(figure)

        figure, axes = pyplot.subplots(figsize=(5, 4.5), dpi=120)
        axes.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
        bins = dev["calibration_bins"]
        axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", label="model")
        for b in bins:
            axes.annotate(b["count"], (b["confidence"], b["accuracy"]), textcoords="offset points", xytext=(6, -10),
                          fontsize=7)
        axes.set(xlabel="Confidence", ylabel="Accuracy", xlim=(0, 1.02), ylim=(0, 1.02),
                 title=f"Reliability, dev (expected calibration error {dev['expected_calibration_error']:.3f})")
        axes.legend()
        figure.savefig(os.path.join(folder, "reliability.png"), bbox_inches="tight")
        pyplot.close(figure)


def write_report(folder, labels, train, dev, bad_cases, baseline, params_path, analysis=None):
    """Write metrics.json, both pictures and report.html into folder; report.html appears last.

    analysis: what report.py adds to the page, as report_template.html names it, or None.
    """
    import jinja2

    with complete_folder(folder, marker="report.html") as staging:
        with open(os.path.join(staging, "metrics.json"), "w", encoding="utf-8") as file:
            json.dump({"labels": labels, "train": train, "dev": dev, "baseline": baseline}, file, ensure_ascii=False,
                      indent=2)
        draw_pictures(staging, labels, dev)
        pictures = {}
        for name in ("confusion_matrix", "reliability"):
            with open(os.path.join(staging, f"{name}.png"), "rb") as file:
                pictures[name] = base64.b64encode(file.read()).decode("ascii")
        loader = jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__)))
        template = jinja2.Environment(loader=loader, autoescape=True).get_template("report_template.html")
        with open(os.path.join(staging, "report.html"), "w", encoding="utf-8") as file:
            file.write(template.render(
                labels=labels, matrix_labels=MATRIX_LABELS, train=train, dev=dev, baseline=baseline,
                params_path=params_path, pictures=pictures, analysis=analysis,
                bad_cases=sorted(bad_cases, key=lambda case: -case["confidence"])))


def main():
    args = parse_arguments()
    select_device(args.device)
    label_path = find_label_file(args)
    inputs = [os.path.join(args.dataset_dir, name) for name in (args.train_file, args.dev_file)] + [label_path]
    check_output(args.bad_case_file, inputs + [args.params_path])
    if args.report_dir:
        check_output_folder(args.report_dir, "--report_dir")
    problems = Problems()
    if os.path.isfile(label_path):
        read_labels(label_path, problems)
        if problems.count:
            read_splits(args, [], problems)  # a bad label.txt is reported with all else that is wrong, before the model is loaded
    checkpoint = load_checkpoint(args.params_path, label_path, args.max_seq_length)
    labels = checkpoint.labels
    splits = read_splits(args, labels, problems)
    results = []
    for name, (texts, label_ids) in zip(("train", "dev"), splits):
        tokens = tokenize(texts, checkpoint.encode, description=f"Tokenizing {name}")
        with progress_bar(len(tokens), f"Evaluating {name}") as progress:
            probs = softmax(predict_logits(checkpoint, tokens, args.batch_size, progress))
        results.append(score(label_ids, probs))
    train, dev = results
    log_metrics(labels, train, dev)
    bad_cases = find_bad_cases(*splits[1], probs, labels)
    write_bad_cases(args.bad_case_file, bad_cases, args.bad_case_confidence)
    get_logger().info(f"Bad case in dev dataset saved in {args.bad_case_file}")
    baseline = None
    if args.baseline and len(set(splits[0][1].tolist())) < 2:
        get_logger().warning("No baseline: the training rows are all of one class, expected at least two.")
    elif args.baseline:
        baseline = train_baseline(*splits, labels)
        get_logger().info(f"Baseline (character TF-IDF + logistic regression) | accuracy in dev dataset: "
                          f"{baseline['accuracy'] * 100:.2f}% | macro F1 score {baseline['macro_f1'] * 100:.2f} | "
                          f"this model: {dev['accuracy'] * 100:.2f}% | macro F1 score {dev['macro_f1'] * 100:.2f}")
    if args.report_dir:
        dev["expected_calibration_error"], dev["calibration_bins"] = calibration(splits[1][1], probs)
        write_report(args.report_dir, labels, train, dev, bad_cases, baseline, args.params_path)
        get_logger().info(f"Expected calibration error in dev dataset: {dev['expected_calibration_error']:.4f}")
        get_logger().info(f"Report saved in {os.path.join(args.report_dir, 'report.html')}")


if __name__ == "__main__":
    run_script(main)
