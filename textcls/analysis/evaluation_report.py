"""What evaluate.py and report.py say of a model: the log, the pictures and the page."""

import base64
import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from textcls.analysis.pages import render
from textcls.common.known import HOW_TO_FIT, auroc
from textcls.common.log import get_logger
from textcls.common.outputs import complete_folder
from textcls.common.probabilities import DECIMALS, softmax
from textcls.models.checkpoints import Checkpoint
from textcls.training.baseline import baseline_probs
from textcls.training.calibration import Confidence, cross_fit, describe_change, measure_rows, sum_up
from textcls.training.scoring import (
    INTERVAL,
    BadCases,
    bootstrap_intervals,
    rank_classes,
    risk_coverage,
    score,
    score_open,
    score_ranking,
)

Split = tuple[Sequence[str], np.ndarray]  # texts, label ids int64 [num_texts]

MATRIX_LABELS = 40  # up to so many classes the confusion matrix shows names and numbers, above only shades
STEPS = 200  # values of known that are tried as --least_known, evenly spread over the texts
MAX_CONFUSIONS = 50  # on the page, where there are more classes than that
MAX_LISTED = 1000  # wrong texts on the page, besides those that are explained
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei",
             "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti TC", "Arial Unicode MS")


class Answers(NamedTuple):
    """What the figures need of a model's answers to texts: a few numbers of each, however many labels there are. A field is None
    where nobody asks for it.
    """

    ranking: np.ndarray  # int32 [num_texts, RANKED], of `rank_classes`
    confidences: np.ndarray  # float32 [num_texts], the highest probability by the model's temperature
    known: Optional[np.ndarray] = None  # float64 [num_texts], of `predict_known`
    measured: Optional[np.ndarray] = None  # float64 [num_texts, 2], of `measure_rows` by the model's temperature
    measured_before: Optional[np.ndarray] = None  # the same without it, where there is one
    logits: Optional[np.ndarray] = None  # float32 [num_texts, num_classes], where these rows have fitted the temperature

    @property
    def guesses(self) -> np.ndarray:
        """The best class of each text: int32 [num_texts]."""
        return self.ranking[:, 0]


def keep_answers(logits: np.ndarray, temperature: float, known: Optional[np.ndarray] = None,
                 label_ids: Optional[np.ndarray] = None, with_logits: bool = False) -> Answers:
    """Reduce logits, float32 [num_texts, num_classes], to Answers. temperature: the model's; label_ids: int64 [num_texts], None:
    the answers are not measured by them."""
    answers = Answers(rank_classes(logits), softmax(logits, temperature).max(axis=1), known)
    if label_ids is None:
        return answers
    measured, before = (np.stack(measure_rows(logits, label_ids, value), axis=1) for value in (temperature, 1.0))
    return answers._replace(measured=measured, measured_before=None if temperature == 1 else before,
                            logits=logits if with_logits else None)


def join_answers(parts: Sequence[Answers]) -> Answers:
    """Put the Answers to parts of the texts together."""
    return Answers._make(None if column[0] is None else np.concatenate(column) for column in zip(*parts))


def score_splits(labels: list[str], label_ids: list[np.ndarray], logits: list[np.ndarray], temperature: float = 1.0,
                 is_fitted_on_dev: bool = False) -> tuple[dict, dict]:
    """Do as `score_answers` with logits, float32 [num_texts, num_classes], of train and of dev. is_fitted_on_dev: whether these
    dev rows have fitted the temperature."""
    return score_answers(labels, label_ids, keep_answers(logits[0], temperature),
                         keep_answers(logits[1], temperature, None, label_ids[1], is_fitted_on_dev), temperature)


