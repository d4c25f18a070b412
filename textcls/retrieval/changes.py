"""Index folders written and changed: new segments, labels added, removed, renamed. Needs no Paddle.

index.json names everything else by random names and is replaced as the last step of each change: whenever a process may be
killed, the old or the new index opens, and who has the old one open keeps it. Rows are never changed. A removed label's rows
stay in the files and are skipped, since its id is no longer in index.json; the next build leaves them out.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Optional

import numpy as np

from textcls.common.errors import Problems, UserError, did_you_mean
from textcls.common.outputs import complete_file, named_in_errors
from textcls.common.texts import LABEL, LINE, TEXT
from textcls.data.files import read_json, read_lines
from textcls.retrieval.head import Head
from textcls.retrieval.index import (
    FORMAT,
    MARKER,
    PARTS,
    SearchIndex,
    Segment,
    Stamp,
    assemble,
    index_stamp,
    label_word,
    of_single_texts,
    open_index,
)
from textcls.retrieval.lexical import Idf, count_terms, idf_of_rows, make_postings, mix, postings_row, split_postings, weigh
from textcls.retrieval.nearest import TYPES, WantedType, build_approximate
from textcls.retrieval.pending import Pending, check_letters, is_pending, no_changes, note_name, note_texts, settle
from textcls.runtime.predictions import check_decided

MOST_SEGMENTS, SMALL_ROWS = 16, 1000  # beyond so many segments, those of so few rows are joined
BLOCK = 16384  # rows converted at a time


class OutdatedIndex(Exception):
    """Another process has changed what a change was prepared for: prepare it again."""


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


def new_header(encoder_id: str, dimension: int, corpus: str, labels: list[tuple[str, list[str]]], dtype: str = "float32",
               prefixes: tuple[str, str] = ("", "")) -> dict:
    """The index.json of a new index, with the settings that hold where no dev texts say better.

    labels: list of (name, descriptions and synonyms). prefixes: what was put before the texts that are asked about, and before
    those of the rows.
    """
    entries = [{"id": number, "name": name, "texts": texts} for number, (name, texts) in enumerate(labels)]
    return {"format": FORMAT, "encoder_id": encoder_id, "dimension": dimension, "metric": "cosine", "dtype": dtype,
            "prefixes": dict(zip(("query", "text"), prefixes)), "corpus": corpus, "labels": entries, "next_id": len(labels),
            "segments": [],
            **dict.fromkeys(TYPES), "vote": {"neighbours": 20, "temperature": 0.05, "sharpness": 1.0, "least_rows": 20},
            "lexical": {"weight": 0.3, "neighbours": 20, "temperature": 0.1}, "known": None, "head": None,
            "threshold": None, "pending": no_changes()}


def memory_index(header: dict, rows: NewRows) -> SearchIndex:
    """An index of NewRows that is in no folder yet: SearchIndex. header: of `new_header`."""
    return assemble("", header, None, [make_segment(rows, None)])


def read_pending(folder: str) -> Optional[Pending]:
    """The changes since the index in a folder was built, those of none where there is no index, None where they are not known."""
    path = os.path.join(folder, MARKER)
    header = read_json(path) if os.path.exists(path) else {}
    pending = header.get("pending", None if header.get("changed") else no_changes())
    if not is_pending(pending):
        raise UserError(f"{path}: pending is damaged, expected what index.py wrote")
    return pending


def write_index(folder: str, index: SearchIndex, wanted: Optional[WantedType] = None,
                pending: Optional[Pending] = None) -> dict:
    """Write a `memory_index` into a folder, in place of what index may be there. wanted: of `wanted_type`.

    Returns its index.json. pending: what the index was made in view of; UserError where the folder has another one by now.
    """
    with changing(folder):
        if pending is not None and read_pending(folder) != pending:
            raise UserError(f"{folder}: was changed by index.py meanwhile, which the new index would lack, expected the same "
                            "command again")
        header = {**index.header, "segments": [write_segment(folder, index.header, index.segments[0])]}
        if index.head is not None:
            header["head"] = {**header["head"], "folder": write_head(folder, header, index.head)}
        if wanted is not None and len(index.row_labels) > wanted.beyond:
            header[wanted.name] = build_approximate(folder, index, wanted)
        return write_header(folder, header, changed=header["pending"] != no_changes())


@contextlib.contextmanager
def settling(index: SearchIndex) -> Iterator[None]:
    """Note that the block has written the changes of an index into the data files, which no other process can change meanwhile.

    OutdatedIndex where it has changed since it was opened.
    """
    with changing(index.folder):
        if index_stamp(index.folder) != index.stamp:
            raise OutdatedIndex
        yield
        write_header(index.folder, {**index.header, "pending": settle(index.header["pending"])},
                     index.header.get("changed", False))


def replace_index(folder: str, source: str, seen: Stamp, kept: str) -> dict:
    """Put the index of the folder source in place of the one in folder, of which a copy goes to the folder kept.

    seen: stamp of the index to replace; OutdatedIndex where it has changed since. Returns the new index.json.
    """
    with changing(folder):
        if index_stamp(folder) != seen:
            raise OutdatedIndex
        copy_files(folder, kept)
        header = open_index(source).header
        for name in parts(header) - parts(open_index(folder, to_search=False).header):  # what is in use is never written over
            path, target = os.path.join(source, name), os.path.join(folder, name)
            if os.path.isdir(path):
                shutil.copytree(path, target, dirs_exist_ok=True)  # a killed process may have begun it
            else:
                shutil.copyfile(path, target)
        return write_header(folder, header, header["changed"])


def copy_index(folder: str, copy: str) -> Stamp:
    """Copy an index to a folder, in place of what is there. Returns its stamp. UserError."""
    with changing(folder):
        stamp = index_stamp(folder)
        copy_files(folder, copy)
    return stamp


def copy_files(folder: str, copy: str) -> None:
    """Copy an index, which no other process may change meanwhile; the copy appears when it is complete."""
    part = f"{copy}.part"
    for path in (part, copy):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns(".*"))
    os.replace(part, copy)


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


def write_segment(folder: str, header: dict, segment: Segment) -> dict:
    """Write a Segment of float32 as a new folder; returns its entry of index.json. header: says the dtype and the corpus."""
    name, dtype = f"segment-{secrets.token_hex(8)}", header["dtype"]
    path = os.path.join(folder, name)
    os.mkdir(path)
    arrays = {**{name: getattr(segment, name) for name in ("label_ids", "sum_ids", "sums", "text_offsets")},
              **{f"lexical_{part}": values for part, values in segment.postings._asdict().items()}}
    if header["corpus"] == "means":
        arrays.update(counts=segment.counts.astype(np.int32), lengths=segment.lengths.astype(np.float32))
    scales = (np.abs(segment.vectors).max(axis=1) / 127).astype(np.float32)
    if dtype == "int8":
        arrays["scales"] = scales
    for array, values in arrays.items():
        np.save(os.path.join(path, f"{array}.npy"), values)
    vectors = np.lib.format.open_memmap(os.path.join(path, "vectors.npy"), "w+", dtype, segment.vectors.shape)
    for start in range(0, len(vectors), BLOCK):
        block = segment.vectors[start:start + BLOCK]
        if dtype == "int8":
            block = np.rint(block / np.maximum(scales[start:start + BLOCK, None], 1e-30))
        vectors[start:start + BLOCK] = block
    vectors.flush()
    text_path = os.path.join(path, "texts.txt")
    with named_in_errors(text_path), open(text_path, "wb") as file:  # NumPy's tofile loses the end on a full disk without a word
        file.write(segment.text_bytes.data)
    return {"folder": name, "rows": len(segment.label_ids)}


def write_head(folder: str, header: dict, head: Head) -> str:
    """Write a head as a new folder; returns its name. header: says the labels' ids. UserError where it came to nothing."""
    if not (np.isfinite(head.weights).all() and np.isfinite(head.offsets).all()):
        raise UserError(f"{folder}: the head did not converge, and is as it was, expected finite weights, or an index without "
                        "one (build_index.py --head off)")
    name = f"head-{secrets.token_hex(8)}"
    os.mkdir(os.path.join(folder, name))
    ids = np.array([entry["id"] for entry in header["labels"]], np.int32)
    for array, values in (("labels", ids[head.labels]), ("weights", head.weights), ("offsets", head.offsets)):
        np.save(os.path.join(folder, name, f"{array}.npy"), values)
    return name


