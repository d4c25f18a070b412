"""TF-IDF of characters and pairs of them, without a vocabulary, so that new texts need no training. Needs NumPy alone.

A term is a number made of its characters' code points. Rows of a corpus are kept as postings (which rows hold a term), so that a
query looks only at rows that share a term with it.
"""

from typing import NamedTuple

import numpy as np

CODE_POINT_BITS = 21
TermVector = tuple[np.ndarray, np.ndarray]  # of one row: terms int64 [num_terms], ascending; their weights float32


class Postings(NamedTuple):
    """TF-IDF vectors of unit length, by term."""

    terms: np.ndarray  # int64 [num_terms], ascending
    starts: np.ndarray  # int64 [num_terms + 1]: where a term's entries begin in rows and weights
    rows: np.ndarray  # int32 [num_entries], ascending within a term
    weights: np.ndarray  # float32 [num_entries]


class Idf(NamedTuple):
    """Inverse document frequencies, ln((1 + rows) / (1 + rows with the term)) + 1 (scikit-learn's smooth form)."""

    terms: np.ndarray  # int64 [num_terms], ascending
    values: np.ndarray  # float32 [num_terms]
    unseen: float  # of a term that no row holds


def count_terms(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The terms of one row, which may be several texts, and how often each occurs: int64 [num_terms] both, terms ascending."""
    found = []
    for text in texts:
        codes = np.frombuffer(" ".join(text.lower().split()).encode("utf-32-le"), np.uint32).astype(np.int64)
        found += [codes, ((codes[:-1] + 1) << CODE_POINT_BITS) | codes[1:]]
    return np.unique(np.concatenate(found), return_counts=True)


def idf_of_rows(term_lists: list[np.ndarray]) -> Idf:
    """The Idf of a corpus. term_lists: the terms of each row, as of `count_terms`."""
    terms, counts = np.unique(np.concatenate(term_lists), return_counts=True)
    return make_idf(terms, counts, len(term_lists))


def idf_of_postings(postings: Postings, num_rows: int) -> Idf:
    """The same Idf from the corpus's postings."""
    return make_idf(postings.terms, np.diff(postings.starts), num_rows)


def make_idf(terms: np.ndarray, row_counts: np.ndarray, num_rows: int) -> Idf:
    return Idf(terms, (np.log((1 + num_rows) / (1 + row_counts)) + 1).astype(np.float32), float(np.log(1 + num_rows) + 1))


def weigh(terms: np.ndarray, counts: np.ndarray, idf: Idf) -> np.ndarray:
    """The vector of a row: float32 [num_terms], (1 + ln count) * idf at unit length. terms, counts: as of `count_terms`."""
    places = np.minimum(np.searchsorted(idf.terms, terms), len(idf.terms) - 1)
    values = np.where(idf.terms[places] == terms, idf.values[places], idf.unseen)
    weights = (1 + np.log(counts)) * values
    return (weights / np.linalg.norm(weights)).astype(np.float32)


def make_postings(vectors: list[TermVector]) -> Postings:
    """Postings of rows. vectors: per row (terms, weights), terms ascending."""
    rows = np.repeat(np.arange(len(vectors), dtype=np.int32), [len(terms) for terms, _ in vectors])
    entries = np.concatenate([terms for terms, _ in vectors])
    order = np.argsort(entries, kind="stable")
    terms, counts = np.unique(entries, return_counts=True)
    weights = np.concatenate([weights for _, weights in vectors])
    return Postings(terms, np.concatenate([[0], np.cumsum(counts)]), rows[order], weights[order])


def split_postings(postings: Postings, num_rows: int) -> list[TermVector]:
    """What `make_postings` was given: per row (terms, weights)."""
    order = np.argsort(postings.rows, kind="stable")
    terms = np.repeat(postings.terms, np.diff(postings.starts))[order]
    ends = np.cumsum(np.bincount(postings.rows, minlength=num_rows))[:-1]
    return list(zip(np.split(terms, ends), np.split(postings.weights[order], ends)))


def postings_row(postings: Postings, row: int) -> TermVector:
    """The vector of one row: (terms, weights)."""
    entries = np.flatnonzero(postings.rows == row)
    return postings.terms[np.searchsorted(postings.starts, entries, side="right") - 1], postings.weights[entries]


def mix(first: TermVector, first_share: float, second: TermVector, second_share: float) -> TermVector:
    """The unit vector of a weighted sum of two. first, second: (terms, weights); returns the same."""
    terms, places = np.unique(np.concatenate([first[0], second[0]]), return_inverse=True)
    weights = np.bincount(places, np.concatenate([first[1] * first_share, second[1] * second_share]))
    return terms, (weights / np.linalg.norm(weights)).astype(np.float32)


def cosines(terms: np.ndarray, weights: np.ndarray, postings: Postings, num_rows: int) -> np.ndarray:
    """Cosine of a query's vector with every row: float32 [num_rows]."""
    if not len(postings.terms):
        return np.zeros(num_rows, np.float32)
    places = np.minimum(np.searchsorted(postings.terms, terms), len(postings.terms) - 1)
    shared = np.flatnonzero(postings.terms[places] == terms)
    if not len(shared):
        return np.zeros(num_rows, np.float32)
    spans = [slice(*postings.starts[place:place + 2]) for place in places[shared]]
    products = np.concatenate([postings.weights[span] * weight for span, weight in zip(spans, weights[shared])])
    return np.bincount(np.concatenate([postings.rows[span] for span in spans]), products, num_rows).astype(np.float32)
