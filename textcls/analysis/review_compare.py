"""A model before and after a review, on the development set as it was and as it is decided now. Needs no Paddle."""

from typing import Any, Optional

import numpy as np

from textcls.analysis.review_files import Rows
from textcls.analysis.review_journal import Decisions, card_key
from textcls.training.scoring import INTERVAL, RESAMPLES, bootstrap_intervals, score_classes

MOST_CASES = 200  # bad cases listed of each kind


def compare(dev: Rows, decisions: Decisions, before: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
    """Compare two models on dev: one dict for the labels of the file, one for those that were decided.

    before, after: predicted label ids int64 [num_dev]. Rows that were dropped, or on which persons disagree, are left out of the
    second. Each dict: name, size, before and after (accuracy, macro_f1, intervals), difference (of the accuracies, 95 % interval
    low and high by bootstrap of the same rows for both), per_class and the bad cases that went and that are new.
    """
    decided = [decided_label(decisions, text, int(label)) for text, label in zip(dev.texts, dev.label_ids)]
    kept = [index for index, label in enumerate(decided) if label is not None]
    own = np.arange(len(dev.texts))
    return [compare_on("file", dev, own, dev.label_ids, before, after, decisions.names),
            compare_on("decided", dev, np.array(kept, np.int64), np.array([decided[index] for index in kept], np.int64), before,
                       after, decisions.names)]


def decided_label(decisions: Decisions, text: str, label: int) -> Optional[int]:
    """Return the label id of a dev text as it is decided; None: it does not count."""
    status, decision = decisions.outcome(card_key("dev", text))
    return label if status == "open" else decision.label if decision else None


def compare_on(name: str, dev: Rows, rows: np.ndarray, label_ids: np.ndarray, before: np.ndarray, after: np.ndarray,
               names: list[str]) -> dict[str, Any]:
    """Compare two models on some rows. rows, label_ids: int64 [num_rows]; before, after: of all of dev."""
    if not len(rows):
        return {"name": name, "size": 0}
    old, new = before[rows], after[rows]
    gains = (new == label_ids).astype(float) - (old == label_ids)
    generator = np.random.default_rng(0)
    means = [gains[generator.integers(len(rows), size=len(rows))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    scored = [score_classes(label_ids, guesses, len(names)) for guesses in (old, new)]
    per_class = [{"label": label, "count": scored[0]["per_class"]["count"][label],
                  **{f"{key}_{place}": found["per_class"][key][label] for place, found in zip(("before", "after"), scored)
                     for key in ("precision", "recall", "f1")}}
                 for label in range(len(names)) if scored[0]["per_class"]["count"][label]]

    def cases(which: np.ndarray) -> list[dict[str, Any]]:
        return [{"text": dev.texts[rows[i]], "label": int(label_ids[i]), "before": int(old[i]), "after": int(new[i])}
                for i in np.flatnonzero(which)[:MOST_CASES]]

    return {"name": name, "size": len(rows), "gained": int((gains > 0).sum()), "lost": int((gains < 0).sum()),
            **{place: {"accuracy": found["accuracy"], "macro_f1": found["macro_f1"],
                       "intervals": bootstrap_intervals(label_ids, guesses, len(names))}
               for place, found, guesses in zip(("before", "after"), scored, (old, new))},
            "difference": {"value": float(gains.mean()), "low": float(low), "high": float(high)},
            "per_class": per_class, "went": cases(gains > 0), "came": cases(gains < 0)}
