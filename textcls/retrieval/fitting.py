"""The settings of an index that labelled dev texts decide: the vote, the weights of the lexical half and of the head,
confidence, threshold.
"""

from collections.abc import Iterator, Sequence
from typing import Callable, Optional

import numpy as np

from textcls.retrieval.head import FEW, MANY, STRENGTHS, Head, few_shares, fit_head, head_probs
from textcls.retrieval.index import SearchIndex, label_boosts
from textcls.retrieval.nearest import nearest
from textcls.retrieval.search import Found, chunks, fuse, join_head, lexical_nearest, part, sharpen, vote
from textcls.retrieval.unknown import (
    SIMULATED,
    LeftOut,
    UnknownTexts,
    ask,
    ask_lacking,
    fit_threshold,
    known_entry,
    leave_out_of_index,
    leave_out_of_training,
)

NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
HEAD_TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
WEIGHTS = np.linspace(0, 1, 21)  # of the lexical half, and of the head
SHARPNESS = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0, 3.0, 4.0)
LEAST_ROWS = (0, 10, 20, 50, 100, 200, 400, 800)  # as many rows a label with fewer votes for
TRIED_LABELS, MOST_LOSS = 12, 0.01  # of `best_least_rows`
BIASES, FEW_WEIGHTS = np.linspace(0, 6, 13), (0.25, 0.5, 0.75, 1.0)  # of the head where labels have few texts
GROUPS, GROUP_SHARE = 3, 15  # of `best_for_new`: so many groups, each of one label in so many
NEW_LABEL_COST = 0.003  # accuracy that other labels may lose for labels of few texts, where nobody says otherwise
MOST_TEXTS = 5000  # dev texts that are looked at, evenly spaced
LEAST = 1e-4  # a label without votes counts as this probable


def fit(index: SearchIndex, vectors: np.ndarray, texts: list[str], label_ids: np.ndarray,
        precision: Optional[float] = None, with_head: bool = False, unknown: UnknownTexts = SIMULATED,
        new_label_cost: float = NEW_LABEL_COST, left_out: Sequence[LeftOut] = ()) -> tuple[SearchIndex, dict[str, float]]:
    """Choose the settings by dev texts. label_ids: int64 [num_texts], positions in index.labels; vectors: theirs.

    precision: share of right answers that --threshold auto shall give at least, or None; with_head: fit a head, too; unknown:
    the texts of no label that are reckoned with; new_label_cost: of `best_for_new`; left_out: of the encoders to which dev texts
    stand for texts of no label; none: the index's own. Returns (index with the settings, figures: dict of vote, lexical, head,
    fused (accuracies), known_auroc, nll; shares 0 to 1).
    """
    step = dev_step(len(texts))
    vectors, texts, label_ids = vectors[::step], texts[::step], label_ids[::step]
    sizes = [size for size in NEIGHBOURS if size <= len(index.row_labels)]
    index = with_settings(index, vote={**index.header["vote"], "least_rows": 0})
    found = find_rows(index, vectors, texts, sizes[-1])
    settings, dense = best_vote(index, found.similarities, found.rows, label_ids, sizes)
    lexical, words = best_vote(index, found.lexical_similarities, found.lexical_rows, label_ids, sizes)
    settings.update(sharpness=1.0, least_rows=0)
    index = with_settings(index, vote=settings, lexical={**lexical, "weight": 0.0})
    weight = best_weight(index, found, label_ids)
    index = with_settings(index, lexical={**lexical, "weight": weight})
    settings["least_rows"] = best_least_rows(index, found, label_ids)
    index = with_settings(index, vote=settings)
    index, figures = best_head(index, found, label_ids) if with_head else (index, {})
    if index.head is not None:
        index = with_settings(index, head=best_for_new(index, found, label_ids, new_label_cost))
        index = index if index.header["head"] else index._replace(head=None)
    sharpness, nll = best_sharpness(index, found, label_ids)
    index = with_settings(index, vote={**settings, "sharpness": sharpness})
    fused = float((guess(index, found) == label_ids).mean())
    dev = ask(index, found)
    if unknown.texts:
        own, others = dev, ask(index, find_rows(index, unknown.vectors, unknown.texts, sizes[-1]))
    else:
        if left_out:
            lacking = leave_out_of_training(index, [one._replace(vectors=one.vectors[::step]) for one in left_out])
        else:
            lacking = leave_out_of_index(index, vectors)
        own, others = ask_lacking(lacking, label_ids, lambda one, rows: find_rows(
            one.part_index, one.vectors[rows], [texts[row] for row in rows], sizes[-1]))
    known, auroc = known_entry(own.features, others.features, unknown.share)
    if unknown.texts or left_out:
        known["learned_from"] = "unknown_file" if unknown.texts else "left_out_dir"
    threshold = None
    if precision is not None:
        threshold = fit_threshold(dev, dev.labels == label_ids, others, known, precision, unknown.share)
    figures = {"vote": dense, "lexical": words, **figures, "fused": fused, "known_auroc": auroc, "nll": nll}
    return with_settings(index, known=known, threshold=threshold), figures


def dev_step(num_texts: int) -> int:
    """Of how many dev texts one is looked at."""
    return -(-num_texts // MOST_TEXTS)


def with_settings(index: SearchIndex, counts: Optional[np.ndarray] = None, **entries: object) -> SearchIndex:
    """The index with other entries in its header, in memory only. counts: rows per label that it shall seem to have."""
    header = {**index.header, **entries}
    counts = index.rows_per_label() if counts is None else counts
    return index._replace(header=header, boosts=label_boosts(header, counts), few=few_shares(counts))


def find_rows(index: SearchIndex, vectors: np.ndarray, texts: list[str], k: int) -> Found:
    """Found with the k nearest rows of both halves."""
    return Found(*nearest(index, vectors, k, exact=True), *lexical_nearest(index, texts, k), vectors)


def best_vote(index: SearchIndex, similarities: np.ndarray, rows: np.ndarray, label_ids: np.ndarray,
              sizes: list[int]) -> tuple[dict, float]:
    """The neighbours and temperature of most right answers, then of least NLL: ({"neighbours", "temperature"}, accuracy)."""
    grid = [(size, temperature) for size in sizes for temperature in TEMPERATURES]
    hits, losses = measure(index, label_ids, len(grid), lambda chunk: (
        vote(index, similarities[chunk], rows[chunk], size, temperature) for size, temperature in grid))
    size, temperature = grid[np.lexsort((losses, -hits))[0]]
    return {"neighbours": size, "temperature": temperature}, float(hits.max() / len(label_ids))


def best_weight(index: SearchIndex, found: Found, label_ids: np.ndarray) -> float:
    """The lexical half's weight of most right answers, then of least NLL."""
    tried = [with_settings(index, lexical={**index.header["lexical"], "weight": weight}) for weight in WEIGHTS]
    hits, losses = measure(index, label_ids, len(tried), lambda chunk: (fuse(one, part(found, chunk)) for one in tried))
    return float(WEIGHTS[np.lexsort((losses, -hits))[0]])


def best_head(index: SearchIndex, found: Found, label_ids: np.ndarray) -> tuple[SearchIndex, dict[str, float]]:
    """The index with the head of least NLL, and its weight beside the vote and the characters of most right answers, then of
    least NLL.

    Returns (index, {"head": accuracy of the head alone}).
    """
    tried: list[tuple[Head, float]] = []
    for strength in STRENGTHS:
        tried.append((fit_head(index, strength, tried[-1][0] if tried else None), strength))
    grid = [(head, strength, temperature) for head, strength in tried for temperature in HEAD_TEMPERATURES]
    settings = [(1.0, *choice) for choice in grid]
    hits, losses = measure_heads(index, found, label_ids, settings)
    best = grid[losses.argmin()]  # not by hits: among so many a few more are chance
    alone = float(hits[losses.argmin()] / len(label_ids))
    hits, losses = measure_heads(index, found, label_ids, [(float(weight), *best) for weight in WEIGHTS])
    weight = float(WEIGHTS[np.lexsort((losses, -hits))[0]])
    head, strength, temperature = best
    entry = {"weight": weight, "temperature": temperature, "strength": strength}
    return with_settings(index, head=entry)._replace(head=head), {"head": alone}


def measure_heads(index: SearchIndex, found: Found, label_ids: np.ndarray,
                  choices: list[tuple[float, Head, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """`measure` of heads. choices: (weight, head, its strength, temperature); index: without a head."""
    def try_all(chunk: slice) -> Iterator[np.ndarray]:
        probs = fuse(index, part(found, chunk))
        return (join_head(head, probs, head_probs(head, found.vectors[chunk], temperature), weight)
                for weight, head, _, temperature in choices)

    return measure(index, label_ids, len(choices), try_all)


def best_least_rows(index: SearchIndex, found: Found, label_ids: np.ndarray) -> int:
    """The least_rows of the vote with which labels are found best of which the index has only FEW texts.

    Each of TRIED_LABELS labels in turn is cut to FEW rows. Of the settings that cost the texts of the other labels at most
    MOST_LOSS of their accuracy, and dev texts with the whole index nothing, the one that finds most of the cut labels' texts.
    """
    counts = index.rows_per_label()
    tried = np.flatnonzero((counts >= MANY) & (np.bincount(label_ids, minlength=len(counts)) >= FEW))
    if index.header["corpus"] != "texts" or not len(tried):
        return 0
    settings = [{**index.header["vote"], "least_rows": least} for least in LEAST_ROWS]
    generator, scores = np.random.default_rng(0), []
    for label in tried[::-(-len(tried) // TRIED_LABELS)]:
        cut = cut_rows(index, found, draw_gone(index, [label], generator))
        own = label_ids == label
        few = np.where(np.arange(len(counts)) == label, FEW, counts)
        is_right = [guess(with_settings(index, few, vote=setting), cut) == label_ids for setting in settings]
        scores.append([(right[own].mean(), right[~own].mean()) for right in is_right])
    whole = [(guess(with_settings(index, vote=setting), found) == label_ids).mean() for setting in settings]
    return LEAST_ROWS[best_for_few(scores, whole, MOST_LOSS)]


def best_for_few(scores: list[list[tuple[float, float]]], whole: list[float], most_loss: float) -> int:
    """The number of the setting that finds most texts of cut labels, among those that cost the others at most most_loss of their
    accuracy, and dev texts with the whole index nothing, both compared with setting 0.

    scores: of each cut, of each setting: (accuracy of the cut labels' texts, of the others'); whole: of each setting.
    """
    cut_found, others_found = np.mean(scores, axis=0).T
    allowed = (others_found >= others_found[0] - most_loss) & (np.array(whole) >= whole[0])
    return int(np.argmax(np.where(allowed, cut_found, -1)))


def draw_gone(index: SearchIndex, labels: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Draw FEW rows of each of some labels. Returns the others of these labels, as if they were not there: bool [num_rows]."""
    is_gone = np.isin(index.row_labels, labels)
    for label in labels:
        is_gone[generator.choice(np.flatnonzero(index.row_labels == label), FEW, replace=False)] = False
    return is_gone


def cut_rows(index: SearchIndex, found: Found, is_gone: np.ndarray) -> Found:
    """Found without some rows. is_gone: bool [num_rows], of the index."""
    arrays = []
    for similarities, rows in (found[:2], found[2:4]):
        gone = is_gone[rows] & (rows >= 0)
        order = np.argsort(gone, axis=1, kind="stable")
        arrays += [np.take_along_axis(np.where(gone, -np.inf, similarities), order, axis=1),
                   np.take_along_axis(np.where(gone, -1, rows), order, axis=1)]
    return found._replace(**dict(zip(Found._fields, arrays)))


def best_for_new(index: SearchIndex, found: Found, label_ids: np.ndarray, cost: float) -> Optional[dict]:
    """The entry of the head with the bias and weight by which labels are found best of which the index has only FEW texts; None
    where the head has no weight with them either.

    GROUPS groups of labels in turn are cut to FEW rows each, and the head is fitted to what is left, as if these labels had been
    added. Of the settings that cost the texts of the other labels at most `cost` of their accuracy (with more new labels they
    lose more), and dev texts with the whole index nothing, the one that finds most of the cut labels' texts.
    """
    assert index.head is not None
    counts, entry, generator = index.rows_per_label(), index.header["head"], np.random.default_rng(0)
    entry = {**entry, "new_label_cost": cost}
    choices = [{**entry, "few_weight": weight, "few_bias": float(bias)}
               for weight in (entry["weight"], *FEW_WEIGHTS) for bias in (BIASES if weight else [0.0])]
    tried = generator.permutation(np.flatnonzero((counts >= MANY) & (np.bincount(label_ids, minlength=len(counts)) > 0)))
    size = max(1, len(counts) // GROUP_SHARE)
    scores = []
    for start in range(0, min(GROUPS * size, len(tried)), size):
        group = tried[start:start + size].tolist()
        is_gone = draw_gone(index, group, generator)
        is_old = ~np.isin(index.head.labels, group)
        old = Head(*(array[is_old] for array in index.head))
        head = fit_head(index._replace(row_labels=np.where(is_gone, -1, index.row_labels)), entry["strength"], old)
        cut, few = cut_rows(index, found, is_gone), np.where(np.isin(np.arange(len(counts)), group), FEW, counts)
        own = np.isin(label_ids, group)
        is_right = [guess(with_settings(index, few, head=choice)._replace(head=head), cut) == label_ids for choice in choices]
        scores.append([(right[own].mean(), right[~own].mean()) for right in is_right])
    best = choices[0]
    if scores:
        whole = [(guess(with_settings(index, head=choice), found) == label_ids).mean() for choice in choices]
        best = choices[best_for_few(scores, whole, cost)]
    return best if best["weight"] or best["few_weight"] else None


def guess(index: SearchIndex, found: Found) -> np.ndarray:
    """The best labels: int64 [num_texts]."""
    return np.concatenate([fuse(index, part(found, chunk)).argmax(axis=1) for chunk in chunks(index, len(found.rows))])


def best_sharpness(index: SearchIndex, found: Found, label_ids: np.ndarray) -> tuple[float, float]:
    """The exponent of the probabilities with the least NLL: (exponent, mean NLL in nats)."""
    def try_all(chunk: slice) -> Iterator[np.ndarray]:
        probs = fuse(index, part(found, chunk))
        return (sharpen(probs, sharpness) for sharpness in SHARPNESS)

    _, losses = measure(index, label_ids, len(SHARPNESS), try_all)
    return SHARPNESS[losses.argmin()], float(losses.min() / len(label_ids))


def measure(index: SearchIndex, label_ids: np.ndarray, num_choices: int,
            try_all: Callable[[slice], Iterator[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Count the right answers and sum the NLL of each of some choices: float [num_choices] both.

    try_all: function of a chunk of the texts that yields their probabilities by each choice.
    """
    hits, losses = np.zeros((2, num_choices))
    for chunk in chunks(index, len(label_ids)):
        right = label_ids[chunk]
        for choice, probs in enumerate(try_all(chunk)):
            hits[choice] += (probs.argmax(axis=1) == right).sum()
            losses[choice] -= np.log(np.maximum(probs[np.arange(len(right)), right], LEAST)).sum()
    return hits, losses
