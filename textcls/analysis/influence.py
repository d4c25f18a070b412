"""The training rows that speak most for and against a model's answers, by one of three measures."""

from typing import Callable, Optional

import numpy as np

from textcls.analysis.features import nearest_rows, normalize
from textcls.common.errors import UserError
from textcls.common.probabilities import softmax

METHODS = {  # how sent_interpret.py may compare texts: method -> its similarities, the default first
    "feature_similarity": ("cos", "dot", "euc"), "gradient_similarity": ("cos", "dot"), "representer": ("dot",)}


def influence_scores(method: str, sim_fn: str, train: tuple[np.ndarray, np.ndarray, np.ndarray],
                     queries: tuple[np.ndarray, np.ndarray]) -> Callable[[slice], np.ndarray]:
    """Return the function of a slice of the queries that `nearest_rows` asks for: how much each training row speaks for the
    label that the model gives each query. A score below 0 speaks against it, except for the similarity euc.

    train: (features float32 [num_rows, hidden_size], logits float32 [num_rows, num_classes], label_ids int64 [num_rows]);
    queries: (features, logits) of the same kinds. method, sim_fn: of METHODS.

    feature_similarity: of the two texts' features: their cosine, dot product, or Euclidean distance times -1 (Pezeshkpour
        et al. 2021, arXiv:2104.04128).
    gradient_similarity: of the loss's gradients by the last layer's weights and bias (Charpiat et al. 2019,
        arXiv:2102.05262). Such a gradient is the outer product of [feature, 1] and probabilities - one-hot label, so the
        product of two is (f.f' + 1)(d.d') and no backward pass is needed. Training rows use their label from the file,
        queries the predicted one. (TrustAI 0.1.12 applies softmax twice in its loss and takes the model's prediction for
        the label of training rows; with the label from the file, a row that the model has not learned counts as such.)
    representer: alpha of `fit_representer` for the predicted class, times f.f' (Yeh et al. 2018, arXiv:1811.09720), as in
        TrustAI: without the bias, which adds the same alpha to every query.
    """
    (features, logits, label_ids), (query_features, query_logits) = train, queries
    guesses = query_logits.argmax(axis=1)
    if method == "representer":
        alpha = fit_representer(features, softmax(logits.astype(np.float64)))[0].astype(np.float32).T
        return lambda part: alpha[guesses[part]] * (query_features[part] @ features.T)
    if method == "gradient_similarity":
        slopes, query_slopes = loss_slopes(logits, label_ids), loss_slopes(query_logits, guesses)
        features, query_features = (np.pad(array, ((0, 0), (0, 1)), constant_values=1) for array in (features, query_features))
        if sim_fn == "cos":
            features, query_features, slopes, query_slopes = map(normalize, (features, query_features, slopes, query_slopes))
        slopes, query_slopes = slopes.astype(np.float32), query_slopes.astype(np.float32)
        return lambda part: (query_features[part] @ features.T) * (query_slopes[part] @ slopes.T)
    if sim_fn == "cos":
        features, query_features = normalize(features), normalize(query_features)
    if sim_fn != "euc":
        return lambda part: query_features[part] @ features.T
    features, query_features = features.astype(np.float64), query_features.astype(np.float64)  # differences of large squares
    squares, query_squares = (np.square(array).sum(axis=1) for array in (features, query_features))

    def minus_distances(part: slice) -> np.ndarray:
        squared = query_squares[part, None] + squares - 2 * (query_features[part] @ features.T)
        return -np.sqrt(np.maximum(squared, 0)).astype(np.float32)

    return minus_distances