def score_answers(labels: list[str], label_ids: list[np.ndarray], train_answers: Answers, dev_answers: Answers, temperature: float
                  ) -> tuple[dict, dict]:
    """Score train and dev, and log the metrics. Returns those of train, and those of dev with how sure they and its probabilities
    are.

    label_ids: int64 [num_texts] of train and of dev. dev_answers: measured; where they hold logits, the model's temperature was
    fitted by these dev rows, whose probabilities are then measured with temperatures that others of them decide.
    """
    train, dev = (score_ranking(ids, answers.ranking, len(labels))
                  for ids, answers in zip(label_ids, (train_answers, dev_answers)))
    log_metrics(labels, train, dev)
    ids, guesses, logits = label_ids[1], dev_answers.guesses, dev_answers.logits
    is_right = guesses == ids
    measured, measured_before = dev_answers.measured, dev_answers.measured_before
    assert measured is not None
    dev["intervals"] = bootstrap_intervals(ids, guesses, len(labels))
    after = sum_up(measured[:, 0], measured[:, 1], is_right)
    before = after if measured_before is None else sum_up(measured_before[:, 0], measured_before[:, 1], is_right)
    if logits is not None:
        after = sum_up(*measure_rows(logits, ids, cross_fit(logits, ids)), is_right)
    dev.update(temperature=temperature, is_cross_fitted=logits is not None, expected_calibration_error=after.error, nll=after.nll,
               confidence=after.confidence, calibration_bins=after.bins)
    if temperature != 1:
        dev["without_temperature"] = {"expected_calibration_error": before.error, "nll": before.nll,
                                      "calibration_bins": before.bins}
    dev["risk_coverage"] = risk_coverage(measured[:, 0], is_right)
    log_confidence(dev, before, after)
    return train, dev


def log_metrics(labels: list[str], train: dict, dev: dict) -> None:
    """Log the metrics of both splits. The wording is an interface: users' scripts read it."""
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


def log_confidence(dev: dict, before: Confidence, after: Confidence) -> None:
    """Log how sure the figures of dev are, and its probabilities, before and after the temperature."""
    accuracy, macro_f1 = (" to ".join(f"{end * 100:.2f}" for end in dev["intervals"][name]) for name in ("accuracy", "macro_f1"))
    get_logger().info(f"{INTERVAL * 100:.0f}% intervals in dev dataset | accuracy: {accuracy} | macro F1 score: {macro_f1} "
                      f"(bootstrap of the {dev['size']} rows)")
    if dev["temperature"] == 1:
        change = f"expected calibration error {after.error:.4f} | NLL {after.nll:.4f} | no temperature"
    else:
        how = "fitted on this file, so each row by one fitted on others" if dev["is_cross_fitted"] else "fitted on other rows"
        change = f"{describe_change(before, after)} | temperature {dev['temperature']:.4f} ({how})"
    get_logger().info(f"Calibration in dev dataset | {change}")
    curve = dev["risk_coverage"]
    get_logger().info(f"Risk-coverage curve in dev dataset | AURC {curve['aurc']:.4f}, {curve['excess_aurc']:.4f} more than that "
                      "of a perfect order")


def as_shown(probs: np.ndarray) -> np.ndarray:
    """Round probabilities as answers do: float64 [num_texts]."""
    return np.fromiter((round(value, DECIMALS) for value in map(float, probs)), float, len(probs))


def score_unknown(checkpoint: Checkpoint, dev: Answers, others: Answers, label_ids: np.ndarray, least_known: float) -> dict:
    """Score how well texts of no label are told. dev, others: what the model says of texts of known labels and of no label;
    label_ids: int64 [num_texts] of dev; least_known: below it a text counts as unknown.

    Returns a dict of JSON: count, probability_auroc and, where the model tells unknown texts, known_auroc, at_least_known and
    at_best: figures for least_known and for the value with which F1 of the unknown is the highest.
    """
    num_others, num_labels = len(others.guesses), len(checkpoint.labels)
    guesses, probs = (np.concatenate(pair) for pair in ((dev.guesses, others.guesses), (dev.confidences, others.confidences)))
    is_known = np.arange(len(guesses)) < len(label_ids)
    scores: dict = {"count": num_others, "probability_auroc": auroc(as_shown(probs), is_known)}
    if dev.known is None or others.known is None:
        return scores
    known, ids = as_shown(np.concatenate([dev.known, others.known])), np.append(label_ids, np.full(num_others, num_labels))

    def figures_at(value: float) -> dict[str, float]:
        answered = known >= value
        return {"least_known": value, **score_open(ids, guesses, known, num_labels, value),
                "unknown_answered": float(answered[~is_known].mean()), "known_answered": float(answered[is_known].mean())}

    candidates = np.quantile(known, np.arange(1, STEPS) / STEPS, method="nearest").tolist()
    best = max((figures_at(value) for value in candidates), key=lambda figures: figures["unknown_f1"])
    return {**scores, "known_auroc": auroc(known, is_known), "at_least_known": figures_at(least_known), "at_best": best}


