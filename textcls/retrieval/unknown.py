"""Texts of no known label: how they are told from others, and the threshold that reckons with a share of them.

Where there are no such texts, dev texts stand for them in indexes that lack their labels, and, where retrieval_based/leave_out.py
has made them, of encoders that lack them, too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import numpy as np

from textcls.common.confidence import find_threshold
from textcls.common.errors import Problems
from textcls.common.known import UNKNOWN_SHARE, fit_known
from textcls.common.probabilities import DECIMALS
from textcls.data.files import read_lines
from textcls.retrieval.head import fit_head
from textcls.retrieval.index import SearchIndex
from textcls.retrieval.pending import DataFiles
from textcls.retrieval.rows import NewRows
from textcls.retrieval.search import Found, chunks, fuse, known_features, part, score_features
from textcls.retrieval.writing import memory_index

FOLDS, LEAST_LABELS = 5, 4  # of `leave_out_of_index`; a head of fewer labels than these says nothing of others


class UnknownTexts(NamedTuple):
    """The texts of no label that an index reckons with."""

    share: float  # of all texts that are asked about, above 0, below 1
    vectors: np.ndarray  # float32 [num_texts, dimension]
    texts: list[str]  # none: dev texts stand for them


SIMULATED = UnknownTexts(UNKNOWN_SHARE, np.zeros((0, 0), np.float32), [])


def read_unknown(path: str, data: DataFiles) -> list[str]:
    """Read a file of texts of no label, each text once. data: whose texts are not among them. UserError."""
    labelled, problems = {text for text, _ in data.train + data.dev}, Problems()
    texts: dict[str, None] = {}
    for number, line in read_lines(path, problems):
        text = line.partition("\t")[0].strip()
        if text in labelled:
            problems.add(path, number, f"{text[:40]!r} has a label in the data files", "texts of no label")
        elif text:
            texts[text] = None
    if not texts and not problems.count:
        problems.add(path, None, "holds no text", "texts of no label, one per line")
    problems.report()
    return list(texts)


class Examples(NamedTuple):
    """Texts, and what an index says of them."""

    features: np.ndarray  # `known_features`, float32 [num_texts, 2 or 3]
    labels: np.ndarray  # the most probable one of each text, int64 [num_texts]
    probs: np.ndarray  # its probability, if the text is of a known label, float [num_texts]

    def confidences(self, known: dict) -> np.ndarray:
        """The probabilities of the labels as answers show them: float [num_texts]. known: of `known_entry`."""
        exact = self.probs * score_features(known, self.features)
        return np.array([round(value, DECIMALS) for value in exact.tolist()])


def ask(index: SearchIndex, found: Found) -> Examples:
    """Ask an index for texts. found: what is near them."""
    features, labels, probs = [], [], []
    for chunk in chunks(index, len(found.vectors)):
        near = part(found, chunk)
        features.append(known_features(index, near.vectors, near))
        fused = fuse(index, near)
        labels.append(fused.argmax(axis=1))
        probs.append(fused.max(axis=1))
    return Examples(np.concatenate(features), np.concatenate(labels), np.concatenate(probs))


class Lacking(NamedTuple):
    """An index that lacks a part of the labels."""

    part_index: SearchIndex
    is_left: np.ndarray  # of each label whether it is left out, bool [num_labels]
    vectors: np.ndarray  # of the dev texts by the encoder of this index, float32 [num_texts, dimension]


class LeftOut(NamedTuple):
    """What an encoder makes of the texts that was trained without a part of the labels."""

    is_left: np.ndarray  # bool [num_labels]
    rows: NewRows  # of all labels
    vectors: np.ndarray  # of the dev texts, float32 [num_texts, dimension]


def leave_out_of_index(index: SearchIndex, vectors: np.ndarray) -> list[Lacking]:
    """Leave each of FOLDS parts of the labels out of an index, whose encoder knows them all. vectors: of the dev texts."""
    num_folds = min(FOLDS, len(index.labels))
    fold_of = np.random.default_rng(0).permutation(len(index.labels)) % num_folds
    return [Lacking(without_labels(index, fold_of == fold), fold_of == fold, vectors) for fold in range(num_folds)]


def leave_out_of_training(index: SearchIndex, left_out: Sequence[LeftOut]) -> list[Lacking]:
    """Make indexes with the settings of one, by encoders that have never seen the labels that are left out."""
    lacking = []
    for one in left_out:
        other = memory_index({**index.header, "dimension": one.rows.vectors.shape[1]}, one.rows)._replace(head=index.head)
        lacking.append(Lacking(without_labels(other, one.is_left), one.is_left, one.vectors))
    return lacking


def without_labels(index: SearchIndex, is_left: np.ndarray) -> SearchIndex:
    """The index without some labels, and with a head that has never seen them, if it has one. is_left: bool [num_labels]."""
    row_labels = np.where(is_left[index.row_labels], -1, index.row_labels)  # of -1: stays -1
    part_index = index._replace(row_labels=row_labels, centres=np.where(is_left[:, None], 0, index.centres), head=None)
    if index.head is not None and len(is_left) - is_left.sum() >= LEAST_LABELS:
        return part_index._replace(head=fit_head(part_index, index.header["head"]["strength"]))  # from nothing
    return part_index


def ask_lacking(lacking: Sequence[Lacking], label_ids: np.ndarray, find: Callable[[Lacking, np.ndarray], Found]
                ) -> tuple[Examples, Examples]:
    """Ask indexes each of which lacks a part of the labels: (known, unknown) Examples, each dev text once in both, of an index
    that has its label and of one that has not.

    label_ids: int64 [num_texts], of the dev texts; find: what is near those with some numbers.
    """
    known: list[Examples] = []
    unknown: list[Examples] = []
    for number, one in enumerate(lacking):
        its_own = lacking[(number + 1) % len(lacking)].is_left  # labels that this index has
        for examples, is_wanted in ((known, its_own), (unknown, one.is_left)):
            rows = np.flatnonzero(is_wanted[label_ids])
            if len(rows):
                examples.append(ask(one.part_index, find(one, rows)))
    return join(known), join(unknown)


def join(parts: Sequence[Examples]) -> Examples:
    """Put Examples together, with the features that all of them have."""
    width = min(one.features.shape[1] for one in parts)
    features = np.concatenate([one.features[:, :width] for one in parts])
    return Examples(features, np.concatenate([one.labels for one in parts]), np.concatenate([one.probs for one in parts]))


def known_entry(known: np.ndarray, unknown: np.ndarray, share: float) -> tuple[dict, float]:
    """Fit what tells known texts from unknown ones. known, unknown: `known_features` of each; share: of unknown texts.

    Returns (the entry `known` of index.json: unknown_share, weights, offset and, of a head, the mean logit of known texts; AUROC
    on these).
    """
    weights, figure = fit_known(known, unknown, share)
    entry = {"unknown_share": share, "weights": weights[:-1].tolist(), "offset": float(weights[-1])}
    if known.shape[1] > 2:
        entry["logit"] = float(known[:, 2].mean())
    return entry, figure


def mixed_numbers(num_dev: int, num_unknown: int, share: float) -> tuple[int, int]:
    """How many of the dev texts, and of the unknown ones, make a mixture with this share of unknown texts."""
    num_dev = min(num_dev, int(num_unknown * (1 - share) / share))
    return num_dev, min(num_unknown, round(num_dev * share / (1 - share)))


def fit_threshold(dev: Examples, is_right: np.ndarray, unknown: Examples, known: dict, precision: float, share: float
                  ) -> Optional[dict[str, float]]:
    """The lowest probability, as it is shown, that keeps a precision by `confidence.find_threshold` where a share of the texts is
    unknown: {"precision", "value"}, or None. is_right: bool, of dev's labels; known: of `known_entry`.

    Dev and unknown texts are drawn, by a fixed seed, in the numbers that the share asks for.
    """
    generator = np.random.default_rng(0)
    num_dev, num_unknown = mixed_numbers(len(is_right), len(unknown.probs), share)
    drawn = np.sort(generator.choice(len(is_right), num_dev, replace=False))
    others = generator.choice(unknown.confidences(known), num_unknown, replace=False)
    confidences = np.concatenate([dev.confidences(known)[drawn], others])
    threshold = find_threshold(confidences, np.concatenate([is_right[drawn], np.zeros(num_unknown, bool)]), precision)
    return None if threshold is None else {"precision": precision, "value": threshold.value}
