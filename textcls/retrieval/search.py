"""Answers from an index: nearest rows, the labels' vote, its fusion with the lexical half and the head, confidence.

Needs no Paddle.
"""

from typing import NamedTuple, Union

import numpy as np

from textcls.common.errors import UserError
from textcls.common.probabilities import DECIMALS, score_known
from textcls.retrieval.head import Head, head_probs
from textcls.retrieval.index import SearchIndex
from textcls.retrieval.lexical import cosines, count_terms, weigh
from textcls.retrieval.nearest import QUERIES, ROWS, nearest, select_top
from textcls.runtime.predictions import check_threshold

LEAST_QUERIES = 16  # of a block, where there are very many labels
CELLS = 1 << 22  # queries x labels that are scored at a time
NEAREST = 3  # rows by which a text counts as known


class Answer(NamedTuple):
    """What an index says of a text."""

    label: str
    probability: float  # that this is right, 0 to 1
    similarity: float  # cosine of the label's nearest row
    known: float  # probability that the text is of one of the index's labels, 0 to 1
    top_k: list[tuple[str, float, float]]  # (label, probability, similarity), best first
    nearest: list[tuple[str, str, float]]  # (text, label, similarity): the reasons, nearest first


class Found(NamedTuple):
    """The rows near some queries, nearest first; where there are fewer, the row is -1 and the similarity -inf."""

    similarities: np.ndarray  # float32 [num_queries, neighbours]
    rows: np.ndarray  # int64 [num_queries, neighbours]
    lexical_similarities: np.ndarray  # the same by TF-IDF
    lexical_rows: np.ndarray
    vectors: np.ndarray  # float32 [num_queries, dimension], of the queries


def part(found: Found, chunk: Union[slice, np.ndarray]) -> Found:
    """What was found near some of the queries. chunk: a slice, or their numbers."""
    return Found(*(array[chunk] for array in found))


# ---- rows near a text


def lexical_nearest(index: SearchIndex, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `nearest`, by the cosine of TF-IDF; rows that share no term with a text are none of its."""
    k = min(k, len(index.row_labels))
    values, rows = np.full((len(texts), k), -np.inf, np.float32), np.full((len(texts), k), -1, np.int64)
    removed = np.flatnonzero(index.row_labels < 0)
    for number, text in enumerate(texts):
        terms, counts = count_terms([text])
        weights = weigh(terms, counts, index.idf)
        scores = np.concatenate([cosines(terms, weights, segment.postings, len(segment.label_ids)) for segment in index.segments])
        scores[removed] = 0
        values[number], rows[number] = (array[0] for array in select_top(scores[None], k, least=0))
    return values, rows


def search(index: SearchIndex, vectors: np.ndarray, texts: list[str], num_rows: int = 0) -> Found:
    """The rows near texts (vectors: theirs), at least num_rows and NEAREST by vectors: Found."""
    vote, lexical = index.header["vote"], index.header["lexical"]
    dense = nearest(index, vectors, max(vote["neighbours"], num_rows, NEAREST))
    return Found(*dense, *lexical_nearest(index, texts, lexical["neighbours"]), vectors)


# ---- from rows to labels


def vote(index: SearchIndex, similarities: np.ndarray, rows: np.ndarray, neighbours: int, temperature: float) -> np.ndarray:
    """Shares of the labels in what was found: float32 [num_queries, num_labels], rows sum to 1, or 0 where nothing was found.

    Texts: exp(similarity / temperature) of the nearest rows, times the label's boost, is summed by label; labels and means:
    the best row of a label counts.
    """
    similarities, rows = similarities[:, :neighbours], rows[:, :neighbours]
    found = rows >= 0
    best = np.where(found, similarities, -np.inf).max(axis=1, keepdims=True, initial=-1)
    weights = np.where(found, np.exp((np.where(found, similarities, -1) - best) / temperature), 0)
    scores = np.zeros((len(rows), len(index.labels)), np.float32)
    labels = index.row_labels[rows]
    weights *= index.boosts[labels]  # of label -1: any, times 0
    places = (np.broadcast_to(np.arange(len(rows))[:, None], rows.shape), labels)
    (np.add if index.header["corpus"] == "texts" else np.maximum).at(scores, places, weights)
    return scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-30)


def fuse(index: SearchIndex, found: Found) -> np.ndarray:
    """Probabilities of the labels, if the text is of one: float32 [num_queries, num_labels]. found: Found."""
    settings, lexical = index.header["vote"], index.header["lexical"]
    share = lexical["weight"]
    probs = vote(index, found.similarities, found.rows, settings["neighbours"], settings["temperature"])
    if share > 0:
        words = vote(index, found.lexical_similarities, found.lexical_rows, lexical["neighbours"], lexical["temperature"])
        has_words = words.any(axis=1, keepdims=True)
        probs = np.where(has_words, (1 - share) * probs + share * words, probs)
    if index.head is not None:
        own = index.header["head"]
        weight = own["weight"] + (own.get("few_weight", own["weight"]) - own["weight"]) * float(index.few.max())
        if weight > 0:
            of_head = head_probs(index.head, found.vectors, own["temperature"], own.get("few_bias", 0.0) * index.few)
            probs = join_head(index.head, probs, of_head, weight)
    return sharpen(probs, settings["sharpness"])


def join_head(head: Head, probs: np.ndarray, own: np.ndarray, weight: float) -> np.ndarray:
    """Probabilities with those of a head in the mixture: the head shares out anew what the labels that it knows have together,
    so that a label which it does not know, an added one, keeps its own. probs: [num_queries, num_labels]; own: of `head_probs`.
    """
    joined, known = probs.copy(), probs[:, head.labels]
    joined[:, head.labels] = (1 - weight) * known + weight * known.sum(axis=1, keepdims=True) * own
    return joined


def sharpen(probs: np.ndarray, sharpness: float) -> np.ndarray:
    """probs ** sharpness, rows made to sum to 1 again: which label is best stays as it is."""
    probs = probs ** sharpness
    return probs / np.maximum(probs.sum(axis=1, keepdims=True), 1e-30)


def known_features(index: SearchIndex, vectors: np.ndarray, found: Found) -> np.ndarray:
    """What the confidence that a text is of a known label goes by: float32 [num_queries, 2 or 3]: mean similarity of the NEAREST
    nearest rows; the largest cosine with a label's centre, text and centre less the mean of all rows; the head's largest logit,
    where there is a head: of an unknown text it is small for all labels.

    So few rows, that a label which was added by a handful of texts counts; less the mean, since what all texts have in common
    hides what sets those of other labels apart; words in common say nothing of a text's being known.
    """
    similarities = np.where(found.rows >= 0, found.similarities, 0)[:, :NEAREST]
    centred = vectors - index.mean
    cosines = centred @ index.centres.T / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    features = [similarities.mean(axis=1), cosines.max(axis=1)]
    if index.head is not None:
        features.append((vectors @ index.head.weights.T + index.head.offsets).max(axis=1))
    return np.stack(features, axis=1)


def known_probs(index: SearchIndex, vectors: np.ndarray, found: Found) -> np.ndarray:
    """Probability that each text is of one of the index's labels: float [num_queries]; 1 where the build had no dev texts."""
    known = index.header["known"]
    if known is None:
        return np.ones(len(vectors))
    features, head = known_features(index, vectors, found), index.head
    if len(known["weights"]) == 3:
        # where the head has nothing to say of the nearest row's label, which was added later, it does not speak against it
        logits = np.full(len(vectors), known["logit"])
        if head is not None:
            is_of_head = np.isin(index.row_labels[found.rows[:, 0]], head.labels)
            logits = np.where(is_of_head, features[:, 2], np.maximum(features[:, 2], logits))
        features = np.column_stack([features[:, :2], logits])
    return score_features(known, features)


def score_features(known: dict, features: np.ndarray) -> np.ndarray:
    """Probability that texts are of a known label: float [num_texts]. known: the entry of index.json; features: of
    `known_features`, of which the first count that have a weight."""
    weights = np.array([*known["weights"], known["offset"]])
    return score_known(features[:, :len(weights) - 1], weights)


def label_similarities(index: SearchIndex, queries: np.ndarray) -> np.ndarray:
    """Cosine of each label's nearest row by exact search: float32 [num_queries, num_labels]; -inf for a label without rows."""
    best = np.full((len(queries), len(index.labels)), -np.inf, np.float32)
    for segment, first in zip(index.segments, index.starts):
        for start in range(0, len(segment.label_ids), ROWS):
            block = segment.block(start, start + ROWS)
            labels = index.row_labels[first + start:first + start + len(block)]
            order = np.argsort(labels, kind="stable")[(labels < 0).sum():]
            if len(order):
                present, starts = np.unique(labels[order], return_index=True)
                scores = np.maximum.reduceat((queries @ block.T)[:, order], starts, axis=1)
                best[:, present] = np.maximum(best[:, present], scores)
    return best


def chunks(index: SearchIndex, count: int) -> list[slice]:
    """Slices of `count` queries, so that queries x labels stay within CELLS."""
    size = min(QUERIES, max(LEAST_QUERIES, CELLS // len(index.labels)))
    return [slice(start, start + size) for start in range(0, count, size)]


def label_probabilities(index: SearchIndex, vectors: np.ndarray, texts: list[str]) -> np.ndarray:
    """Probabilities of the labels, calibrated: float32 [num_texts, num_labels], rows sum to the probability of a known label.

    vectors: float32 [num_texts, dimension]. For many labels call it by `chunks`.
    """
    found = search(index, vectors, texts)
    probs = fuse(index, found)
    return probs * known_probs(index, vectors, found)[:, None].astype(np.float32)


def make_answers(index: SearchIndex, vectors: np.ndarray, texts: list[str], top_k: int = 1, num_nearest: int = 0) -> list[Answer]:
    """What an index says of texts (list of str; vectors: theirs, float32 [num_texts, dimension]): list of Answer.

    Labels are ordered by probability, those that got none by the similarity of their nearest row.
    """
    top_k, answers = min(top_k, len(index.labels)), []
    for chunk in chunks(index, len(texts)):
        found = search(index, vectors[chunk], texts[chunk], num_nearest)
        probs = fuse(index, found)
        known = known_probs(index, vectors[chunk], found)
        best = shown_similarities(index, found, vectors[chunk], probs, top_k)
        for row in range(len(probs)):
            order = rank_labels(probs[row], best[row])[:top_k]
            top = [(index.labels[label], round(float(probs[row, label] * known[row]), DECIMALS),
                    round(max(float(best[row, label]), -1.0), DECIMALS)) for label in order]
            reasons = [(index.text(number), index.labels[index.row_labels[number]], round(float(similarity), DECIMALS))
                       for number, similarity in zip(found.rows[row], found.similarities[row][:num_nearest]) if number >= 0]
            answers.append(Answer(*top[0], round(float(known[row]), DECIMALS), top, reasons))
    return answers


def find_threshold(wanted: Union[float, str], index: SearchIndex) -> float:
    """What a threshold means: a number as it is, "auto" the one that the index holds.

    UserError where it holds none, or answers below it could not be told from those of a label.
    """
    if not isinstance(wanted, str):
        threshold = wanted
    elif index.header["threshold"] is None:
        raise UserError("threshold auto: the index holds none, expected a number, or an index that build_index.py made with "
                        "--precision and dev texts")
    else:
        threshold = index.header["threshold"]["value"]
    check_threshold(threshold, index.labels)
    return threshold


def shown_similarities(index: SearchIndex, found: Found, vectors: np.ndarray, probs: np.ndarray, top_k: int) -> np.ndarray:
    """`label_similarities` of the top_k labels of each text and of those that are as probable; others may be -inf."""
    best = np.full((len(vectors), len(index.labels)), -np.inf, np.float32)
    queries, places = np.nonzero(found.rows >= 0)
    np.maximum.at(best, (queries, index.row_labels[found.rows[queries, places]]), found.similarities[queries, places])
    few = np.flatnonzero((probs > 0).sum(axis=1) < top_k)
    if len(few):
        best[few] = label_similarities(index, vectors[few])
    least = np.partition(probs, probs.shape[1] - top_k, axis=1)[:, -top_k, None]
    for query, label in zip(*np.nonzero((probs >= least) & np.isinf(best))):  # the lexical half alone has found them
        rows = np.flatnonzero(index.row_labels == label)
        if len(rows):
            best[query, label] = (index.take(rows) @ vectors[query]).max()
    return best


def rank_labels(probs: np.ndarray, similarities: np.ndarray) -> np.ndarray:
    """Labels from best to worst: by probability, then by similarity, then by their order. Both: float [..., num_labels]."""
    return np.lexsort((-similarities, -probs), axis=-1)


def label_ranks(probs: np.ndarray, similarities: np.ndarray) -> np.ndarray:
    """The place of each label in that order, from 1: int64 [num_queries, num_labels]."""
    return np.argsort(rank_labels(probs, similarities), axis=1) + 1
