"""Labels added to an index folder, removed and renamed. Needs no Paddle.

Rows are never changed. A removed label's rows stay in the files and are skipped, since its id is no longer in index.json; the
next build leaves them out.
"""

from collections.abc import Iterable, Iterator
from typing import Optional

import numpy as np

from textcls.common.errors import UserError, did_you_mean
from textcls.common.texts import LABEL
from textcls.retrieval.index import SearchIndex, label_word, open_index
from textcls.retrieval.lexical import mix, postings_row, weigh
from textcls.retrieval.pending import check_letters, note_name, note_texts
from textcls.retrieval.rows import (
    NewRows,
    join_rows,
    label_texts,
    make_segment,
    rows_of_means,
    rows_of_texts,
    segment_rows,
    weigh_rows,
)
from textcls.retrieval.writing import OutdatedIndex, changing, write_header, write_segment
from textcls.runtime.predictions import check_decided

MOST_SEGMENTS, SMALL_ROWS = 16, 1000  # beyond so many segments, those of so few rows are joined


def find_label(index: SearchIndex, name: str) -> dict:
    """The entry of a label in index.json. UserError where there is none."""
    entry = find_entry(index.header, name)
    if entry is not None:
        return entry
    hint = did_you_mean(name, index.labels)
    raise UserError(f"{index.folder}: no label {name!r}{hint}, expected one of its {len(index.labels)} labels")


def check_new_label(name: str, labels: Iterable[str] = ()) -> None:
    """UserError where this cannot be the name of a label, or is one of labels in other letters."""
    if problem := LABEL.problem(name):
        raise UserError(f"label {name!r}: {problem}, expected {LABEL.expected}")
    check_decided(name)
    check_letters(name, labels)


def find_entry(header: dict, name: str) -> Optional[dict]:
    """The entry of a label in an index.json, or None."""
    return next((entry for entry in header["labels"] if entry["name"] == name), None)


def check_unchanged(index: SearchIndex, seen: Optional[dict], name: str) -> None:
    """OutdatedIndex where encoder, prefixes, corpus or the label are others than in `seen`, an earlier index.json, or None."""
    def decisive(header: dict) -> tuple:
        return header["encoder_id"], header["prefixes"], header["corpus"], find_entry(header, name)

    if seen is not None and decisive(index.header) != decisive(seen):
        raise OutdatedIndex


def add_texts(folder: str, name: str, texts: list[str], vectors: np.ndarray, *, describes: bool = False,
              seen: Optional[dict] = None) -> tuple[dict, int]:
    """Add texts (list of str, vectors float32 [num_texts, dimension] of unit length) to a label, which may be a new one.

    Texts that the label has already are not added again. describes: keep the texts as descriptions of the label, too. seen: the
    index.json that this was decided by; OutdatedIndex where it does not hold any more. Returns (the new index.json, the number
    of texts that were there). UserError.
    """
    with changing(folder):
        index = open_index(folder, dimension=vectors.shape[1], to_search=False)
        check_unchanged(index, seen, name)
        header, labels = dict(index.header), [dict(entry) for entry in index.header["labels"]]
        entry = find_entry({"labels": labels}, name)
        is_new = entry is None
        if entry is None:
            check_new_label(name, index.labels)
            entry = {"id": header["next_id"], "name": name, "texts": []}
            labels.append(entry)
            header["next_id"] += 1
        words = []
        if describes or header["corpus"] == "labels":
            words = [text for text in dict.fromkeys(texts) if text not in (label_word(name), *entry["texts"])]
        entry["texts"] = [*entry["texts"], *words]
        known = texts_of_label(index, entry)
        new = [number for number, text in enumerate(texts) if text not in known]
        header["labels"], there = labels, len(texts) - len(new)
        own = words if header["corpus"] == "labels" else [texts[number] for number in new]
        header["pending"] = note_texts(header["pending"], name, is_new, own, words)
        if not new:
            return write_header(folder, header) if header != index.header else header, there
        texts, vectors = [texts[number] for number in new], vectors[new]
        rows = rows_of_texts(vectors, [entry["id"]] * len(texts), texts)
        if header["corpus"] == "means":
            entry["added"] = [*entry.get("added", []), *texts]
            rows = renew_mean(index, entry, rows_of_means(vectors, rows.label_ids, texts))
            if rows.label_ids[0] != entry["id"]:
                entry["id"] = int(rows.label_ids[0])
                header["next_id"] = entry["id"] + 1
        return append_rows(index, header, rows), there


