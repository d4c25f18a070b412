"""Several classifiers on the same labelled texts: opened whatever their form, timed, compared, and whether chance could explain
the difference."""

import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.probabilities import softmax
from textcls.data.files import compare_labels, read_json, read_labels
from textcls.data.tokens import TokenizedTexts, run_by_length, tokenize

TIMED_TEXTS, TIMED_ROUNDS = 512, 3
SIGNIFICANT = 0.05  # of all pairs together
ANSWER_BATCH = 32


class Compared(NamedTuple):
    """A classifier that answers texts."""

    name: str  # its path, as the user wrote it
    form: str  # "checkpoint", "ONNX" or "Paddle graph"
    labels: list[str]  # position = class id
    answer: Callable[[Sequence[str]], np.ndarray]  # texts -> probabilities float32 [num_texts, num_classes]


class Pair(NamedTuple):
    """Two classifiers on the same texts."""

    first: int
    second: int
    only_first: int  # texts that only the first one gets right
    only_second: int
    p: float  # McNemar's exact p, two-sided


def open_classifier(path: str, label_path: Optional[str]) -> Compared:
    """Open a checkpoint, or an export: its ONNX model, or Paddle's graph where it has none. label_path: a label.txt that has to
    agree, or None. UserError."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if os.path.isfile(os.path.join(folder, "deploy.json")):
        model = _open_export(path, folder)
        if label_path:
            compare_labels(model.labels, read_labels(label_path), label_path, path)
        return model
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder, expected a checkpoint of train.py, or an exported model")
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.inference import predict_probs

    checkpoint = load_checkpoint(path, label_path)
    return Compared(path, "checkpoint", checkpoint.labels, lambda texts: predict_probs(
        checkpoint, tokenize(texts, checkpoint.encode), ANSWER_BATCH))


def _open_export(path: str, folder: str) -> Compared:
    if "onnx_file" in read_json(os.path.join(folder, "deploy.json")):
        from textcls.runtime.predictor import Predictor

        predictor = Predictor(path, batch_size=ANSWER_BATCH)
        return Compared(path, "ONNX", predictor.labels, predictor.probabilities)
    from textcls.export.deployment import open_graph, run_graph
    from textcls.models.inference import count_cores
    from textcls.runtime.exported import read_encoder, read_export

    export = read_export(path, with_onnx=False)
    graph, encode = open_graph(os.path.splitext(export.params_path)[0], count_cores()), read_encoder(export)

    def answer(texts: Sequence[str]) -> np.ndarray:
        tokens = TokenizedTexts.from_windows(encode(texts), export.long_text.window_vote)
        logits = run_by_length(functools.partial(run_graph, graph), tokens, ANSWER_BATCH, export.pad_id, len(export.labels))
        return softmax(logits, export.temperature)

    return Compared(path, "Paddle graph", export.labels, answer)


def check_same_labels(models: Sequence[Compared]) -> None:
    """Raise UserError where the models have not all the same labels in the same order."""
    first = models[0]
    for other in models[1:]:
        if other.labels == first.labels:
            continue
        differing = sorted(set(first.labels).symmetric_difference(other.labels))
        wrong = f"{differing[0]!r} is a label of only one of them" if differing else "the order of their labels differs"
        raise UserError(f"{other.name}: has other labels than {first.name} ({wrong}), expected models of one label.txt")


def time_models(models: Sequence[Compared], texts: Sequence[str]) -> list[float]:
    """Measure the milliseconds per text of each model, tokenizing included: the best of TIMED_ROUNDS rounds that take turns, on
    TIMED_TEXTS of the texts at most. Other programs on the machine only ever add to them."""
    sample = texts[::-(-len(texts) // TIMED_TEXTS)]
    best = [float("inf")] * len(models)
    for _ in range(TIMED_ROUNDS):
        for index, model in enumerate(models):
            start = time.perf_counter()
            model.answer(sample)
            best[index] = min(best[index], (time.perf_counter() - start) / len(sample) * 1000)
    return best


def compare_pairs(label_ids: np.ndarray, guesses: np.ndarray) -> list[Pair]:
    """Compare each two models by McNemar's exact test: by chance, a text that one of them alone gets right is as often the one's
    as the other's. label_ids: int64 [num_texts]; guesses: int64 [num_models, num_texts]."""
    is_right = guesses == label_ids
    pairs = []
    for first, second in itertools.combinations(range(len(guesses)), 2):
        only_first, only_second = (int((is_right[one] & ~is_right[other]).sum())
                                   for one, other in ((first, second), (second, first)))
        pairs.append(Pair(first, second, only_first, only_second, mcnemar_p(only_first, only_second)))
    return pairs


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Compute the two-sided exact p of McNemar's test: the binomial test of a share of 1/2."""
    from scipy.stats import binomtest

    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def is_significant(pair: Pair, num_pairs: int) -> bool:
    """Tell whether chance alone would rarely explain a difference. With several pairs each has to show more (Bonferroni)."""
    return pair.p < SIGNIFICANT / num_pairs


def find_changes(texts: Sequence[str], label_ids: np.ndarray, probs: np.ndarray, labels: Sequence[str]) -> list[dict]:
    """List the texts to which not all models give the same label, in file order.

    probs: float32 [num_models, num_texts, num_classes]. Returns dicts: line (from 1), text, label, answers (a list of label,
    confidence and is_right, one per model) and change: "worse" where the first model is right and another is not, "better" where
    it is wrong and another right, else "other".
    """
    guesses = probs.argmax(axis=2)
    changes = []
    for index in np.flatnonzero((guesses != guesses[0]).any(axis=0)).tolist():
        is_right = guesses[:, index] == label_ids[index]
        change = "worse" if is_right[0] else "better" if is_right.any() else "other"
        answers = [{"label": labels[guess], "confidence": float(probs[model, index, guess]), "is_right": bool(right)}
                   for model, (guess, right) in enumerate(zip(guesses[:, index].tolist(), is_right))]
        changes.append({"line": index + 1, "text": texts[index], "label": labels[int(label_ids[index])], "answers": answers,
                        "change": change})
    return changes