def log_unknown(scores: dict) -> None:
    """Log what `score_unknown` returned."""
    probability = f"Unknown texts: {scores['count']} | AUROC of the largest probability {scores['probability_auroc']:.4f}"
    if "known_auroc" not in scores:
        return get_logger().info(f"{probability}; the model does not tell unknown texts by itself ({HOW_TO_FIT} does)")
    get_logger().info(f"{probability}, of known {scores['known_auroc']:.4f}")
    for name, what in (("at_least_known", "--least_known"), ("at_best", "The best F1 score of the unknown has --least_known")):
        figures = scores[name]
        get_logger().info(f"{what} {figures['least_known']:.6g} | F1 score of the unknown {figures['unknown_f1'] * 100:.2f} | "
                          f"macro F1 score of the known {figures['known_f1'] * 100:.2f} | answered: "
                          f"{figures['unknown_answered'] * 100:.2f}% of the unknown texts, "
                          f"{figures['known_answered'] * 100:.2f}% of the known ones")


def describe_class(metrics: dict, index: int) -> str:
    """Return the figures of a class in the words of the log."""
    count, precision, recall, f1 = (metrics["per_class"][name][index] for name in ("count", "precision", "recall", "f1"))
    if count == 0:
        return "0 (0%)"
    return (f"{count}({count / metrics['size'] * 100:.1f}%) | precision: {precision * 100:.2f} | recall: {recall * 100:.2f} | "
            f"F1 score {f1 * 100:.2f}")


def train_baseline(train: Split, dev: Split, labels: list[str], model: dict) -> Optional[dict]:
    """Train character 1-2-gram TF-IDF + logistic regression (C=10) on train, and log its figures on dev beside the model's.

    model: metrics of the model on dev. Returns {"accuracy": 0 to 1, "macro_f1": 0 to 1} of the baseline, or None where the
    training rows are all of one class.
    """
    if len(np.unique(train[1])) < 2:
        get_logger().warning("No baseline: the training rows are all of one class, expected at least two.")
        return None
    get_logger().info("Training the baseline: character TF-IDF + logistic regression ...")
    metrics = score(dev[1], baseline_probs(*train, dev[0], len(labels)))
    get_logger().info(f"Baseline (character TF-IDF + logistic regression) | accuracy in dev dataset: "
                      f"{metrics['accuracy'] * 100:.2f}% | macro F1 score {metrics['macro_f1'] * 100:.2f} | "
                      f"this model: {model['accuracy'] * 100:.2f}% | macro F1 score {model['macro_f1'] * 100:.2f}")
    return {name: metrics[name] for name in ("accuracy", "macro_f1")}


