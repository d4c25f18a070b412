"""How good a classifier is: its metrics, its calibration, and the texts it gets wrong. Needs NumPy alone."""

from typing import Protocol

import numpy as np

from textcls.common.probabilities import top_classes

CALIBRATION_BINS = 10
MATRIX_CLASSES = 200  # up to so many classes there is a whole confusion matrix
METRICS = ("accuracy", *(f"{average}_{name}" for average in ("micro", "macro") for name in ("precision", "recall", "f1")))


class Prediction(Protocol):
    """What PaddleNLP's Trainer hands to `compute_metrics`."""

    predictions: np.ndarray
    label_ids: np.ndarray


def compute_metrics(prediction: Prediction) -> dict[str, float]:
    """Compute what a Trainer logs and --metric_for_best_model may name: METRICS.

    prediction: its `predictions` are logits [num_texts, num_classes], its `label_ids` int64 [num_texts].
    """
    metrics = score_classes(prediction.label_ids, prediction.predictions.argmax(axis=-1), prediction.predictions.shape[-1])
    # with one label per text every wrong guess is a miss of one class and a false alarm of another: all three are the accuracy
    return {name: metrics["accuracy" if name.startswith("micro_") else name] for name in METRICS}


def score(label_ids: np.ndarray, probs: np.ndarray) -> dict:
    """Compute the metrics of one split. label_ids: int64 [num_texts]; probs: float32 [num_texts, num_classes].

    Returns a dict: size, what `score_classes` and `count_confusions` return, top_k accuracies (k below the number of classes).
    """
    num_classes = probs.shape[1]
    ranking = top_classes(probs, min(3, num_classes))
    metrics = {"size": len(label_ids), **score_classes(label_ids, ranking[:, 0], num_classes),
               **count_confusions(label_ids, ranking[:, 0], num_classes)}
    for k in (2, 3):
        if k < num_classes:
            metrics[f"top_{k}_accuracy"] = float((ranking[:, :k] == label_ids[:, None]).any(axis=1).mean())
    return metrics


def count_confusions(label_ids: np.ndarray, guesses: np.ndarray, num_classes: int) -> dict[str, list[list[int]]]:
    """Count how often each class is taken for each. label_ids, guesses: int64 [num_texts].

    Returns {"confusion_matrix": list of rows, one per label}; for more than MATRIX_CLASSES classes, whose matrix would be nearly
    all zeros, {"confusions": list of [label id, id of the guess, count] of the wrong guesses, the most frequent first}.
    """
    pairs = label_ids * num_classes + guesses
    if num_classes <= MATRIX_CLASSES:
        matrix = np.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)
        return {"confusion_matrix": matrix.tolist()}
    confused, counts = np.unique(pairs[label_ids != guesses], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {"confusions": np.stack([*np.divmod(confused[order], num_classes), counts[order]], axis=1).tolist()}


def score_classes(label_ids: np.ndarray, guesses: np.ndarray, num_classes: int) -> dict:
    """Compare labels and guesses, int64 [num_texts] both.

    Returns a dict: accuracy, macro_precision, macro_recall, macro_f1 and per_class (count, precision, recall, f1: lists by class
    id). All shares are 0 to 1; where nothing is divided by nothing, 0. Macro averages go over the classes that occur in
    labels or guesses.
    """
    hits, count, guessed = (np.bincount(ids, minlength=num_classes) for ids in
                            (label_ids[label_ids == guesses], label_ids, guesses))
    shares = {"precision": hits / np.maximum(guessed, 1), "recall": hits / np.maximum(count, 1),
              "f1": 2 * hits / np.maximum(count + guessed, 1)}
    metrics: dict = {"accuracy": float(hits.sum() / len(label_ids))}
    for name, values in shares.items():
        metrics[f"macro_{name}"] = float(values[count + guessed > 0].mean())
    metrics["per_class"] = {"count": count.tolist(), **{name: values.tolist() for name, values in shares.items()}}
    return metrics


def calibration(label_ids: np.ndarray, probs: np.ndarray) -> tuple[float, list[dict]]:
    """Compute the expected calibration error and its bins (Guo et al. 2017, arXiv:1706.04599).

    Returns (error, bins): bins are dicts of count, confidence and accuracy, empty bins left out.
    """
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == label_ids
    index = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [{"count": int((index == i).sum()), "confidence": float(confidence[index == i].mean()),
             "accuracy": float(correct[index == i].mean())} for i in range(CALIBRATION_BINS) if (index == i).any()]
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(label_ids)
    return error, bins


def find_bad_cases(texts: list[str], label_ids: np.ndarray, probs: np.ndarray, labels: list[str]) -> list[dict]:
    """List the wrong texts in file order: dicts of text, label, prediction and confidence."""
    guesses = probs.argmax(axis=1)
    return [{"text": texts[i], "label": labels[label_ids[i]], "prediction": labels[guesses[i]],
             "confidence": float(probs[i, guesses[i]])} for i in np.flatnonzero(guesses != label_ids)]
