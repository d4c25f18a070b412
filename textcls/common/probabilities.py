"""From logits to the most probable classes. Needs NumPy only, since deploy/triton_serving/build_repository.py copies this file
to where nothing else of this repository is.
"""

from collections.abc import Sequence
from typing import Union

import numpy as np

DECIMALS = 6  # of probabilities in answers
UNDECIDED = "undecided"  # written where the highest probability is below a threshold


def softmax(logits: np.ndarray, temperature: Union[float, np.ndarray] = 1.0) -> np.ndarray:
    """Turn logits, float32 [num_texts, num_classes], into probabilities of the same shape, rows sum to 1.

    temperature: what logits are divided by, a number, or one per text, [num_texts, 1]. It changes no label: the best stays best.
    """
    exponents = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return exponents / exponents.sum(axis=1, keepdims=True)


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
