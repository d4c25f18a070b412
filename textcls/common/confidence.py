"""What a saved temperature and threshold have to be, and how a threshold for a wanted precision is found, which needs SciPy."""

import math
from typing import Any, NamedTuple, Optional

import numpy as np

from textcls.common.errors import UserError

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.05, 20.0  # beyond them it says more of the few wrong rows than of the model
CONFIDENCE = 0.95  # of the bound that a threshold's precision keeps
STEPS = 20  # shares of the rows, 5 %, 10 %, ... 100 %, whose thresholds are tested
HOW_TO_FIND = "analysis/evaluate.py --wanted_precision 0.95 --save_threshold"


class FoundThreshold(NamedTuple):
    """A threshold of `find_threshold`, with what it does on the rows that it was found on."""

    value: float
    rows: int  # that are not below it
    right: int  # of these


def read_temperature(content: dict[str, Any], path: str) -> float:
    """Return the temperature of an entry of a config.json, or of a deploy.json; 1.0 where there is none. UserError."""
    value = content.get("temperature")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE:
        raise UserError(f"{path}: temperature is {repr(value)[:40]}, expected a number, {LEAST_TEMPERATURE} to "
                        f"{MOST_TEMPERATURE}")
    return float(value)


def read_threshold(content: dict[str, Any], path: str) -> Optional[dict[str, Any]]:
    """Return the entry threshold of a config.json or deploy.json, None where there is none. UserError where it is damaged."""
    entry = content.get("threshold")
    if entry is None:
        return None
    value = entry.get("value") if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"{path}: threshold is {str(entry)[:80]}, expected what {HOW_TO_FIND} wrote")
    return entry


def check_threshold_of_model(entry: Optional[dict[str, Any]], path: str, temperature: float, weights: str, max_seq_length: int
                             ) -> float:
    """Return the value of a saved threshold that belongs to this model. UserError where none is saved, or that of another one.

    entry: of `read_threshold`; path: of its file; weights: a hash of those that will answer, hexadecimal digits; max_seq_length:
    tokens of a text that they will read.
    """
    if entry is None:
        raise UserError(f"--threshold auto: {path} holds no threshold, expected a number, or one that {HOW_TO_FIND} has saved"
                        + (" before the export" if path.endswith("deploy.json") else ""))
    if entry.get("weights") != weights or entry.get("temperature") != temperature:
        what = "temperature" if entry.get("weights") == weights else "model"
        raise UserError(f"--threshold auto: the threshold in {path} was found with another {what}, expected a number, or a new "
                        f"one by {HOW_TO_FIND}" + (" and a new export" if path.endswith("deploy.json") else ""))
    if entry.get("max_seq_length") != max_seq_length:
        raise UserError(f"--threshold auto: the threshold in {path} was found at --max_seq_length {entry.get('max_seq_length')}, "
                        f"expected that, not {max_seq_length}, or a number")
    return float(entry["value"])


def precision_bound(right: int, rows: int, confidence: float = CONFIDENCE) -> float:
    """Return what the precision is at least, by `right` right answers of `rows` rows: the one-sided bound of Clopper and Pearson
    (Biometrika 26, 1934)."""
    from scipy.stats import beta

    return float(beta.ppf(1 - confidence, right, rows - right + 1)) if right else 0.0


def least_rows(precision: float, confidence: float = CONFIDENCE) -> int:
    """Return how many rows a precision takes to be shown where all answers are right: 59 for 0.95."""
    return math.ceil(math.log(1 - confidence) / math.log(precision))


def find_threshold(confidences: np.ndarray, is_right: np.ndarray, precision: float) -> Optional[FoundThreshold]:
    """Find the lowest threshold whose precision is at least `precision` with CONFIDENCE, or None.

    confidences: float [num_rows], as answers show them; is_right: bool [num_rows]. Many thresholds that are tested on the same
    rows would find by chance one that is too low. So those to test are fixed before any answer is looked at, those that leave
    5 %, 10 %, ... 100 % of the rows, and they are tested from the highest downwards, each by `precision_bound`, until one fails
    (fixed-sequence testing): with CONFIDENCE no threshold that is passed has less than the wanted precision. The first leaves
    at least twice `least_rows`, so that a single wrong row does not end the search; `least_rows` in files of few rows.
    """
    order = np.argsort(-confidences, kind="stable")
    sorted_confidences, rights = confidences[order], np.cumsum(is_right[order])
    found = None
    for rows in candidate_rows(sorted_confidences, precision):
        right = int(rights[rows - 1])
        if precision_bound(right, rows) < precision:
            break
        found = FoundThreshold(float(sorted_confidences[rows - 1]), rows, right)
    return found


def candidate_rows(sorted_confidences: np.ndarray, precision: float) -> list[int]:
    """List how many rows the thresholds to test leave, the fewest first. sorted_confidences: float [num_rows], highest first."""
    count, least = len(sorted_confidences), least_rows(precision)
    first = 2 * least if count >= 5 * least else least
    wanted = -(-count * np.arange(1, STEPS + 1) // STEPS)
    # rows of one confidence are above a threshold together
    ends = [int(np.searchsorted(-sorted_confidences, -sorted_confidences[rows - 1], side="right")) for rows in wanted if rows]
    return sorted({rows for rows in ends if rows >= first})


def explain_no_threshold(num_rows: int, precision: float) -> str:
    """Say why `find_threshold` has found none among so many rows."""
    least = least_rows(precision)
    if num_rows < least:
        return f"{num_rows} rows are too few to show it, even if all answers were right: {least} are needed"
    return "of the surest rows too many are wrong to show it"