def replace_head(index: SearchIndex, head: Head) -> dict:
    """Give an index folder another head, fitted to `index`; OutdatedIndex where it has changed since.

    Returns the new index.json.
    """
    with changing(index.folder):
        if index_stamp(index.folder) != index.stamp:
            raise OutdatedIndex
        header = {**index.header, "head": {**index.header["head"], "folder": write_head(index.folder, index.header, head)}}
        return write_header(index.folder, header, changed=header.get("changed", False))


def write_header(folder: str, header: dict, changed: bool = True) -> dict:
    """The last step of a change: replace index.json, then delete what it does not name. Returns the new index.json.

    changed: whether this is no longer what was built.
    """
    header = {**header, "changed": changed}
    with complete_file(os.path.join(folder, MARKER)) as file:
        file.write(json.dumps(header, ensure_ascii=False) + "\n")
    used = parts(header)
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(f".{MARKER}.") or (PARTS.match(name) and name not in used):
            with contextlib.suppress(OSError):  # Windows keeps what somebody has open: the next change tries again
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return header


def parts(header: dict) -> set[str]:
    """The names of the files and folders that an index.json names."""
    used = {entry["folder"] for entry in header["segments"]} | {header[name]["file"] for name in TYPES if header[name]}
    return used | ({header["head"]["folder"]} if header["head"] else set())


@contextlib.contextmanager
def changing(folder: str) -> Iterator[None]:
    """Keep other processes from changing the folder, which is made where it is missing."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, ".lock"), "w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}), expected a writable folder") from None
    with lock:
        with contextlib.suppress(ImportError):  # Windows has none
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


# ---- changes of a few rows


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
