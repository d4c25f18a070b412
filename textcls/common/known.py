"""How probable it is that a text is of a known label at all, for classifiers and indexes: fitted, saved and computed.

To compute it takes NumPy only; to fit it, SciPy. A classifier's text is looked at by the features that its last layer is given:
it counts as the less known, the farther it is from the nearest label's centre, compared with its distance from the centre of all
texts (relative Mahalanobis distance, Ren et al. 2021, arXiv:2106.09022).
"""

import io
import os
from typing import Any, NamedTuple, Optional

import numpy as np

from textcls.common.digests import content_id
from textcls.common.errors import UserError
from textcls.common.outputs import complete_file
from textcls.common.probabilities import score_known

UNKNOWN_SHARE = 0.1  # of the texts that are asked about, where nobody says otherwise
KNOWN_FILE = "known.npz"  # beside a model's weights, of which it says nothing without the entry `known` of config or deploy.json
HOW_TO_FIT = "train.py --known centres"


class Centres(NamedTuple):
    """What known.npz holds of a classifier, float32: where the texts of its labels are, and what that says of a text."""

    mean: np.ndarray  # [hidden_size], of the features of all texts
    projection: np.ndarray  # [hidden_size, hidden_size], to directions in which texts of one label have the covariance 1
    centres: np.ndarray  # [num_centres, hidden_size], of the labels that had texts, from the mean
    shares: np.ndarray  # [hidden_size], 1 / the variance of all texts in these directions, in which they have no covariance
    weights: np.ndarray  # [2], of `score_known`: of the nearness, and the offset


def find_nearness(centres: Centres, features: np.ndarray) -> np.ndarray:
    """Compute half the relative Mahalanobis distance's negative: float32 [num_texts]. features: float32 [num_texts, hidden_size].

    It is the difference of squared distances, from the mean of all texts by their own variance and from the nearest centre.
    """
    places = (features - centres.mean) @ centres.projection
    nearest = (places @ centres.centres.T - (centres.centres ** 2).sum(axis=1) / 2).max(axis=1)
    return nearest - places ** 2 @ (1 - centres.shares) / 2


def add_nearness(logits: np.ndarray, features: np.ndarray, centres: Centres) -> np.ndarray:
    """Put the nearness of texts, or windows, behind their logits: float32 [num_texts, num_labels + 1]. Like a logit, it is then
    joined to that of a text of several windows by the vote of the logits."""
    return np.column_stack([logits, find_nearness(centres, features)])


def split_known(answers: np.ndarray, centres: Optional[Centres]) -> tuple[np.ndarray, Optional[np.ndarray]]:
    """Return logits and `known` of texts: float32 [num_texts, num_labels], float64 [num_texts] or None without Centres.

    answers: of `add_nearness`, or logits where there are no Centres.
    """
    if centres is None:
        return answers, None
    return answers[:, :-1], score_known(answers[:, -1:], centres.weights)


def fit_known(known: np.ndarray, unknown: np.ndarray, share: float = UNKNOWN_SHARE) -> tuple[np.ndarray, float]:
    """Fit the logistic regression that tells known texts from unknown ones by their features.

    No weight is negative, so that a text which is nearer to the known ones never counts as less known. known, unknown: features
    of each, float [num_texts, num_features]; share: of unknown texts among those that will be asked about. Returns (weights, of
    which the last is the offset, float64 [num_features + 1]; AUROC on these).
    """
    from scipy.optimize import minimize

    features = np.concatenate([known, unknown]).astype(np.float64)
    targets = np.repeat([1.0, 0.0], [len(known), len(unknown)])
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
    odds = (1 - share) / share * len(unknown) / len(known)
    return np.append(scaled, weights[-1] - scaled @ mean + np.log(odds)), auroc(inputs @ weights, targets == 1)


def auroc(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties half (Mann-Whitney). scores: float [n]; is_positive: bool [n]."""
    values, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    positives = int(is_positive.sum())
    negatives = len(scores) - positives
    if not positives or not negatives:
        return float("nan")
    return float((ranks[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def write_centres(folder: str, centres: Centres) -> dict[str, str]:
    """Write the known.npz of a model folder. Returns the entry `known` for the config.json or deploy.json there."""
    content = io.BytesIO()
    np.savez(content, **{name: array.astype(np.float32) for name, array in centres._asdict().items()})
    with complete_file(os.path.join(folder, KNOWN_FILE), "wb") as output:
        output.write(content.getvalue())
    return {"id": content_id(content.getvalue())}


def read_centres(folder: str, entry: Any) -> Optional[Centres]:
    """Read the known.npz of a model folder. entry: `known` of its config.json or deploy.json; None: there is none, whatever file
    is there.

    UserError where the file is not the very one that the entry names.
    """
    if entry is None:
        return None
    path = os.path.join(folder, KNOWN_FILE)
    wrong = f"{path}: missing or damaged, expected the file that {HOW_TO_FIT} wrote, beside the model that it belongs to"
    try:
        with open(path, "rb") as file:
            content = file.read()
        if content_id(content) != entry["id"]:
            raise ValueError
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            centres = Centres(**arrays)
        check_centres(centres)
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # of NumPy, too, where the content is no .npz
        raise UserError(wrong) from None
    return centres


def check_centres(centres: Centres) -> None:
    """Raise ValueError where arrays do not belong together."""
    size = len(centres.mean)
    shapes = [(size,), (size, size), (len(centres.centres), size), (size,), (2,)]
    for array, shape in zip(centres, shapes):
        if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError
