"""How good a classifier is: its metrics, how sure they are, and the texts it gets wrong. Needs NumPy alone."""

from collections.abc import Sequence
from typing import Optional, Protocol, Union, overload

import numpy as np

from textcls.common.probabilities import top_classes
from textcls.data.tokens import TokenizedTexts

RESAMPLES, INTERVAL = 1000, 0.95  # of the bootstrap
CURVE_POINTS = 200  # of a risk-coverage curve
MATRIX_CLASSES = 200  # up to so many classes there is a whole confusion matrix
RANKED = 3  # classes of a text whose order counts
CHUNK_NUMBERS = 2_000_000  # logits that are worked on at a time
METRICS = ("accuracy", *(f"{average}_{name}" for average in ("micro", "macro") for name in ("precision", "recall", "f1")))


class Prediction(Protocol):
    """What PaddleNLP's Trainer hands to `compute_metrics`."""

    predictions: np.ndarray
    label_ids: np.ndarray


def compute_metrics(prediction: Prediction, tokens: Optional[TokenizedTexts] = None) -> dict[str, float]:
    """Compute what a Trainer logs and --metric_for_best_model may name: METRICS.

    prediction: its `predictions` are logits [num_rows, num_classes], its `label_ids` int64 [num_rows]. tokens: whose rows these
    are, where a text may have several.
    """
    logits, label_ids = join_rows(prediction, tokens)
    metrics = score_classes(label_ids, logits.argmax(axis=-1), logits.shape[-1])
    # with one label per text every wrong guess is a miss of one class and a false alarm of another: all three are the accuracy
    return {name: metrics["accuracy" if name.startswith("micro_") else name] for name in METRICS}


def join_rows(prediction: Prediction, tokens: Optional[TokenizedTexts]) -> tuple[np.ndarray, np.ndarray]:
    """Return (logits [num_texts, num_classes], label ids [num_texts]) of those of rows. Arguments: as of `compute_metrics`."""
    if tokens is None:
        return prediction.predictions, prediction.label_ids
    return tokens.join(prediction.predictions), tokens.text_labels


class KeptMetrics:
    """`compute_metrics` that keeps what it was last given: logits float32 [num_texts, num_classes] and label_ids int64.

    tokens: what is evaluated, where a text may have several rows.
    """

    def __init__(self, tokens: Optional[TokenizedTexts]):
        self.tokens = tokens
        self.logits: Optional[np.ndarray] = None
        self.label_ids: Optional[np.ndarray] = None

    def __call__(self, prediction: Prediction) -> dict[str, float]:
        self.logits, self.label_ids = join_rows(prediction, self.tokens)
        return compute_metrics(prediction, self.tokens)


def score(label_ids: np.ndarray, probs: np.ndarray) -> dict:
    """Compute the metrics of one split. label_ids: int64 [num_texts]; probs: float32 [num_texts, num_classes], or logits.

    Returns a dict: size, what `score_classes` and `count_confusions` return, top_k accuracies (k below the number of classes).
    """
    return score_ranking(label_ids, rank_classes(probs), probs.shape[1])


def rank_classes(probs: np.ndarray) -> np.ndarray:
    """Return the best classes, best first, as many as `score_ranking` looks at: int32 [num_texts, RANKED or fewer]."""
    ranking = np.empty((len(probs), min(RANKED, probs.shape[1])), np.int32)
    step = max(1, CHUNK_NUMBERS // probs.shape[1])
    for start in range(0, len(probs), step):
        ranking[start:start + step] = top_classes(probs[start:start + step], RANKED)
    return ranking


def score_ranking(label_ids: np.ndarray, ranking: np.ndarray, num_classes: int) -> dict:
    """Compute the metrics of `score` from what `rank_classes` returned."""
    metrics = {"size": len(label_ids), **score_classes(label_ids, ranking[:, 0], num_classes),
               **count_confusions(label_ids, ranking[:, 0], num_classes)}
    for k in range(2, RANKED + 1):
        if k < num_classes:
            metrics[f"top_{k}_accuracy"] = float((ranking[:, :k] == label_ids[:, None]).any(axis=1).mean())
    return metrics


def count_confusions(label_ids: np.ndarray, guesses: np.ndarray, num_classes: int) -> dict[str, list[list[int]]]:
    """Count how often each class is taken for each. label_ids, guesses: int64 [num_texts].

    Returns {"confusion_matrix": list of rows, one per label}; for more than MATRIX_CLASSES classes, whose matrix would be nearly
    all zeros, {"confusions": list of [label id, id of the guess, count] of the wrong guesses, the most frequent first}.
    """
    pairs = label_ids * num_classes + guesses
    if num_classes <= MATRIX_CLASSES:
        matrix = np.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)
        return {"confusion_matrix": matrix.tolist()}
    confused, counts = np.unique(pairs[label_ids != guesses], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {"confusions": np.stack([*np.divmod(confused[order], num_classes), counts[order]], axis=1).tolist()}


def score_classes(label_ids: np.ndarray, guesses: np.ndarray, num_classes: int) -> dict:
    """Compare labels and guesses, int64 [num_texts] both.

    Returns a dict: accuracy, macro_precision, macro_recall, macro_f1 and per_class (count, precision, recall, f1: lists by class
    id). All shares are 0 to 1; where nothing is divided by nothing, 0. Macro averages go over the classes that occur in
    labels or guesses.
    """
    hits, count, guessed = (np.bincount(ids, minlength=num_classes) for ids in
                            (label_ids[label_ids == guesses], label_ids, guesses))
    shares = {"precision": hits / np.maximum(guessed, 1), "recall": hits / np.maximum(count, 1),
              "f1": 2 * hits / np.maximum(count + guessed, 1)}
    metrics: dict = {"accuracy": float(hits.sum() / len(label_ids))}
    for name, values in shares.items():
        metrics[f"macro_{name}"] = float(values[count + guessed > 0].mean())
    metrics["per_class"] = {"count": count.tolist(), **{name: values.tolist() for name, values in shares.items()}}
    return metrics


def score_open(label_ids: np.ndarray, guesses: np.ndarray, known: np.ndarray, num_labels: int, least_known: float = 0.5
               ) -> dict[str, float]:
    """Score answers to texts some of which are of no label, where those whose `known` is below least_known count as unknown.

    label_ids: int64 [num_texts], num_labels: of no label; guesses: int64, known: float, both [num_texts]. Returns unknown_f1 (F1
    of the class of the unknown), known_f1 (macro F1 of the labels that occur) and accuracy (of all these classes), 0 to 1:
    F1-open, F1-known and accuracy of published tables.
    """
    scores = score_classes(label_ids, np.where(known < least_known, num_labels, guesses), num_labels + 1)
    f1, counts = np.array(scores["per_class"]["f1"]), np.array(scores["per_class"]["count"])
    return {"unknown_f1": float(f1[num_labels]), "known_f1": float(f1[:num_labels][counts[:num_labels] > 0].mean()),
            "accuracy": scores["accuracy"]}


def bootstrap_intervals(label_ids: np.ndarray, guesses: np.ndarray, num_classes: int, seed: int = 0) -> dict[str, list[float]]:
    """Say how far accuracy and macro F1 would differ on other rows: the middle INTERVAL of RESAMPLES resamples of these.

    label_ids, guesses: int64 [num_texts]. Returns {"accuracy": [low, high], "macro_f1": [low, high]}, 0 to 1.
    """
    generator, num_texts = np.random.default_rng(seed), len(label_ids)
    is_right, values = label_ids == guesses, np.zeros((RESAMPLES, 2))
    for number in range(RESAMPLES):
        rows = generator.integers(num_texts, size=num_texts)
        right, label_of, guess_of = is_right[rows], label_ids[rows], guesses[rows]
        hits, counts = (np.bincount(ids, minlength=num_classes) for ids in (label_of[right], np.append(label_of, guess_of)))
        values[number] = right.mean(), (2 * hits[counts > 0] / counts[counts > 0]).mean()
    ends = np.quantile(values, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
    return {name: ends[:, column].tolist() for column, name in enumerate(("accuracy", "macro_f1"))}


def risk_coverage(confidences: np.ndarray, is_right: np.ndarray) -> dict:
    """Compute the share of wrong answers among the surest 1, 2, ... of the texts (Geifman and El-Yaniv 2017, arXiv:1705.08500).

    confidences: float [num_texts]; is_right: bool [num_texts]. Returns aurc, the mean of these shares, excess_aurc, what it has
    beyond that of a perfect order, and coverage and risk: lists of at most CURVE_POINTS points.
    """
    wrong, numbers = ~is_right[np.argsort(-confidences, kind="stable")], np.arange(1, len(is_right) + 1)
    risks, best = (np.cumsum(errors) / numbers for errors in (wrong, np.sort(wrong)))
    points = np.unique(np.linspace(0, len(risks) - 1, CURVE_POINTS).astype(int))
    return {"aurc": float(risks.mean()), "excess_aurc": float(risks.mean() - best.mean()),
            "coverage": (numbers[points] / len(risks)).tolist(), "risk": risks[points].tolist()}


class BadCases(Sequence[dict]):
    """The wrong texts of a split, each a dict of text, label, prediction and confidence, which is made when it is asked for: so
    the texts may be in a file.

    texts: of the split; rows: int64 [num_bad_cases], their numbers; label_ids, guesses: int [num_texts]; confidences: float32
    [num_texts].
    """

    def __init__(self, texts: Sequence[str], rows: np.ndarray, label_ids: np.ndarray, guesses: np.ndarray,
                 confidences: np.ndarray, labels: Sequence[str]):
        self.texts, self.rows, self.labels = texts, rows, labels
        self.label_ids, self.guesses, self.confidences = label_ids, guesses, confidences

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict:
        ...

    @overload
    def __getitem__(self, index: slice) -> "BadCases":
        ...

    def __getitem__(self, index: Union[int, slice]) -> Union[dict, "BadCases"]:
        if isinstance(index, slice):
            return self.take(self.rows[index])
        row = self.rows[index]
        return {"text": self.texts[row], "label": self.labels[self.label_ids[row]],
                "prediction": self.labels[self.guesses[row]], "confidence": float(self.confidences[row])}

    def take(self, rows: np.ndarray) -> "BadCases":
        """Return those of these rows."""
        return BadCases(self.texts, rows, self.label_ids, self.guesses, self.confidences, self.labels)

    def surest_first(self) -> "BadCases":
        """Return them in the order of their confidences, equal ones in that of the file."""
        return self.take(self.rows[np.argsort(-self.confidences[self.rows], kind="stable")])


def find_bad_cases(texts: Sequence[str], label_ids: np.ndarray, probs: np.ndarray, labels: Sequence[str]) -> BadCases:
    """Find the wrong texts, in file order. label_ids: int64 [num_texts]; probs: float32 [num_texts, num_classes]."""
    guesses = probs.argmax(axis=1)
    return BadCases(texts, np.flatnonzero(guesses != label_ids), label_ids, guesses, probs.max(axis=1), labels)
