"""Features of texts and the training rows most like them: what sent_interpret.py, sparse.py, dirty.py and report.py share.

A text's features are what the classifier's last layer is given: float32 [hidden_size]. Features of training files are cached,
since they are asked for again and again with the same model.
"""

import contextlib
import hashlib
import os
import zipfile
import zlib

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import get_logger, progress_bar
from textcls.common.outputs import complete_file
from textcls.common.probabilities import softmax
from textcls.data.tokens import tokenize
from textcls.models.configs import config_path
from textcls.models.inference import predict_features
from textcls.models.weights import WEIGHTS

METHODS = {  # how sent_interpret.py may compare texts: method -> its similarities, the default first
    "feature_similarity": ("cos", "dot", "euc"), "gradient_similarity": ("cos", "dot"), "representer": ("dot",)}
QUERIES = 256  # texts compared with all training rows at once: 100 MB of scores for 100,000 rows


def extract_features(checkpoint, texts, batch_size, description):
    """(features float32 [num_texts, hidden_size], logits float32 [num_texts, num_classes]) of a list of str."""
    tokens = tokenize(texts, checkpoint.encode, description=f"Tokenizing {description}")
    with progress_bar(len(tokens), f"Reading features of {description}") as progress:
        return predict_features(checkpoint, tokens, batch_size, progress)


def cached_features(checkpoint, params_path, texts, batch_size, cache_dir, description):
    """As `extract_features`, kept in cache_dir under a key of the model's files, the length and the texts.

    cache_dir: None or "" to do without. A cached file that cannot be read is made anew.
    """
    if not cache_dir:
        return extract_features(checkpoint, texts, batch_size, description)
    path = os.path.join(cache_dir, f"{features_key(checkpoint, params_path, texts)}.npz")
    shapes = ((len(texts), checkpoint.model.classifier.weight.shape[0]), (len(texts), len(checkpoint.labels)))
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):  # files that are not whole
        with np.load(path, allow_pickle=False) as saved:
            features, logits = saved["features"], saved["logits"]
        if (features.shape, logits.shape) == shapes and features.dtype == logits.dtype == np.float32:
            get_logger().info(f"Features of {description} read from {path}")
            return features, logits
    os.makedirs(cache_dir, exist_ok=True)  # a folder that cannot be made is told before the work, not after it
    features, logits = extract_features(checkpoint, texts, batch_size, description)
    with complete_file(path, "wb") as file:
        np.savez(file, features=features, logits=logits)
    return features, logits


def features_key(checkpoint, params_path, texts):
    """Name of a cached file: SHA-256 over everything that decides on the features of these texts."""
    digest = hashlib.sha256(f"1 {checkpoint.max_seq_length} ".encode())
    for name in (WEIGHTS, os.path.basename(config_path(params_path)), "vocab.txt", "tokenizer.json", "tokenizer_config.json",
                 "sentencepiece.bpe.model"):
        path = os.path.join(params_path, name)
        if os.path.isfile(path):
            digest.update(name.encode())
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:32]


def normalize(features):
    """Rows divided by their Euclidean length, so that dot products are cosines. Same dtype and shape."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def nearest_rows(score, num_queries, top_k, lowest=False):
    """The training rows with the highest scores for each query, in blocks, so that memory does not grow with the queries.

    score: function of a slice of the queries, returns float32 [num_in_slice, num_rows]; of any sign.
    lowest: look for the lowest scores as well. top_k is cut to the number of rows.
    Returns (indices int64 [num_queries, top_k], scores float32 [num_queries, top_k]), best first, and with `lowest` two
    more, lowest first. Equal scores go by row number.
    """
    found = []
    with progress_bar(num_queries, "Searching") as progress:
        for start in range(0, num_queries, QUERIES):
            block = score(slice(start, min(start + QUERIES, num_queries)))
            found.append(_top(block, top_k) + (_top(block, top_k, lowest=True) if lowest else ()))
            progress.update(len(block))
    return tuple(np.concatenate(parts) for parts in zip(*found))


def _top(scores, top_k, lowest=False):
    """(indices, scores) of the top_k highest, or lowest, of each row, sorted."""
    top_k = min(top_k, scores.shape[1])
    indices = np.argpartition(scores, top_k - 1 if lowest else -top_k, axis=1)
    indices = np.sort(indices[:, :top_k] if lowest else indices[:, -top_k:], axis=1)
    values = np.take_along_axis(scores, indices, axis=1)
    order = np.argsort(values if lowest else -values, axis=1, kind="stable")
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(values, order, axis=1)


def influence_scores(method, sim_fn, train, queries):
    """The function of a slice of the queries that `nearest_rows` asks for: how much each training row speaks for the
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

    def minus_distances(part):
        squared = query_squares[part, None] + squares - 2 * (query_features[part] @ features.T)
        return -np.sqrt(np.maximum(squared, 0)).astype(np.float32)

    return minus_distances


def find_influences(labels, train, train_outputs, texts, outputs, top_k=3, method="feature_similarity", sim_fn=None):
    """The training rows with the most positive and the most negative influence on the model's answers.

    labels: names by class id; train: (list of str, label_ids int64 [num_rows]); texts: list of str; train_outputs, outputs:
    (features, logits) of both, as of `extract_features`; method, sim_fn: see `influence_scores`.
    Returns a list of dicts, one per text: text, predict_label, probability (0 to 1, of predict_label), positive and
    negative: lists of dicts of text, label, score, line (number from 1 in the training file), the strongest first.
    """
    score = influence_scores(method, sim_fn or METHODS[method][0], (*train_outputs, train[1]), outputs)
    positive, positive_scores, negative, negative_scores = nearest_rows(score, len(texts), top_k, lowest=True)
    probs = softmax(outputs[1])

    def describe(indices, scores):
        return [{"text": train[0][index], "label": labels[train[1][index]], "score": float(f"{score:.6g}"), "line": index + 1}
                for index, score in zip(indices.tolist(), scores.tolist())]

    return [{"text": text, "predict_label": labels[np.argmax(row)], "probability": round(float(row.max()), 6),
             "positive": describe(positive[i], positive_scores[i]), "negative": describe(negative[i], negative_scores[i])}
            for i, (text, row) in enumerate(zip(texts, probs))]


def loss_slopes(logits, label_ids):
    """Gradient of cross entropy by the logits: probabilities - one-hot label. float64 [num_texts, num_classes].

    The label's entry is minus the sum of the others, so that it is exact for texts that the model is sure of.
    """
    slopes, rows = softmax(logits.astype(np.float64)), np.arange(len(logits))
    slopes[rows, label_ids] = 0
    slopes[rows, label_ids] = -slopes.sum(axis=1)
    return slopes


def sparse_scores(train_features, features, top_k=3):
    """How well the training rows cover each text: the mean of its top_k highest cosines with them.

    train_features: float32 [num_rows, hidden_size]; features: float32 [num_texts, hidden_size].
    Returns (scores float32 [num_texts], indices int64 [num_texts, top_k], cosines float32 [num_texts, top_k]), the nearest
    training row first.
    """
    train_features, features = normalize(train_features), normalize(features)
    indices, cosines = nearest_rows(lambda part: features[part] @ train_features.T, len(features), top_k)
    return cosines.mean(axis=1), indices, cosines


def fit_representer(features, targets, l2=0.03, tolerance=1e-8):
    """Representer points of a linear softmax layer (Yeh et al. 2018, arXiv:1811.09720).

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

    def loss_and_slope(flat):
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