def texts_of_label(index: SearchIndex, entry: dict) -> set[str]:
    """The texts of a label's rows: set of str. Of means, which hold no single texts, those added since the build."""
    if index.header["corpus"] == "means":
        return set(entry.get("added", []))
    return {segment.text(row) for segment in index.segments for row in np.flatnonzero(segment.label_ids == entry["id"]).tolist()}


def renew_mean(index: SearchIndex, entry: dict, rows: NewRows) -> NewRows:
    """The mean of a label's old and new texts, under a new id, so that its old row is skipped. rows: mean of the new ones."""
    terms, counts = rows.terms[0]
    weighted = [(terms, weigh(terms, counts, index.idf))]
    for segment in reversed(index.segments):
        for row in np.flatnonzero(segment.label_ids == entry["id"]).tolist():
            old, new = int(segment.counts[row]), int(rows.counts[0])
            total = segment.take(row) * segment.lengths[row] * old + rows.vectors[0] * rows.lengths[0] * new
            length = max(float(np.linalg.norm(total)), 1e-12)
            weighted = [mix(postings_row(segment.postings, row), old, weighted[0], new)]
            return NewRows((total / length)[None], np.array([index.header["next_id"]]), [segment.text(row)], weighted,
                           np.array([old + new]), np.array([length / (old + new)]), True)
    return rows._replace(terms=weighted, terms_are_weighted=True)


def remove_label(folder: str, name: str) -> dict:
    """Take a label out of the index. Returns the new index.json. UserError."""
    with changing(folder):
        index = open_index(folder, to_search=False)
        entry = find_label(index, name)
        if len(index.labels) <= 2:
            raise UserError(f"{folder}: only two labels are left, expected at least three to remove {name!r}")
        labels = [other for other in index.header["labels"] if other is not entry]
        pending = note_name(index.header["pending"], name, None)
        return write_header(folder, {**index.header, "labels": labels, "pending": pending})


def rename_label(folder: str, name: str, new_name: str, vectors: Optional[np.ndarray] = None, *,
                 seen: Optional[dict] = None) -> dict:
    """Give a label another name. vectors: where the corpus is the labels', those of its `label_texts` under the new name.

    seen: as of `add_texts`. Returns the new index.json. UserError.
    """
    with changing(folder):
        index = open_index(folder, to_search=False)
        check_unchanged(index, seen, name)
        entry = find_label(index, name)
        check_new_label(new_name, [label for label in index.labels if label != name])
        if new_name in index.labels:
            raise UserError(f"{folder}: has a label {new_name!r} already, expected a new name")
        header = {**index.header, "pending": note_name(index.header["pending"], name, new_name)}
        new = {**entry, "name": new_name}
        if header["corpus"] == "labels":
            new["id"] = header["next_id"]  # so that the rows of the old name are skipped
            header["next_id"] += 1
        header["labels"] = [new if other is entry else other for other in header["labels"]]
        if vectors is not None:
            texts = label_texts(new_name, entry["texts"])
            return append_rows(index, header, rows_of_texts(vectors, [new["id"]] * len(texts), texts))
        return write_header(folder, header)


def labels_of_texts(index: SearchIndex, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The labels that hold texts already: iterator of (text, label). Of means, only what is known of single texts."""
    lengths = [np.diff(segment.text_offsets) for segment in index.segments]
    for text in texts:
        wanted = np.frombuffer(text.encode("utf-8"), np.uint8)
        for segment, first, sizes in zip(index.segments, index.starts, lengths):
            rows = np.flatnonzero((sizes == len(wanted)) & (segment.counts == 1))
            same = (segment.text_bytes[segment.text_offsets[rows, None] + np.arange(len(wanted))] == wanted).all(axis=1)
            yield from ((text, index.labels[label]) for label in index.row_labels[first + rows[same]] if label >= 0)
        yield from ((text, entry["name"]) for entry in index.header["labels"] if text in entry.get("added", []))


def append_rows(index: SearchIndex, header: dict, rows: NewRows) -> dict:
    """Write NewRows as a further segment of an index, together with the small ones if there are many.
    Returns the new index.json."""
    segments = header["segments"]
    small = [number for number in range(1, len(segments)) if segments[number]["rows"] <= SMALL_ROWS]
    if len(segments) > MOST_SEGMENTS and len(small) > 1:
        ids = [entry["id"] for entry in header["labels"]]
        rows = join_rows([segment_rows(index.segments[number], ids) for number in small] + [weigh_rows(rows, index.idf)])
        segments = [entry for number, entry in enumerate(segments) if number not in small]
    header["segments"] = [*segments, write_segment(index.folder, header, make_segment(rows, index.idf))]
    return write_header(index.folder, header)
