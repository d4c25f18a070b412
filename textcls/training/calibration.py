"""A temperature for a classifier's logits: fitted on dev by NLL, measured on rows that it was not fitted on (Guo et al. 2017,
arXiv:1706.04599). It changes probabilities and no label."""

from typing import Any, NamedTuple, Optional, Union

import numpy as np

from textcls.common.confidence import LEAST_TEMPERATURE, MOST_TEMPERATURE
from textcls.common.digests import rows_id
from textcls.common.log import get_logger
from textcls.models.configs import change_config
from textcls.training.scoring import CHUNK_NUMBERS

CALIBRATIONS = ["none", "temperature"]  # of --calibrate
FOLDS, LEAST_FITTED = 5, 30  # of the cross-fitting, and rows below which one number already says more of them than of the model
MOST_NUMBERS = 20_000_000  # logits that a fit looks at: of more rows with thousands of labels some, evenly spaced
BINS = 15  # of the expected calibration error, of equally many rows each


class Confidence(NamedTuple):
    """How far probabilities can be trusted."""

    error: float  # expected calibration error, 0 to 1
    nll: float  # mean negative logarithm of the right label's probability
    bins: list[dict[str, float]]  # of the error: count, confidence and accuracy of each
    confidence: float  # mean probability of the answers


def fit_temperature(logits: np.ndarray, label_ids: np.ndarray) -> float:
    """Find the temperature of least NLL, LEAST_TEMPERATURE to MOST_TEMPERATURE.

    logits: float32 [num_rows, num_classes]; label_ids: int64 [num_rows].
    """
    from scipy.optimize import minimize_scalar

    step = -(-logits.size // MOST_NUMBERS)
    logits, label_ids = logits[::step], label_ids[::step]
    found = minimize_scalar(lambda value: measure_rows(logits, label_ids, np.exp(value))[1].mean(), method="bounded",
                            bounds=np.log([LEAST_TEMPERATURE, MOST_TEMPERATURE]), options={"xatol": 1e-4})
    return float(np.exp(found.x))


def cross_fit(logits: np.ndarray, label_ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Give each row the temperature that was fitted on the other FOLDS - 1 parts of the rows: float64 [num_rows, 1]."""
    places = np.argsort(np.argsort(logits[:, 0], kind="stable"))  # so that the order of the rows does not matter
    fold_of = np.random.default_rng(seed).permutation(len(label_ids))[places] % FOLDS
    temperatures = np.ones((len(label_ids), 1))
    for fold in range(FOLDS):
        temperatures[fold_of == fold] = fit_temperature(logits[fold_of != fold], label_ids[fold_of != fold])
    return temperatures


def measure_rows(logits: np.ndarray, label_ids: np.ndarray, temperature: Union[float, np.ndarray] = 1.0
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Compute of each row the highest probability and the NLL of the right label, in nats: float64 [num_rows] both.

    temperature: a number, or one per row, [num_rows, 1].
    """
    temperatures = np.broadcast_to(temperature, (len(logits), 1))
    highest, nll = np.zeros((2, len(logits)))
    step = max(1, CHUNK_NUMBERS // logits.shape[1])
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        scores = (logits[part] - logits[part].max(axis=1, keepdims=True)).astype(np.float64) / temperatures[part]
        sums = np.exp(scores).sum(axis=1)
        highest[part] = 1 / sums
        nll[part] = np.log(sums) - np.take_along_axis(scores, label_ids[part, None], axis=1)[:, 0]
    return highest, nll


def measure_confidence(logits: np.ndarray, label_ids: np.ndarray, temperature: Union[float, np.ndarray] = 1.0) -> Confidence:
    """Measure the probabilities that logits give by a temperature: a number, or one per row, [num_rows, 1]."""
    return sum_up(*measure_rows(logits, label_ids, temperature), logits.argmax(axis=1) == label_ids)


def sum_up(confidences: np.ndarray, nll: np.ndarray, is_right: np.ndarray) -> Confidence:
    """Make of what `measure_rows` says of rows what it says of them all. is_right: bool [num_rows]."""
    order = np.argsort(confidences, kind="stable")
    bins = [{"count": len(rows), "confidence": float(confidences[rows].mean()), "accuracy": float(is_right[rows].mean())}
            for rows in np.array_split(order, min(BINS, len(order)))]
    error = sum(one["count"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / len(is_right)
    return Confidence(error, float(nll.mean()), bins, float(confidences.mean()))


def describe_change(before: Confidence, after: Confidence) -> str:
    """Say what a temperature does in the words of the log."""
    return (f"expected calibration error {before.error:.4f} -> {after.error:.4f} | NLL {before.nll:.4f} -> {after.nll:.4f}")


def warn_of_few_rows(num_rows: int, file: str) -> None:
    """Warn before a training where dev will be too small for `calibrate_model`. file: the name of its file."""
    if num_rows < LEAST_FITTED:
        get_logger().warning(f"{file}: {num_rows} rows are too few to fit a temperature, expected {LEAST_FITTED} or more: the "
                             "probabilities will stay as the model gives them.")


def calibrate_model(folder: str, logits: Optional[np.ndarray], dev: tuple[list[str], np.ndarray], file: str,
                    label_ids: Optional[np.ndarray] = None) -> None:
    """Fit a temperature to a trained model's logits of dev, log what it does, and save it in the config.json of its folder.

    logits: float32 [num_rows, num_classes], or None where there are none. dev: (texts, label ids int64 [num_rows]). file: the
    name of its file. label_ids: of the logits' rows, where they are in another order than dev. Where it cannot be fitted the
    log says why, and the folder holds none.
    """
    label_ids = dev[1] if label_ids is None else label_ids
    entry = None
    if logits is None or not len(logits):
        get_logger().info("No temperature is fitted: it needs dev texts (--do_eval).")
    elif len(logits) < LEAST_FITTED:
        get_logger().info(f"No temperature is fitted: {file} has too few rows.")
    else:
        entry = _fit(logits, label_ids, dev, file)
    change_config(folder, calibration=entry)


def _fit(logits: np.ndarray, label_ids: np.ndarray, dev: tuple[list[str], np.ndarray], file: str) -> Optional[dict[str, Any]]:
    temperature = round(fit_temperature(logits, label_ids), 6)
    if not LEAST_TEMPERATURE * 1.01 < temperature < MOST_TEMPERATURE / 1.01:
        get_logger().warning(f"{file}: no temperature is saved: the best is not within {LEAST_TEMPERATURE} to "
                             f"{MOST_TEMPERATURE}, as where all answers are right, or where the probabilities say nothing.")
        return None
    before = measure_confidence(logits, label_ids)
    after = measure_confidence(logits, label_ids, cross_fit(logits, label_ids))
    get_logger().info(f"Temperature {temperature:.4f}, fitted on {len(logits)} rows of {file} | {describe_change(before, after)} "
                      "(each row by a temperature fitted on others)")
    return {"temperature": temperature, "file": file, "rows": len(logits), "rows_id": rows_id(*dev)}