def draw_pictures(folder: str, labels: list[str], dev: dict) -> None:
    """Draw reliability.png, risk_coverage.png, and where there is a matrix confusion_matrix.png.

    Classes go by their ids where no Chinese font is installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [font for font in CJK_FONTS if font in installed]
    names = labels if fonts or all(label.isascii() for label in labels) else [str(i) for i in range(len(labels))]
    with matplotlib.rc_context({"font.sans-serif": fonts + ["DejaVu Sans"], "axes.unicode_minus": False}):
        if "confusion_matrix" in dev:
            draw_confusion_matrix(os.path.join(folder, "confusion_matrix.png"), names, np.array(dev["confusion_matrix"]))
        draw_reliability(os.path.join(folder, "reliability.png"), dev)
        draw_risk_coverage(os.path.join(folder, "risk_coverage.png"), dev)


def draw_confusion_matrix(path: str, names: list[str], matrix: np.ndarray) -> None:
    """Draw a confusion matrix, int64 [num_classes, num_classes]: rows are labels, columns predictions."""
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


def draw_reliability(path: str, dev: dict) -> None:
    """Draw the accuracy of each range of confidence, and without the temperature, where there is one. dev: of `score_splits`."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.5), dpi=120)
    axes.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
    curves = [(dev, "o-", "C0", "model")]
    if "without_temperature" in dev:
        curves.insert(0, (dev["without_temperature"], ".:", "C1", "without temperature"))
    for figures, style, color, name in curves:
        bins = figures["calibration_bins"]
        axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], style, color=color,
                  label=f"{name}: error {figures['expected_calibration_error']:.3f}")
    axes.set(xlabel="Confidence", ylabel="Accuracy", xlim=(0, 1.02), ylim=(0, 1.02), title="Reliability, dev")
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def draw_risk_coverage(path: str, dev: dict) -> None:
    """Draw the share of wrong answers by the share of texts that are answered, and a found threshold. dev: of `score_splits`."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.5), dpi=120)
    curve, found = dev["risk_coverage"], dev.get("threshold")
    axes.plot([share * 100 for share in curve["coverage"]], [share * 100 for share in curve["risk"]],
              label=f"model: AURC {curve['aurc']:.4f}")
    if found:
        axes.plot(found["coverage"] * 100, (1 - found["observed_precision"]) * 100, "o", color="C3",
                  label=f"threshold {found['value']:.4f}")
        axes.axhline((1 - found["precision"]) * 100, linestyle="--", color="grey", label=f"precision {found['precision']:g}")
    axes.set(xlabel="Coverage: texts answered, the surest first, %", ylabel="Risk: wrong answers among them, %", xlim=(0, 102),
             title="Risk-coverage curve, dev")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def read_picture(path: str) -> str:
    """Read a picture for a page that holds it: base64."""
    with open(path, "rb") as file:
        return base64.b64encode(file.read()).decode("ascii")


def write_report(folder: str, labels: list[str], train: dict, dev: dict, bad_cases: BadCases, baseline: Optional[dict],
                 params_path: str, analysis: Optional[dict] = None) -> None:
    """Write metrics.json, the pictures and report.html into folder, report.html last, and log where it is.

    train, dev: of `score_answers`; bad_cases: of `find_bad_cases`; baseline: of `train_baseline`; analysis: what report.py adds
    to the page, as report_template.html names it.
    """
    confidence = dev["confidence"]
    confusions = Counter((case["label"], case["prediction"]) for case in bad_cases).most_common(MAX_CONFUSIONS)
    with complete_folder(folder, marker="report.html") as staging:
        with open(os.path.join(staging, "metrics.json"), "w", encoding="utf-8") as file:
            json.dump({"labels": labels, "train": train, "dev": dev, "baseline": baseline}, file, ensure_ascii=False,
                      indent=2)
        draw_pictures(staging, labels, dev)
        reliability, curve = (read_picture(os.path.join(staging, f"{name}.png")) for name in ("reliability", "risk_coverage"))
        page = render("report_template.html", labels=labels, matrix_labels=MATRIX_LABELS, max_listed=MAX_LISTED, train=train,
                      dev=dev, confidence=confidence, confusions=confusions, baseline=baseline, params_path=params_path,
                      reliability=reliability, curve=curve, analysis=analysis,
                      bad_cases=bad_cases.surest_first())
        with open(os.path.join(staging, "report.html"), "w", encoding="utf-8") as file:
            file.write(page)
    info = get_logger().info
    info(f"Expected calibration error in dev dataset: {dev['expected_calibration_error']:.4f}")
    info(f"That is about the probabilities, not the labels: they are {confidence * 100:.2f}% on average, where "
         f"{dev['accuracy'] * 100:.2f}% of the labels are right")
    info(f"Report saved in {os.path.join(folder, 'report.html')}")
