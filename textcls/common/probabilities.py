"""From what a model says to probabilities, the most probable classes, and whether they are sure enough. Needs NumPy only, since
deploy/triton_serving/build_repository.py copies this file to where nothing else of this repository is.
"""

from collections.abc import Sequence
from typing import Optional, Union

import numpy as np

DECIMALS = 6  # of probabilities in answers
UNDECIDED = "undecided"  # written where the highest probability is below a threshold


def softmax(logits: np.ndarray, temperature: Union[float, np.ndarray] = 1.0) -> np.ndarray:
    """Turn logits, float32 [num_texts, num_classes], into probabilities of the same shape, rows sum to 1.

    temperature: what logits are divided by, a number, or one per text, [num_texts, 1]. It changes no label: the best stays best.
    """
    exponents = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return exponents / exponents.sum(axis=1, keepdims=True)


def score_known(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the probability that texts are of a known label: float64 [num_texts].

    features: float [num_texts, num_features]; weights: of `fit_known`, float [num_features + 1].
    """
    scores = features.astype(np.float64) @ weights[:-1] + weights[-1]
    return 1 / (1 + np.exp(-np.clip(scores, -700, 700)))


def is_decided(probability: float, threshold: float, known: Optional[float] = None, least_known: float = 0.0) -> bool:
    """Tell whether an answer is not below the threshold, and its text not less known than it has to be (None: nobody knows), by
    both as they are shown: rounded to DECIMALS."""
    return round(probability, DECIMALS) >= threshold and (known is None or round(known, DECIMALS) >= least_known)


def top_classes(probs: np.ndarray, k: int) -> np.ndarray:
    """Return the k most probable classes, int64 [num_texts, k], best first, the lower id first among equals.

    probs: float [num_texts, num_classes].
    """
    return np.argsort(-probs, axis=1, kind="stable")[:, :k]


def top_labels(probs: np.ndarray, labels: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
    """Return per text the k most probable (label, probability rounded to DECIMALS), best first: list of lists of tuples.

    probs: float [num_texts, num_classes]; labels: list of str, position = class id.
    """
    return [[(labels[index], round(row[index], DECIMALS)) for index in classes]
            for row, classes in zip(probs.tolist(), top_classes(probs, k).tolist())]