def find_influences(labels: list[str], train: tuple[list[str], np.ndarray], train_outputs: tuple[np.ndarray, np.ndarray],
                    texts: list[str], outputs: tuple[np.ndarray, np.ndarray], top_k: int = 3,
                    method: str = "feature_similarity", sim_fn: Optional[str] = None, temperature: float = 1.0) -> list[dict]:
    """Find the training rows with the most positive and the most negative influence on the model's answers.

    labels: names by class id; train: texts and label ids int64 [num_rows]; train_outputs, outputs:
    (features, logits) of both, as of `extract_features`; method, sim_fn: see `influence_scores`; temperature: the checkpoint's.
    Returns a list of dicts, one per text: text, predict_label, probability (0 to 1, of predict_label), positive and
    negative: lists of dicts of text, label, score, line (number from 1 in the training file), the strongest first.
    """
    score = influence_scores(method, sim_fn or METHODS[method][0], (*train_outputs, train[1]), outputs)
    positive, positive_scores, negative, negative_scores = nearest_rows(score, len(texts), top_k, lowest=True)
    probs = softmax(outputs[1], temperature)

    def describe(indices: np.ndarray, scores: np.ndarray) -> list[dict]:
        return [{"text": train[0][index], "label": labels[train[1][index]], "score": float(f"{score:.6g}"), "line": index + 1}
                for index, score in zip(indices.tolist(), scores.tolist())]

    return [{"text": text, "predict_label": labels[np.argmax(row)], "probability": round(float(row.max()), 6),
             "positive": describe(positive[i], positive_scores[i]), "negative": describe(negative[i], negative_scores[i])}
            for i, (text, row) in enumerate(zip(texts, probs))]


def loss_slopes(logits: np.ndarray, label_ids: np.ndarray) -> np.ndarray:
    """Compute the gradient of cross entropy by the logits: probabilities - one-hot label. float64 [num_texts, num_classes].

    The label's entry is minus the sum of the others, so that it is exact for texts that the model is sure of.
    """
    slopes, rows = softmax(logits.astype(np.float64)), np.arange(len(logits))
    slopes[rows, label_ids] = 0
    slopes[rows, label_ids] = -slopes.sum(axis=1)
    return slopes


def fit_representer(features: np.ndarray, targets: np.ndarray, l2: float = 0.03,
                    tolerance: float = 1e-8) -> tuple[np.ndarray, np.ndarray]:
    """Fit the representer points of a linear softmax layer (Yeh et al. 2018, arXiv:1811.09720).

    Refits the layer, bias included, to the minimum of mean cross entropy(targets, softmax) + l2 * (sum of squared weights).
    There the weights are a sum over the training rows: weights = [features, 1].T @ alpha, so that row i adds
    alpha[i, c] * (features[i] . feature + 1) to the score that any text gets for class c.

    features: float32 [num_rows, hidden_size]; targets: float [num_rows, num_classes], rows sum to 1: the model's own
    probabilities, or one-hot gold labels. tolerance: largest slope at the minimum that is returned.
    Returns (alpha float64 [num_rows, num_classes], weights float64 [hidden_size + 1, num_classes], the bias last).
    The problem is strictly convex, so nothing depends on a seed or a start. UserError where the minimum is not found.
    """
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    inputs = np.concatenate([features, np.ones((len(features), 1))], axis=1, dtype=np.float64)
    targets = np.asarray(targets, np.float64)
    shape = (inputs.shape[1], targets.shape[1])

    def loss_and_slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        log_probs = log_softmax(inputs @ weights, axis=1)
        loss = -(targets * log_probs).sum() / len(inputs) + l2 * (weights ** 2).sum()
        slope = inputs.T @ (np.exp(log_probs) - targets) / len(inputs) + 2 * l2 * weights
        return loss, slope.ravel()

    found = minimize(loss_and_slope, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B",
                     options={"maxiter": 5000, "maxfun": 10000, "gtol": tolerance, "ftol": 0, "maxcor": 20})
    if not abs(found.jac).max() < 1e-5:  # where float64 ends, the search may stop above the tolerance
        raise UserError(f"the representer points were not found ({found.message}), expected features that are numbers of "
                        "moderate size")
    weights = found.x.reshape(shape)
    probs = np.exp(log_softmax(inputs @ weights, axis=1))
    return (targets - probs) / (2 * l2 * len(inputs)), weights
