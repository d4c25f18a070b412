"""What models say of the rows of a review: suspect labels, near-duplicates, probabilities, vectors; kept in a cache."""

import contextlib
import hashlib
import os
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional

import numpy as np

from textcls.analysis.attributions import interpret
from textcls.analysis.duplicates import find_conflicts
from textcls.analysis.features import describe_model, extract_features, normalize
from textcls.analysis.label_errors import out_of_fold, predict_tfidf, rank_suspects, split_folds
from textcls.analysis.review_files import Rows
from textcls.analysis.selection import Vectors, order_by_clusters, order_unlabelled
from textcls.analysis.words import make_segments
from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.common.outputs import complete_file
from textcls.common.probabilities import softmax
from textcls.models.checkpoints import Checkpoint, load_checkpoint
from textcls.models.device import select_device
from textcls.training.baseline import baseline_probs

FOLDS, SEED = 5, 3
ROUND_ROWS = 10_000  # rows that are not decided, at most, beside those that are, in a model of a round


class Scores(NamedTuple):
    """What models say of the rows."""

    probs: dict[str, np.ndarray]  # role -> float32 [num_rows, num_labels]; of train by models that have not seen the row
    suspects: np.ndarray  # int64, train rows, the most suspicious first; empty where train is too small to judge
    scores: np.ndarray  # float64 [num_train], 0 to 1: how likely the label is wrong
    duplicates: list[list[int]]  # groups of train rows: like texts with different labels
    vectors: Vectors  # of all rows, role after role
    unlabelled: np.ndarray  # int64, rows of data.txt, most worth labelling first


