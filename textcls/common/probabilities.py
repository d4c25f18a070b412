"""From logits to the most probable classes. Needs NumPy only, since deploy/triton_serving/build_repository.py copies this file
to where nothing else of this repository is.
"""

import numpy as np

DECIMALS = 6  # of probabilities in answers


def softmax(logits):
    """float32 [num_texts, num_classes] -> probabilities of the same shape, rows sum to 1."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def top_classes(probs, k):
    """The k most probable classes, best first, the lower id first among equals. float [num_texts, num_classes] -> int64
    [num_texts, k]."""
    return np.argsort(-probs, axis=1, kind="stable")[:, :k]


def top_labels(probs, labels, k):
    """Per text the k most probable (label, probability rounded to DECIMALS), best first: list of lists of tuples.

    probs: float [num_texts, num_classes]; labels: list of str, position = class id.
    """
    return [[(labels[index], round(row[index], DECIMALS)) for index in classes]
            for row, classes in zip(probs.tolist(), top_classes(probs, k).tolist())]
