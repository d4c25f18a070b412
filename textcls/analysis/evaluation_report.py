"""What evaluate.py and report.py say of a model: the log, the pictures and the page."""

import base64
import json
import os

import numpy as np

from textcls.analysis.pages import render
from textcls.common.log import get_logger
from textcls.common.outputs import complete_folder
from textcls.training.baseline import baseline_probs
from textcls.training.scoring import score

MATRIX_LABELS = 40  # up to so many classes the confusion matrix shows names and numbers, above only shades
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei",
             "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti TC", "Arial Unicode MS")


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
        info(f"Evaluation examples in train dataset: {describe_class(train, index)}")
        info(f"Evaluation examples in dev dataset: {describe_class(dev, index)}")
        info("----------------------------")
    for name, metrics in (("train", train), ("dev", dev)):
        info(f"Macro average in {name} dataset | precision: {metrics['macro_precision'] * 100:.2f} | recall: "
             f"{metrics['macro_recall'] * 100:.2f} | F1 score {metrics['macro_f1'] * 100:.2f}")


def describe_class(metrics, index):
    """The figures of a class in the words of the log."""
    count, precision, recall, f1 = (metrics["per_class"][name][index] for name in ("count", "precision", "recall", "f1"))
    if count == 0:
        return "0 (0%)"
    return (f"{count}({count / metrics['size'] * 100:.1f}%) | precision: {precision * 100:.2f} | recall: {recall * 100:.2f} | "
            f"F1 score {f1 * 100:.2f}")


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
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [font for font in CJK_FONTS if font in installed]
    names = labels if fonts or all(label.isascii() for label in labels) else [str(i) for i in range(len(labels))]
    with matplotlib.rc_context({"font.sans-serif": fonts + ["DejaVu Sans"], "axes.unicode_minus": False}):
        draw_confusion_matrix(os.path.join(folder, "confusion_matrix.png"), names, np.array(dev["confusion_matrix"]))
        draw_reliability(os.path.join(folder, "reliability.png"), dev["calibration_bins"], dev["expected_calibration_error"])


def draw_confusion_matrix(path, names, matrix):
    """matrix: int64 [num_classes, num_classes], rows are labels and columns predictions."""
    from matplotlib import pyplot

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.55 * min(len(names), MATRIX_LABELS)
    figure, axes = pyplot.subplots(figsize=(size + 1, size), dpi=120)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MATRIX_LABELS:
        for i, j in np.argwhere(matrix > 0):
            axes.text(j, i, matrix[i, j], ha="center", va="center", fontsize=8,
                      color="white" if shares[i, j] > 0.5 else "black")
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="Prediction", ylabel="Label", title="Confusion matrix, dev (shade: share of the row)")
    figure.colorbar(image, fraction=0.046)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def draw_reliability(path, bins, error):
    """bins, error: of `calibration`."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.5), dpi=120)
    axes.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", label="model")
    for b in bins:
        axes.annotate(b["count"], (b["confidence"], b["accuracy"]), textcoords="offset points", xytext=(6, -10), fontsize=7)
    axes.set(xlabel="Confidence", ylabel="Accuracy", xlim=(0, 1.02), ylim=(0, 1.02),
             title=f"Reliability, dev (expected calibration error {error:.3f})")
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def write_report(folder, labels, train, dev, bad_cases, baseline, params_path, analysis=None):
    """Write metrics.json, both pictures and report.html into folder; report.html appears last.

    analysis: what report.py adds to the page, as report_template.html names it, or None.
    """
    with complete_folder(folder, marker="report.html") as staging:
        with open(os.path.join(staging, "metrics.json"), "w", encoding="utf-8") as file:
            json.dump({"labels": labels, "train": train, "dev": dev, "baseline": baseline}, file, ensure_ascii=False,
                      indent=2)
        draw_pictures(staging, labels, dev)
        pictures = {}
        for name in ("confusion_matrix", "reliability"):
            with open(os.path.join(staging, f"{name}.png"), "rb") as file:
                pictures[name] = base64.b64encode(file.read()).decode("ascii")
        page = render("report_template.html", labels=labels, matrix_labels=MATRIX_LABELS, train=train, dev=dev,
                      baseline=baseline, params_path=params_path, pictures=pictures, analysis=analysis,
                      bad_cases=sorted(bad_cases, key=lambda case: -case["confidence"]))
        with open(os.path.join(staging, "report.html"), "w", encoding="utf-8") as file:
            file.write(page)
