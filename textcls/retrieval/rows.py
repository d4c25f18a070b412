"""Rows of an index before they are written: of texts, of means of labels, of a corpus file. Needs no Paddle."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Optional

import numpy as np

from textcls.common.errors import Problems
from textcls.common.texts import LINE, TEXT
from textcls.data.files import read_lines
from textcls.retrieval.index import Segment, label_word, of_single_texts
from textcls.retrieval.lexical import Idf, count_terms, idf_of_rows, make_postings, split_postings, weigh

BLOCK = 16384  # rows converted at a time


class NewRows(NamedTuple):
    """Rows to write: as many of each."""

    vectors: np.ndarray  # float32 [num_rows, dimension], unit length
    label_ids: np.ndarray  # int [num_rows]
    texts: list[str]
    terms: list[tuple[np.ndarray, np.ndarray]]  # of each row (terms, counts), as of `count_terms`, or its TermVector
    counts: np.ndarray  # int [num_rows] and float [num_rows], as of Segment
    lengths: np.ndarray
    terms_are_weighted: bool = False


def rows_of_texts(vectors: np.ndarray, label_ids: Sequence[int], texts: list[str]) -> NewRows:
    """One row per text."""
    return NewRows(vectors, np.asarray(label_ids), texts, [count_terms([text]) for text in texts], *of_single_texts(len(texts)))


def rows_of_means(vectors: np.ndarray, label_ids: np.ndarray, texts: list[str]) -> NewRows:
    """One row per label: the mean of its texts, at unit length."""
    order = np.argsort(label_ids, kind="stable")
    ids, starts, counts = np.unique(label_ids[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(vectors[order], starts, axis=0)
    lengths = np.maximum(np.linalg.norm(sums, axis=1), 1e-12)
    means, nearest, terms = sums / lengths[:, None], [], []
    for mean, start, count in zip(means, starts, counts):
        rows = order[start:start + count]
        nearest.append(texts[rows[np.argmax(vectors[rows] @ mean)]])
        terms.append(count_terms([texts[row] for row in rows]))
    return NewRows(means, ids, nearest, terms, counts, lengths / counts)


def label_texts(name: str, texts: Iterable[str]) -> list[str]:
    """What stands for a label where the corpus is the labels': its word, then its descriptions and synonyms."""
    return list(dict.fromkeys([label_word(name), *texts]))


def label_rows(words: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """The rows of labels: list of (label, text), for each label its name (what follows its last ##) and its words, once each.

    words: {label: its words}, as of utils.read_label_words.
    """
    return [(label, text) for label, own in words.items() for text in label_texts(label, own)]


def read_corpus(path: str, problems: Problems, needs_label: bool = False) -> list[tuple[str, str]]:
    """Read the rows of a corpus file, lines `<text><tab><label>`, or those of a label.txt: list of (text, label).

    needs_label: take the former only. What is wrong goes to problems.
    """
    pairs = []
    words: dict[str, list[str]] = {}
    for number, line in read_lines(path, problems):
        text, tab, label = line.partition("\t")
        problem = TEXT.problem(text) or ((tab or needs_label) and LINE.problem(label))
        if problem:
            expected = "<text><tab><label>" if tab or needs_label else TEXT.expected
            problems.add(path, number, f"text or label: {problem}", expected)
        elif tab:
            pairs.append((text, label))
        else:
            name, *own = text.split("==")
            words.setdefault(name, []).extend(word.strip() for word in own if word.strip())
    return pairs + [(word.strip(), label) for label, word in label_rows(words)]


def make_segment(rows: NewRows, idf: Optional[Idf]) -> Segment:
    """The Segment of NewRows, float32. idf: of segment 0; None: this is segment 0."""
    sizes = {len(rows.vectors), len(rows.label_ids), len(rows.texts), len(rows.terms)}
    if len(sizes) > 1:
        raise ValueError(f"rows of {sizes} vectors, label ids, texts and terms, expected as many of each")
    idf = idf or idf_of_rows([terms for terms, _ in rows.terms])
    label_ids = np.asarray(rows.label_ids, np.int32)
    texts = [text.encode("utf-8") for text in rows.texts]
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return Segment(rows.vectors, None, label_ids, *sums_by_label(rows.vectors, label_ids),
                   np.frombuffer(b"".join(texts), np.uint8), offsets, make_postings(weigh_rows(rows, idf).terms), rows.counts,
                   rows.lengths)


def sums_by_label(vectors: np.ndarray, label_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sum_ids and sums of a Segment."""
    ids, places = np.unique(label_ids, return_inverse=True)
    sums = np.zeros((len(ids), vectors.shape[1]), np.float32)
    for start in range(0, len(places), BLOCK):
        block = places[start:start + BLOCK]
        order = np.argsort(block, kind="stable")
        present, first = np.unique(block[order], return_index=True)
        sums[present] += np.add.reduceat(vectors[start:start + BLOCK][order], first, axis=0)
    return ids, sums


def weigh_rows(rows: NewRows, idf: Idf) -> NewRows:
    """The same rows, their terms with weights."""
    return rows if rows.terms_are_weighted else rows._replace(
        terms=[(terms, weigh(terms, counts, idf)) for terms, counts in rows.terms], terms_are_weighted=True)


def segment_rows(segment: Segment, ids: list[int]) -> NewRows:
    """The rows of a Segment whose labels have one of these ids: NewRows."""
    kept, terms = np.flatnonzero(np.isin(segment.label_ids, ids)), split_postings(segment.postings, len(segment.label_ids))
    numbers = kept.tolist()
    return NewRows(segment.take(kept), segment.label_ids[kept], [segment.text(row) for row in numbers],
                   [terms[row] for row in numbers], segment.counts[kept], segment.lengths[kept], True)


def join_rows(parts: list[NewRows]) -> NewRows:
    """One NewRows of several."""
    vectors, label_ids, counts, lengths = (
        np.concatenate(arrays) for arrays in zip(*((part.vectors, part.label_ids, part.counts, part.lengths) for part in parts)))
    return NewRows(vectors, label_ids, [text for part in parts for text in part.texts],
                   [terms for part in parts for terms in part.terms], counts, lengths, True)
