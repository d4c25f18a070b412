"""The head of an index: logistic regression of the labels on the rows' vectors. Fitting needs SciPy, answering NumPy alone."""

from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np

from textcls.common.log import get_logger
from textcls.common.probabilities import softmax

if TYPE_CHECKING:
    from textcls.retrieval.index import SearchIndex

STRENGTHS = (3.0, 30.0, 300.0)  # C of the regression, on vectors whose mean square distance from their mean is made 1
STEPS, TOLERANCE = 200, 1e-4  # of L-BFGS: at most, and the relative gain below which it ends
MOST_WORK, AT_ONCE_WORK = 1e10, 1e9  # `head_work` up to which --head auto fits a head, and a change of the index fits it anew
CELLS = 1 << 21  # rows x labels at a time
FEW, MANY = 5, 20  # texts of a label: up to so many it counts as one of few, from so many on it does not


class Head(NamedTuple):
    """Linear scores of labels."""

    labels: np.ndarray  # int [num_known]: of each known label its position among those of the index; in a file its id
    weights: np.ndarray  # float32 [num_known, dimension]
    offsets: np.ndarray  # float32 [num_known]


def head_work(index: "SearchIndex") -> float:
    """Rows x labels x dimension, which the time of a step of `fit_head` goes by."""
    return float((index.row_labels >= 0).sum()) * len(index.labels) * index.header["dimension"]


def fit_head(index: "SearchIndex", strength: float, start: Optional[Head] = None) -> Head:
    """Fit a head to the rows of an index, each label with as much weight. strength: of STRENGTHS, the larger the closer to the
    rows; start: an earlier head, so that it takes fewer steps."""
    from scipy.optimize import minimize

    rows = np.flatnonzero(index.row_labels >= 0)
    vectors = index.take(rows)
    mean = vectors.mean(axis=0)
    vectors -= mean
    spread = max(float(np.sqrt((vectors ** 2).sum(axis=1).mean())), 1e-6)
    vectors /= spread
    known, targets, counts = np.unique(index.row_labels[rows], return_inverse=True, return_counts=True)
    shares = (1 / (len(known) * counts))[targets].astype(np.float32)
    penalty = 1 / (strength * len(rows))
    shape = (len(known), vectors.shape[1] + 1)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean NLL of the labels with L2 of the weights, and its gradient."""
        params = flat.reshape(shape)
        weights, offsets = params[:, :-1].astype(np.float32), params[:, -1].astype(np.float32)
        total, gradient = 0.0, np.zeros(shape)
        size = max(1, CELLS // len(known))
        for first in range(0, len(rows), size):
            block, right, share = (array[first:first + size] for array in (vectors, targets, shares))
            probs = softmax(block @ weights.T + offsets)
            own = np.arange(len(block)), right
            total -= float(share @ np.log(np.maximum(probs[own], 1e-30)))
            probs[own] -= 1
            probs *= share[:, None]
            gradient[:, :-1] += probs.T @ block
            gradient[:, -1] += probs.sum(axis=0)
        gradient[:, :-1] += penalty * params[:, :-1]
        return total + penalty / 2 * float((params[:, :-1] ** 2).sum()), gradient.ravel()

    params = np.zeros(shape)
    if start is not None:
        _, own, earlier = np.intersect1d(known, start.labels, return_indices=True)
        params[own, :-1] = start.weights[earlier] * spread
        params[own, -1] = start.offsets[earlier] + start.weights[earlier] @ mean
    result = minimize(loss, params.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": STEPS, "ftol": TOLERANCE})
    if result.nit >= STEPS:
        get_logger().warning(f"The head of strength {strength:g} had not settled after {STEPS} steps: it is taken as it is.")
    params = result.x.reshape(shape)
    weights = (params[:, :-1] / spread).astype(np.float32)
    return Head(known, weights, (params[:, -1] - weights @ mean).astype(np.float32))


def few_shares(counts: np.ndarray) -> np.ndarray:
    """How far each label counts as one of few texts: float32 [num_labels], from 1 (FEW or less) to 0 (MANY or more). counts:
    texts per label."""
    return np.clip(np.log(MANY / np.maximum(counts, 1)) / np.log(MANY / FEW), 0, 1).astype(np.float32)


def head_probs(head: Head, vectors: np.ndarray, temperature: float, biases: Optional[np.ndarray] = None) -> np.ndarray:
    """Probabilities of the labels that a head knows: float32 [num_queries, num_known]. biases: what is added to the logits of
    all labels of the index, float32 [num_labels], or None."""
    logits = vectors @ head.weights.T + head.offsets
    return softmax(logits if biases is None else logits + biases[head.labels], temperature)
