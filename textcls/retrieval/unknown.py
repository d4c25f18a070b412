"""Texts of no known label: how they are told from others, and the threshold that reckons with a share of them.

Where there are no such texts, dev texts stand for them whose own labels are left out of the index.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np

from textcls.common.confidence import find_threshold
from textcls.common.probabilities import DECIMALS
from textcls.retrieval.head import fit_head
from textcls.retrieval.index import SearchIndex
from textcls.retrieval.search import Found, chunks, fuse, known_features, part, score_known

UNKNOWN_SHARE = 0.1  # of the texts that are asked about, where nobody says otherwise
FOLDS, LEAST_LABELS = 5, 4  # of `leave_labels_out`; a head of fewer labels than these says nothing of others


class UnknownTexts(NamedTuple):
    """The texts of no label that an index reckons with."""

    share: float  # of all texts that are asked about, above 0, below 1
    vectors: np.ndarray  # float32 [num_texts, dimension]
    texts: list[str]  # none: dev texts stand for them


SIMULATED = UnknownTexts(UNKNOWN_SHARE, np.zeros((0, 0), np.float32), [])


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts, and the index that they are asked of."""

    index: SearchIndex
    vectors: np.ndarray  # float32 [num_texts, dimension]
    found: Found
    excluded: Optional[np.ndarray] = None  # int [num_texts]: of each text a label that the index is to do without, or None

    def features(self) -> np.ndarray:
        """`known_features` of all texts."""
        features = []
        for chunk in chunks(self.index, len(self.vectors)):
            own = None if self.excluded is None else self.excluded[chunk]
            features.append(known_features(self.index, self.vectors[chunk], part(self.found, chunk), own))
        return np.concatenate(features)

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """The most probable label of each text, int64 [num_texts], and its probability if the text is of a known label."""
        labels, values = np.zeros(len(self.vectors), np.int64), np.zeros(len(self.vectors))
        for chunk in chunks(self.index, len(self.vectors)):
            probs = fuse(self.index, part(self.found, chunk))
            labels[chunk], values[chunk] = probs.argmax(axis=1), probs.max(axis=1)
        return labels, values


def leave_labels_out(index: SearchIndex, vectors: np.ndarray, without: Found, label_ids: np.ndarray) -> Iterator[Examples]:
    """Ask for dev texts an index that does not have their label, and whose head has never seen it: Examples of some labels each.

    without: what is found near the texts when the rows of their own label are left out. label_ids: int64 [num_texts].
    """
    if index.head is None or len(index.labels) < LEAST_LABELS:
        yield Examples(index._replace(head=None), vectors, without, label_ids)
        return
    fold_of = np.random.default_rng(0).permutation(len(index.labels)) % min(FOLDS, len(index.labels))
    for fold in range(fold_of.max() + 1):
        rows = np.flatnonzero(fold_of[label_ids] == fold)
        if len(rows):
            left = np.where(fold_of[index.row_labels] == fold, -1, index.row_labels)
            head = fit_head(index._replace(row_labels=left), index.header["head"]["strength"], index.head)
            yield Examples(index._replace(head=head), vectors[rows], part(without, rows), label_ids[rows])


def fit_known(known: Examples, unknown: Sequence[Examples], share: float) -> tuple[dict, float]:
    """Logistic regression that tells known texts from unknown ones by their `known_features`.

    No weight is negative, so that a text which is nearer to the index never counts as less known. share: of unknown texts.
    Returns (the entry `known` of index.json: weights, offset and, of a head, the mean logit of known texts; AUROC on these).
    """
    from scipy.optimize import minimize

    others = [examples.features() for examples in unknown]
    width = min(part.shape[1] for part in others)
    others, own = [part[:, :width] for part in others], known.features()[:, :width]
    features = np.concatenate([own, *others]).astype(np.float64)
    targets = np.repeat([1.0, 0.0], [len(own), len(features) - len(own)])
    mean, deviation = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
    inputs = np.column_stack([(features - mean) / deviation, np.ones(len(features))])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        """NLL with a little L2, so that it ends where both parts can be told apart wholly, and its gradient."""
        scores = inputs @ weights
        errors = 1 / (1 + np.exp(-np.clip(scores, -30, 30))) - targets
        return (np.logaddexp(0, scores) - targets * scores).sum() + 0.05 * weights @ weights, inputs.T @ errors + 0.1 * weights

    bounds = [(0, None)] * features.shape[1] + [(None, None)]
    weights = minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds).x
    scaled = weights[:-1] / deviation
    odds = (1 - share) / share / (len(own) / (len(features) - len(own)))
    entry = {"weights": scaled.tolist(), "offset": float(weights[-1] - scaled @ mean + np.log(odds))}
    if width > 2:
        entry["logit"] = float(own[:, 2].mean())
    return entry, auroc(inputs @ weights, targets == 1)


def auroc(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties half (Mann-Whitney). scores: float [n]; is_positive: bool [n]."""
    values, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    positives = int(is_positive.sum())
    negatives = len(scores) - positives
    if not positives or not negatives:
        return float("nan")
    return float((ranks[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def fit_threshold(dev: Examples, label_ids: np.ndarray, unknown: Sequence[Examples], known: dict, precision: float, share: float
                  ) -> Optional[dict[str, float]]:
    """The lowest probability, as it is shown, that keeps a precision by `confidence.find_threshold` where a share of the texts is
    unknown: {"precision", "value", "unknown_share"}, or None. known: of `fit_known`.

    Dev and unknown texts are drawn, by a fixed seed, in the numbers that the share asks for.
    """
    labels, _ = dev.best()
    confidence, others = shown_confidences(dev, known), np.concatenate([shown_confidences(part, known) for part in unknown])
    num_known = min(len(confidence), int(len(others) * (1 - share) / share))
    num_unknown = min(len(others), round(num_known * share / (1 - share)))
    generator = np.random.default_rng(0)
    drawn = np.sort(generator.choice(len(confidence), num_known, replace=False))
    others = generator.choice(others, num_unknown, replace=False)
    is_right = np.concatenate([(labels == label_ids)[drawn], np.zeros(num_unknown, bool)])
    threshold = find_threshold(np.concatenate([confidence[drawn], others]), is_right, precision)
    return None if threshold is None else {"precision": precision, "value": threshold.value, "unknown_share": share}


def shown_confidences(examples: Examples, known: dict) -> np.ndarray:
    """The probabilities of the best labels as answers show them: float [num_texts]. known: of `fit_known`."""
    exact = examples.best()[1] * score_known(known, examples.features())
    return np.array([round(value, DECIMALS) for value in exact.tolist()])
