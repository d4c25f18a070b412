"""Which training labels are probably wrong: models that have not seen a row judge its label, and rows are ranked by that."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from textcls.analysis.features import cached_vectors, standardize
from textcls.analysis.influence import fit_representer
from textcls.common.errors import UserError
from textcls.common.log import get_logger, progress_bar
from textcls.common.probabilities import softmax
from textcls.data.files import write_rows
from textcls.data.folds import split_folds
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import load_checkpoint
from textcls.models.inference import predict_probs
from textcls.retrieval.encoder import open_encoder
from textcls.training.baseline import baseline_probs, fit_logistic

FOLD_MODELS = ("tfidf", "vectors", "finetune", "both")  # of dirty.py
ROOT = Path(__file__).resolve().parents[2]
BASELINE_C = 3.0  # less than evaluate.py's 10: the labels are noisy
BASELINE_MIN_DF = 2  # an n-gram of one row says nothing about others
Predict = Callable[[str, list[str], np.ndarray, list[str]], np.ndarray]  # description, training texts, training label ids, texts
VECTOR_STRENGTHS = (0.001, 0.003, 0.01)  # of logistic regression on standardized vectors, small: the labels are noisy
REPRESENTER_L2 = 0.1  # strong, so that the layer cannot learn wrong labels by heart


class Suspects(NamedTuple):
    """All rows, ranked. Arrays of length num_rows in the order of the file, but for `order`."""

    order: np.ndarray  # int64, row indices, most suspicious first
    score: np.ndarray  # float64, 0 to 1: the probability that the label is wrong, as the model sees it
    suggested: np.ndarray  # int64, the most probable class; the row's own where the model agrees with it
    probability: np.ndarray  # float64, of the suggested class
    estimated: int  # how many labels are wrong by cleanlab's estimate


def out_of_fold(predict: Predict, texts: list[str], label_ids: np.ndarray, num_classes: int, fold_of: np.ndarray,
                bar: bool = True) -> np.ndarray:
    """Judge every row by a model of the other folds' rows: probabilities float32 [num_rows, num_classes].

    predict: returns float32 [num_texts, num_classes]; fold_of: of `split_folds`.
    bar: show progress here, where `predict` does not log it.
    """
    probs = np.zeros((len(texts), num_classes), np.float32)
    folds = fold_of.max() + 1
    with progress_bar(len(texts), "Judging folds", disable=not bar) as progress:
        for fold in range(folds):
            inside, outside = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
            probs[inside] = predict(f"Fold {fold + 1} of {folds}", [texts[i] for i in outside], label_ids[outside],
                                    [texts[i] for i in inside])
            progress.update(len(inside))
    return probs


def predict_tfidf(num_classes: int) -> Predict:
    """Return the `predict` of `out_of_fold` that needs no Paddle."""
    def predict(description: str, train_texts: list[str], train_ids: np.ndarray, texts: list[str]) -> np.ndarray:
        return baseline_probs(train_texts, train_ids, texts, num_classes, BASELINE_C, BASELINE_MIN_DF)
    return predict


def predict_vectors(texts: list[str], vectors: np.ndarray, num_classes: int, strength: float) -> Predict:
    """Return the `predict` of `out_of_fold` that knows texts by their vectors. vectors: float32 [num_texts, dimension],
    standardized; strength: C of the logistic regression."""
    vector_of = dict(zip(texts, vectors))

    def predict(description: str, train_texts: list[str], train_ids: np.ndarray, others: list[str]) -> np.ndarray:
        known, asked = (np.stack([vector_of[text] for text in part]) for part in (train_texts, others))
        return fit_logistic(known, train_ids, num_classes, strength)(asked)
    return predict


def judge_by_vectors(args: argparse.Namespace, device: str, texts: list[str], label_ids: np.ndarray, num_classes: int,
                     fold_of: np.ndarray) -> np.ndarray:
    """Judge every row by the vectors of the other folds' rows: float32 [num_rows, num_classes], as of `out_of_fold`.

    Of VECTOR_STRENGTHS it is the one that fits the given labels best, wrong ones included: nobody needs to know these. args: of
    dirty.py, whose model_name_or_path makes the vectors as it is.
    """
    encoder = open_encoder(args.model_name_or_path, device=device, batch_size=args.batch_size, max_seq_length=args.max_seq_length)
    vectors = cached_vectors(encoder, texts, args.cache_dir, "train")
    vectors = standardize(vectors, vectors)
    tried = [out_of_fold(predict_vectors(texts, vectors, num_classes, strength), texts, label_ids, num_classes, fold_of)
             for strength in VECTOR_STRENGTHS]
    return max(tried, key=lambda probs: np.log(np.maximum(probs[np.arange(len(label_ids)), label_ids], 1e-6)).mean())


def predict_finetuned(args: argparse.Namespace, labels: list[str], device: str) -> Predict:
    """Return the `predict` of `out_of_fold` that runs train.py. args: of dirty.py."""
    def predict(description: str, train_texts: list[str], train_ids: np.ndarray, texts: list[str]) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="dirty-") as folder:
            train_checkpoint(args, device, labels, train_texts, train_ids, folder, description)
            checkpoint = load_checkpoint(os.path.join(folder, "checkpoint"))
            tokens = tokenize(texts, checkpoint.encode, description=f"Tokenizing {description}")
            return predict_probs(checkpoint, tokens, args.batch_size)
    return predict


def train_checkpoint(args: argparse.Namespace, device: str, labels: list[str], texts: list[str], label_ids: np.ndarray,
                     folder: str, description: str) -> None:
    """Run train.py on these rows; the model is saved in folder/checkpoint. args: of dirty.py.

    UserError with its message where it fails.
    """
    train_file = os.path.join(folder, "train.txt")
    write_rows(train_file, texts, [labels[label_id] for label_id in label_ids])
    command = [sys.executable, str(ROOT / "train.py"), "--data_dir", args.dataset_dir, "--train_file", train_file,
               "--label_file", args.label_file, "--output_dir", os.path.join(folder, "checkpoint"), "--do_train",
               "--device", device, "--seed", str(args.seed), "--save_strategy", "no", "--report_to", "none"]
    for name in ("model_name_or_path", "max_seq_length"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    get_logger().info(f"{description}: training on {len(texts)} rows ...")
    process = subprocess.run(command + args.train_options, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
                             errors="replace")
    if process.returncode:
        said = [line for line in process.stderr.splitlines() if line.strip() and not line.startswith("[20")]
        raise UserError(f"{description}: train.py ended with code {process.returncode}\n" + "\n".join(said[-10:]))


def combine(first: np.ndarray, second: np.ndarray, label_ids: np.ndarray) -> tuple[np.ndarray, float]:
    """Mix two models' out-of-fold probabilities: geometric mean, with the weight of 0, 0.1, ... 1 that fits the labels best.

    Logarithmic opinion pool: the better of two models gets more say, without knowing which labels are wrong. first, second: float
    [num_rows, num_classes]; label_ids: int64 [num_rows]. Returns (float64 [num_rows, num_classes], the second's weight).
    """
    logs = [np.log(np.maximum(probs.astype(np.float64), 1e-6)) for probs in (first, second)]

    def mix(weight: float) -> np.ndarray:
        return softmax((1 - weight) * logs[0] + weight * logs[1])

    weights = [step / 10 for step in range(11)]
    weight = max(weights, key=lambda weight: np.log(mix(weight)[np.arange(len(label_ids)), label_ids]).mean())
    return mix(weight), weight


def rank_suspects(label_ids: np.ndarray, probs: np.ndarray, method: str = "self_confidence") -> Suspects:
    """Rank rows by the probability that a model which has not seen them gives to another label than theirs.

    label_ids: int64 [num_rows]; probs: float [num_rows, num_classes], out of fold. The score is 1 - cleanlab's label quality
    (Northcutt et al. 2021, arXiv:1911.00068). The only row of a class cannot be judged, since no model knows the class:
    it counts as right.
    """
    from cleanlab.count import num_label_issues
    from cleanlab.rank import get_label_quality_scores

    probs = np.maximum(probs.astype(np.float64), 1e-12)
    single = np.bincount(label_ids, minlength=probs.shape[1])[label_ids] == 1
    probs[single] = np.eye(probs.shape[1])[label_ids[single]]
    probs /= probs.sum(axis=1, keepdims=True)
    score = 1 - get_label_quality_scores(label_ids, probs, method=method)
    return Suspects(np.argsort(-score, kind="stable"), score, probs.argmax(axis=1), probs.max(axis=1),
                    int(num_label_issues(label_ids, probs)))


def representer_probs(features: np.ndarray, label_ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Refit the last layer to the gold labels, and return its probabilities: float64 [num_rows, num_classes].

    A row's representer point at its own class is (1 - this probability of its label) / (2 * l2 * num_rows): ranking by the one
    is ranking by the other. features: float32 [num_rows, hidden_size], of a model trained on these rows.
    """
    _, weights = fit_representer(features, np.eye(num_classes)[label_ids], REPRESENTER_L2)
    return softmax(features @ weights[:-1] + weights[-1])


def find_label_errors(texts: list[str], label_ids: np.ndarray, num_classes: int, folds: int = 5, seed: int = 3) -> Suspects:
    """Rank rows by TF-IDF folds; label_ids: int64 [num_rows]. UserError where the rows are too few for it."""
    fold_of = split_folds(texts, label_ids, folds, seed)
    probs = out_of_fold(predict_tfidf(num_classes), texts, label_ids, num_classes, fold_of)
    return rank_suspects(label_ids, probs)


def plant(label_ids: np.ndarray, num_classes: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Give round(noise * num_rows) rows another class, all others being equally likely.

    Returns (label ids int64 [num_rows], indices of the changed rows int64 [num_planted]).
    """
    random = np.random.default_rng(seed)
    planted = random.choice(len(label_ids), round(noise * len(label_ids)), replace=False)
    noisy = label_ids.copy()
    noisy[planted] = (noisy[planted] + random.integers(1, num_classes, len(planted))) % num_classes
    return noisy, planted
