"""Features of texts, their cache, and the rows nearest to them: what sent_interpret.py, sparse.py, dirty.py and report.py share.

A text's features are what the classifier's last layer is given: float32 [hidden_size]. Features of training files are cached,
since they are asked for again and again with the same model.
"""

import contextlib
import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, Callable, Optional

import numpy as np

from textcls.common.digests import sha256
from textcls.common.log import get_logger, progress_bar
from textcls.common.outputs import complete_file
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import Checkpoint
from textcls.models.inference import predict_features
from textcls.models.weights import WEIGHTS
from textcls.retrieval.encoder import TextEncoder

QUERIES = 256  # texts compared with all training rows at once: 100 MB of scores for 100,000 rows


def extract_features(checkpoint: Checkpoint, texts: list[str], batch_size: int,
                     description: str) -> tuple[np.ndarray, np.ndarray]:
    """Run the model over texts; returns (features float32 [num_texts, hidden_size], logits float32 [num_texts, num_classes])."""
    tokens = tokenize(texts, checkpoint.encode, description=f"Tokenizing {description}")
    with progress_bar(len(texts), f"Reading features of {description}") as progress:
        return predict_features(checkpoint, tokens, batch_size, progress)


def cached_features(checkpoint: Checkpoint, params_path: str, texts: list[str], batch_size: int, cache_dir: Optional[str],
                    description: str) -> tuple[np.ndarray, np.ndarray]:
    """Do as `extract_features`, and keep the result in cache_dir under a key of the model's files, the length and the texts.

    cache_dir: None or "" to do without. A cached file that cannot be read is made anew.
    """
    if not cache_dir:
        return extract_features(checkpoint, texts, batch_size, description)
    path = os.path.join(cache_dir, f"{features_key(checkpoint, params_path, texts)}.npz")
    size = checkpoint.model.classifier.weight.shape[0]
    shapes = {"features": (len(texts), size), "logits": (len(texts), len(checkpoint.labels))}

    def extract() -> dict[str, np.ndarray]:
        return dict(zip(shapes, extract_features(checkpoint, texts, batch_size, description)))

    found = cached_arrays(path, shapes, extract, description)
    return found["features"], found["logits"]


def cached_vectors(encoder: TextEncoder, texts: list[str], cache_dir: Optional[str], description: str) -> np.ndarray:
    """Return the vectors of texts by a sentence encoder, float32 [num_texts, dimension], cached as by `cached_features`."""
    def encode() -> dict[str, np.ndarray]:
        with progress_bar(len(texts), f"Encoding {description}") as progress:
            return {"vectors": encoder.encode(texts, progress)}

    if not cache_dir:
        return encode()["vectors"]
    digest = hashlib.sha256(f"vectors {encoder.encoder_id} {encoder.max_seq_length} ".encode())
    digest.update("".join(text + "\n" for text in texts).encode())
    path = os.path.join(cache_dir, f"{digest.hexdigest()[:32]}.npz")
    return cached_arrays(path, {"vectors": (len(texts), encoder.dimension)}, encode, description)["vectors"]


def standardize(vectors: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Measure each number of vectors by the mean and deviation that it has in the reference. Both: float32 [any, dimension].

    The vectors of a pretrained encoder all point into about the same direction, so that cosines of them as they are say little.
    """
    return (vectors - reference.mean(axis=0)) / np.maximum(reference.std(axis=0), 1e-6)


def cached_arrays(path: str, shapes: Mapping[str, tuple[int, ...]], compute: Callable[[], dict[str, np.ndarray]],
                  description: str) -> dict[str, np.ndarray]:
    """Read float32 arrays of these names and shapes from a file, or compute them and keep them there."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):  # files that are not whole
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in shapes}
        if all(array.shape == shapes[name] and array.dtype == np.float32 for name, array in arrays.items()):
            get_logger().info(f"Features of {description} read from {path}")
            return arrays
    os.makedirs(os.path.dirname(path), exist_ok=True)  # a folder that cannot be made is told before the work, not after it
    computed: dict[str, Any] = compute()
    with complete_file(path, "wb") as file:
        np.savez(file, **computed)
    return computed


def features_key(checkpoint: Checkpoint, params_path: str, texts: list[str]) -> str:
    """Name a cached file: SHA-256 over everything that decides on the features of these texts."""
    digest = hashlib.sha256(f"2 {checkpoint.max_seq_length} ".encode())
    digest.update(describe_model(params_path).encode())
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:32]


def describe_model(params_path: str) -> str:
    """Return the names and SHA-256 of all files of a checkpoint that decide on its answers."""
    names = (WEIGHTS, "config.json", "model_config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
             "sentencepiece.bpe.model")
    paths = {name: os.path.join(params_path, name) for name in names}
    return "".join(f"{name} {sha256(path)} " for name, path in paths.items() if os.path.isfile(path))


def normalize(features: np.ndarray) -> np.ndarray:
    """Divide rows by their Euclidean length, so that dot products are cosines. Same dtype and shape."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def nearest_rows(score: Callable[[slice], np.ndarray], num_queries: int, top_k: int,
                 lowest: bool = False) -> tuple[np.ndarray, ...]:
    """Find the training rows with the highest scores for each query, in blocks, so that memory does not grow with the queries.

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


def _top(scores: np.ndarray, top_k: int, lowest: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices, scores) of the top_k highest, or lowest, of each row, sorted."""
    top_k = min(top_k, scores.shape[1])
    indices = np.argpartition(scores, top_k - 1 if lowest else -top_k, axis=1)
    indices = np.sort(indices[:, :top_k] if lowest else indices[:, -top_k:], axis=1)
    values = np.take_along_axis(scores, indices, axis=1)
    order = np.argsort(values if lowest else -values, axis=1, kind="stable")
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(values, order, axis=1)


def sparse_scores(train_features: np.ndarray, features: np.ndarray,
                  top_k: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score how well the training rows cover each text: the mean of its top_k highest cosines with them.

    train_features: float32 [num_rows, hidden_size]; features: float32 [num_texts, hidden_size].
    Returns (scores float32 [num_texts], indices int64 [num_texts, top_k], cosines float32 [num_texts, top_k]), the nearest
    training row first.
    """
    train_features, features = normalize(train_features), normalize(features)
    indices, cosines = nearest_rows(lambda part: features[part] @ train_features.T, len(features), top_k)
    return cosines.mean(axis=1), indices, cosines