class Model:
    """The checkpoint of a review, loaded when it is first needed. All of its work is done by one thread: `run`."""

    def __init__(self, folder: str, args: Namespace, label_ids: dict[str, int]) -> None:
        """label_ids: the id of every name that a label has or had."""
        self.folder, self.args, self.label_ids = folder, args, label_ids
        self.checkpoint: Optional[Checkpoint] = None
        self.thread = ThreadPoolExecutor(1)  # Paddle's device is set for each thread

    def load(self) -> Checkpoint:
        """Load the checkpoint, once. UserError where there is none, or one with labels that label.txt lacks."""
        if self.checkpoint is None:
            select_device(self.args.device)
            checkpoint = load_checkpoint(self.folder, None, self.args.max_seq_length)
            unknown = [label for label in checkpoint.labels if label not in self.label_ids]
            if unknown:
                raise UserError(f"{self.folder}: label {unknown[0]!r} is not in {self.args.label_file}, expected a checkpoint "
                                "whose labels are there")
            self.checkpoint = checkpoint
        return self.checkpoint

    def predict(self, texts: list[str], num_labels: int, description: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (features float32 [num_texts, hidden_size], probabilities float32 [num_texts, num_labels])."""
        return self.thread.submit(self._predict, texts, num_labels, description).result()

    def _predict(self, texts: list[str], num_labels: int, description: str) -> tuple[np.ndarray, np.ndarray]:
        checkpoint = self.load()
        features, logits = extract_features(checkpoint, texts, self.args.batch_size, description)
        columns = [self.label_ids[label] for label in checkpoint.labels]
        probs = np.zeros((len(texts), max(num_labels, max(columns) + 1)), np.float32)  # it may know labels that were added
        probs[:, columns] = softmax(logits, checkpoint.temperature)
        return features, probs

    def explain(self, text: str, is_wanted: Callable[[], bool]) -> Optional[dict[str, Any]]:
        """Return the prediction, a label's id, and the words: lists of blanks, word and shade (-1 to 1, None: not read).

        is_wanted: asked when the model is free; where the answer is no, None is returned."""
        return self.thread.submit(self._explain, text, is_wanted).result()

    def _explain(self, text: str, is_wanted: Callable[[], bool]) -> Optional[dict[str, Any]]:
        if not is_wanted():
            return None
        checkpoint = self.load()
        [found] = interpret(checkpoint, [text], "ig", self.args.batch_size)
        words = [[part["blanks"], part["word"], None if part["value"] is None else round(float(part["shade"]), 3)]
                 for part in make_segments(text, found.words)]
        return {"prediction": self.label_ids[checkpoint.labels[found.prediction]], "words": words}


def find_scores(args: Namespace, labels: list[str], data: dict[str, Rows], model: Optional[Model]) -> Scores:
    """Score all rows, or read what an earlier run has kept in args.cache_dir. UserError."""
    digest = hashlib.sha256(f"1 {args.max_seq_length} ".encode())
    digest.update(" ".join(labels).encode() + (describe_model(model.folder) if model else "").encode())
    for role, rows in data.items():
        digest.update(f"{role} {rows.hash} ".encode())
    path = os.path.join(args.cache_dir, f"review-{digest.hexdigest()[:32]}.npz") if args.cache_dir else ""
    if path and (scores := read_scores(path, data)):
        get_logger().info(f"Scores of the rows read from {path}")
        return scores
    if path:
        os.makedirs(args.cache_dir, exist_ok=True)  # a folder that cannot be made is told before the work, not after it
    scores = compute_scores(labels, data, model)
    if path:
        write_scores(path, scores)
    return scores


def read_scores(path: str, data: dict[str, Rows]) -> Optional[Scores]:
    """Return what `write_scores` kept; None where it is not there or not whole."""
    import scipy.sparse

    damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
    with contextlib.suppress(*damaged), np.load(path, allow_pickle=False) as kept:
        num_rows = sum(len(rows.texts) for rows in data.values())
        vectors: Vectors = kept["vectors"]
        if vectors.ndim == 1:
            vectors = scipy.sparse.csr_matrix((vectors, kept["indices"], kept["indptr"]), tuple(kept["shape"]))
        groups = np.split(kept["duplicates"], np.cumsum(kept["group_sizes"])[:-1]) if len(kept["group_sizes"]) else []
        if vectors.shape[0] == num_rows:
            return Scores({role: kept[f"probs_{role}"] for role in data if f"probs_{role}" in kept}, kept["suspects"],
                          kept["scores"], [group.tolist() for group in groups], vectors, kept["unlabelled"])
    return None


def write_scores(path: str, scores: Scores) -> None:
    """Keep scores for the next run. They hold numbers, no texts."""
    vectors = scores.vectors
    matrix: dict[str, Any] = {"vectors": vectors} if isinstance(vectors, np.ndarray) else {
        "vectors": vectors.data, "indices": vectors.indices, "indptr": vectors.indptr, "shape": np.array(vectors.shape)}
    matrix.update({f"probs_{role}": probs for role, probs in scores.probs.items()})
    with complete_file(path, "wb") as file:
        np.savez(file, suspects=scores.suspects, scores=scores.scores, unlabelled=scores.unlabelled,
                 duplicates=np.array([row for group in scores.duplicates for row in group], np.int64),
                 group_sizes=np.array([len(group) for group in scores.duplicates], np.int64), **matrix)


def compute_scores(labels: list[str], data: dict[str, Rows], model: Optional[Model]) -> Scores:
    """Score all rows: train by TF-IDF models of its other parts, the rest by the checkpoint, or by TF-IDF trained on train."""
    probs: dict[str, np.ndarray] = {}
    suspects, scores, duplicates = np.zeros(0, np.int64), np.zeros(0), []
    train = data.get("train")
    is_trainable = train is not None and len(np.unique(train.label_ids)) > 1
    if train is not None and is_trainable:
        try:
            fold_of = split_folds(train.texts, train.label_ids, FOLDS, SEED)
            probs["train"] = out_of_fold(predict_tfidf(len(labels)), train.texts, train.label_ids, len(labels), fold_of)
            found = rank_suspects(train.label_ids, probs["train"])
            suspects, scores = found.order, found.score
        except UserError as error:
            get_logger().warning(f"No suspect labels: too little training data ({error}).")
        duplicates = [group for _, group in find_conflicts(train.texts, train.label_ids)]
    features = []
    for role, rows in data.items():
        if model is not None:
            found_features, found_probs = model.predict(rows.texts, len(labels), role)
            features.append(normalize(found_features))
        elif train is not None and is_trainable and role != "train":
            get_logger().info(f"TF-IDF learns from the {len(train.texts)} texts of train to judge those of {role}")
            found_probs = baseline_probs(train.texts, train.label_ids, rows.texts, len(labels))
        else:
            continue
        if role != "train":
            probs[role] = found_probs
    vectors = np.concatenate(features) if features else tfidf_vectors([text for rows in data.values() for text in rows.texts])
    unlabelled = np.zeros(0, np.int64)
    if "data" in data:
        own = vectors[vectors.shape[0] - len(data["data"].texts):]  # the last role
        unlabelled = order_unlabelled(data["data"].texts, own, probs["data"]) if "data" in probs else order_by_clusters(own)
    return Scores(probs, suspects, scores, duplicates, vectors, unlabelled)


def tfidf_vectors(texts: list[str]) -> Vectors:
    """Return character 1-2-gram TF-IDF vectors of texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    return vectorizer.fit_transform(texts).tocsr()


def nearest_of(vectors: Vectors, row: int, candidates: np.ndarray, count: int = 3) -> list[tuple[int, float]]:
    """Find the rows whose vectors are nearest to those of a row: (row, cosine), nearest first. candidates: bool [num_rows]."""
    own = vectors[row] if isinstance(vectors, np.ndarray) else vectors[row].toarray().ravel()
    cosines = np.where(candidates, vectors @ own, -2)
    cosines[row] = -2
    best = np.argpartition(-cosines, min(count, len(cosines) - 1))[:count]
    best = best[np.argsort(-cosines[best], kind="stable")]
    return [(int(index), float(cosines[index])) for index in best if cosines[index] > -2]


def fit_round(texts: list[str], label_ids: np.ndarray, num_labels: int, is_decided: np.ndarray,
              targets: list[str]) -> np.ndarray:
    """Train TF-IDF + logistic regression on the labelled rows; returns probabilities float32 [num_targets, num_labels].

    label_ids: int64 [num_texts], as they are decided now; is_decided: bool [num_texts]; of the other rows at most ROUND_ROWS are
    taken, the same ones each time.
    """
    others = np.flatnonzero(~is_decided)
    others = np.random.default_rng(SEED).permutation(others)[:ROUND_ROWS]
    rows = np.sort(np.concatenate([np.flatnonzero(is_decided), others]))
    return baseline_probs([texts[row] for row in rows], label_ids[rows], targets, num_labels)
