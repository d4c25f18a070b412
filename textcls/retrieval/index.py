"""The index folder: labels, vectors and texts that are searched, opened by memory map. Needs no Paddle.

textcls/retrieval/writing.py and changes.py write and change it; an opened index never changes.
"""

import functools
import os
import re
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np

from textcls.common.errors import UserError
from textcls.data.files import read_json
from textcls.retrieval.head import Head, few_shares
from textcls.retrieval.lexical import Idf, Postings, idf_of_postings
from textcls.retrieval.nearest import TYPES, Approximate, open_approximate
from textcls.retrieval.pending import is_pending, no_changes

FORMAT = 3
MARKER = "index.json"
CORPORA = ("labels", "texts", "means")  # what a row is: a text of a label, a training text, the mean of a label's texts
DTYPES = ("float32", "float16", "int8")
PARTS = re.compile(rf"({'|'.join(['segment', 'head', *TYPES])})-[0-9a-f]{{16}}(\.\w+)?$")  # the names that may be deleted
Stamp = tuple[int, int, int]  # of an index.json: inode, time of its change in nanoseconds, size


class Segment(NamedTuple):
    """Rows that were written together."""

    vectors: np.ndarray  # float32, float16 or int8 [rows, dimension], unit length
    scales: Optional[np.ndarray]  # float32 [rows], of int8 vectors
    label_ids: np.ndarray  # int32 [rows]
    sum_ids: np.ndarray  # int32 [labels of these rows]: label ids, rising
    sums: np.ndarray  # float32 [labels of these rows, dimension]: of each one's vectors
    text_bytes: np.ndarray  # uint8: UTF-8 of all texts
    text_offsets: np.ndarray  # int64 [rows + 1]
    postings: Postings
    counts: np.ndarray  # int32 [rows], of means: how many texts; else 1
    lengths: np.ndarray  # float32 [rows], of means: length of the mean before it was made 1; else 1

    def block(self, start: int, end: int) -> np.ndarray:
        """The vectors of rows start to end: float32 [rows, dimension]."""
        rows = np.asarray(self.vectors[start:end])
        return rows if self.scales is None and rows.dtype == np.float32 else self._floats(rows, slice(start, end))

    def take(self, rows: Union[int, np.ndarray]) -> np.ndarray:
        """The vectors of these rows: float32 [..., dimension]. rows: int [...]"""
        return self._floats(np.asarray(self.vectors[rows]), rows)

    def text(self, row: int) -> str:
        return self.text_bytes[self.text_offsets[row]:self.text_offsets[row + 1]].tobytes().decode("utf-8", "replace")

    def _floats(self, values: np.ndarray, rows: Union[int, np.ndarray, slice]) -> np.ndarray:
        values = values.astype(np.float32)
        return values if self.scales is None else values * self.scales[rows][..., None]


class SearchIndex(NamedTuple):
    """An opened index folder. Never changes."""

    folder: str
    header: dict  # index.json
    stamp: Optional[Stamp]  # of index.json; None: in memory only
    labels: list[str]
    segments: list[Segment]
    starts: np.ndarray  # int64 [num_segments + 1]: the number of each segment's first row
    row_labels: np.ndarray  # int32 [num_rows]: position in labels, -1 where the label was removed
    boosts: np.ndarray  # float32 [num_labels]: how many votes a row of a label has, see `label_boosts`
    mean: np.ndarray  # float32 [dimension]: of all rows; empty, as centres is, where the index was not opened to search
    centres: np.ndarray  # float32 [num_labels, dimension]: labels' means less that of all, at unit length; 0: no rows
    idf: Idf
    approximate: Optional[Approximate]  # of nearest.TYPES, over segment 0
    head: Optional[Head]
    few: np.ndarray  # float32 [num_labels]: how far each counts as one of few texts, see `few_shares`

    def text(self, row: int) -> str:
        """The text of a row: of a mean, the one that is nearest to it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[number].text(row - self.starts[number])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of rows: float32 [num_rows, dimension]. rows: int64 [num_rows]."""
        vectors = np.zeros((len(rows), self.header["dimension"]), np.float32)
        for segment, start, end in zip(self.segments, self.starts, self.starts[1:]):
            inside = (rows >= start) & (rows < end)
            if inside.any():
                vectors[inside] = segment.take(rows[inside] - start)
        return vectors

    def rows_per_label(self) -> np.ndarray:
        """How many texts stand for each label: int64 [num_labels]."""
        counts, known = np.concatenate([segment.counts for segment in self.segments]), self.row_labels >= 0
        return np.bincount(self.row_labels[known], counts[known], len(self.labels)).astype(np.int64)


def label_word(name: str) -> str:
    """The text that stands for a label: its name, or what follows the last ##."""
    return name.rpartition("##")[2]


def index_stamp(folder: str) -> Stamp:
    """What changes whenever the index does. UserError where there is none."""
    try:
        stat = os.stat(os.path.join(folder, MARKER))
    except OSError:
        raise UserError(f"{folder}: no index here ({MARKER} is missing), expected a folder that "
                        "retrieval_based/build_index.py wrote") from None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def open_index(folder: str, encoder_id: Optional[str] = None, dimension: Optional[int] = None, *,
               to_search: bool = True) -> SearchIndex:
    """Open an index folder; returns SearchIndex. encoder_id, dimension: of the encoder that it must be of, None: any.

    to_search: False: who does not search needs no approximate index, no head, no centres of labels. UserError where there is no
    index, it is damaged or of another encoder.
    """
    while True:
        stamp = index_stamp(folder)
        header = read_json(os.path.join(folder, MARKER))
        for name in TYPES:
            header.setdefault(name)  # an older index has no entry of a newer type
        header.setdefault("prefixes", {"query": "", "text": ""})
        header.setdefault("head")
        header.setdefault("pending", None if header.get("changed") else no_changes())
        check_header(header, os.path.join(folder, MARKER))
        check_encoder(folder, header, encoder_id, dimension)
        try:
            segments = [open_segment(folder, header, entry) for entry in header["segments"]]
            approximate = open_approximate(folder, header, header["segments"][0]["rows"]) if to_search else None
            head = open_head(folder, header) if to_search else None
            break
        except UserError:
            if index_stamp(folder) == stamp:
                raise  # else it was replaced just now, and its files are gone
    return assemble(folder, header, stamp, segments, approximate, head, to_search=to_search)


def check_encoder(folder: str, header: dict, encoder_id: Optional[str] = None, dimension: Optional[int] = None) -> None:
    """UserError where an index is of another encoder. header: its index.json; None: not known."""
    if encoder_id is not None and header["encoder_id"] != encoder_id:
        raise UserError(f"{folder}: made with the encoder {header['encoder_id']}, this one is {encoder_id}, expected the "
                        "encoder of the index (read with the same --pooling), or a new index (retrieval_based/build_index.py)")
    if dimension is not None and header["dimension"] != dimension:
        raise UserError(f"{folder}: vectors of {header['dimension']} numbers, the encoder's have {dimension}, expected the "
                        "encoder of the index")


def check_prefixes(folder: str, header: dict, query: Optional[str], text: Optional[str]) -> None:
    """UserError where --query_prefix or --text_prefix is not that of an index. query, text: None where it was not given."""
    for name, given in (("query", query), ("text", text)):
        own = header["prefixes"][name]
        if given not in (None, own):
            raise UserError(f"--{name}_prefix {given!r}: {folder} was made with {own!r}, expected that, a run without the "
                            "option, or a new index (retrieval_based/build_index.py)")


def assemble(folder: str, header: dict, stamp: Optional[Stamp], segments: list[Segment],
             approximate: Optional[Approximate] = None, head: Optional[Head] = None, *, to_search: bool = True) -> SearchIndex:
    """The SearchIndex of its parts. head: with label ids, as of `open_head`."""
    positions = np.full(header["next_id"] + 1, -1, np.int32)
    for position, entry in enumerate(header["labels"]):
        positions[entry["id"]] = position
    row_labels = positions[np.concatenate([segment.label_ids for segment in segments])]
    starts = np.concatenate([[0], np.cumsum([len(segment.label_ids) for segment in segments])])
    labels = [entry["name"] for entry in header["labels"]]
    counts = np.bincount(row_labels[row_labels >= 0], minlength=len(labels))
    boosts = label_boosts(header, counts)
    mean, centres = label_centres(segments, positions, counts) if to_search else (np.zeros(0), np.zeros((0, 0)))
    idf = idf_of_postings(segments[0].postings, len(segments[0].label_ids))
    if head is not None:
        left = positions[head.labels] >= 0
        head = Head(positions[head.labels[left]], head.weights[left], head.offsets[left]) if left.any() else None
    return SearchIndex(folder, header, stamp, labels, segments, starts, row_labels, boosts, mean, centres, idf, approximate, head,
                       few_shares(counts))


def label_centres(segments: list[Segment], positions: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mean and centres of a SearchIndex. positions: of label ids, -1: removed; counts: int [num_labels], rows per label."""
    sums = np.zeros((len(counts), segments[0].sums.shape[1]), np.float32)
    for segment in segments:
        places = positions[segment.sum_ids]
        sums[places[places >= 0]] += segment.sums[places >= 0]
    mean = sums.sum(axis=0) / max(counts.sum(), 1)
    sums -= counts[:, None].astype(np.float32) * mean
    return mean, sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def label_boosts(header: dict, counts: np.ndarray) -> np.ndarray:
    """How many votes a row of each label has: a label of fewer rows than vote.least_rows votes as if it had so many.

    So that a label that was added with a few texts is heard beside those with hundreds. counts: rows per label. Only where the
    rows are texts. Returns float32 [num_labels].
    """
    least = header["vote"]["least_rows"] if header["corpus"] == "texts" else 0
    return np.maximum(1, least / np.maximum(counts, 1)).astype(np.float32)


def check_header(header: dict, path: str) -> None:
    """UserError where the content of an index.json is not what this program writes."""
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: format {header.get('format')!r}, expected {FORMAT}: another version of the program wrote it")
    checks: dict[str, Callable[[Any], object]] = {
        "encoder_id": lambda value: isinstance(value, str),
        "dimension": lambda value: _is_count(value) and value > 0,
        "metric": lambda value: value == "cosine",
        "dtype": lambda value: value in DTYPES,
        "corpus": lambda value: value in CORPORA,
        "next_id": _is_count,
        "labels": lambda value: len(value) > 1 and all(  # in one go: there may be thousands, and every change looks at them
            type(entry["id"]) is int and 0 <= entry["id"] < header["next_id"] and type(entry["name"]) is str
            and type(entry["texts"]) is list for entry in value),
        "segments": lambda value: value and all(PARTS.match(entry["folder"]) and _is_count(entry["rows"]) for entry in value),
        "vote": lambda value: _is_depth(value["neighbours"]) and value["temperature"] > 0 and value["sharpness"] > 0
        and value["least_rows"] >= 0,
        "lexical": lambda value: _is_depth(value["neighbours"]) and value["temperature"] > 0 and 0 <= value["weight"] <= 1,
        "known": lambda value: value is None or (
            len(value["weights"]) in (2, 3) and sum(value["weights"]) + value["offset"] < np.inf
            and (len(value["weights"]) == 2 or value["logit"] < np.inf)),
        "prefixes": lambda value: type(value["query"]) is type(value["text"]) is str,
        "head": lambda value: value is None or (PARTS.match(value["folder"]) and 0 <= value["weight"] <= 1
                                                and 0 < value["temperature"] < np.inf and 0 < value["strength"] < np.inf
                                                and 0 <= value.get("few_bias", 0) < np.inf
                                                and 0 <= value.get("few_weight", 0) <= 1),
        "threshold": lambda value: value is None or 0 <= value["value"] <= 1,
        "pending": is_pending,
        **{name: functools.partial(_is_approximate, kind.settings) for name, kind in TYPES.items()}}
    for name, is_sound in checks.items():
        try:
            sound = is_sound(header[name])
        except (KeyError, TypeError, AttributeError, ValueError):
            sound = False
        if not sound:
            raise UserError(f"{path}: {name} is damaged or missing, expected what retrieval_based/build_index.py wrote")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_depth(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_approximate(settings: tuple[str, ...], entry: Optional[dict]) -> bool:
    return entry is None or bool(PARTS.match(entry["file"]) and all(_is_count(entry[name]) for name in ("bytes", *settings)))


def open_segment(folder: str, header: dict, entry: dict) -> Segment:
    """The Segment of an entry of index.json. UserError where files are missing or not of the size that it says."""
    path = os.path.join(folder, entry["folder"])
    rows = entry["rows"]
    vectors = open_array(path, "vectors", header["dtype"], (rows, header["dimension"]))
    scales = open_array(path, "scales", "float32", (rows,)) if header["dtype"] == "int8" else None
    label_ids = open_array(path, "label_ids", "int32", (rows,))
    sum_ids = open_array(path, "sum_ids", "int32", (None,))
    sums = open_array(path, "sums", "float32", (len(sum_ids), header["dimension"]))
    offsets = open_array(path, "text_offsets", "int64", (rows + 1,))
    terms = open_array(path, "lexical_terms", "int64", (None,))
    starts = open_array(path, "lexical_starts", "int64", (len(terms) + 1,))
    postings = Postings(terms, starts, open_array(path, "lexical_rows", "int32", (starts[-1],)),
                        open_array(path, "lexical_weights", "float32", (starts[-1],)))
    counts, lengths = of_single_texts(rows)
    if header["corpus"] == "means":
        counts, lengths = open_array(path, "counts", "int32", (rows,)), open_array(path, "lengths", "float32", (rows,))
    text_path = os.path.join(path, "texts.txt")
    try:
        text_bytes = np.memmap(text_path, np.uint8, "r") if offsets[-1] else np.zeros(0, np.uint8)
    except (OSError, ValueError):  # the latter: empty
        text_bytes = None
    if text_bytes is None or len(text_bytes) != offsets[-1]:
        raise UserError(f"{text_path}: missing or damaged, expected {offsets[-1]} bytes")
    for name, values, limit in (("label_ids", label_ids, header["next_id"]), ("sum_ids", sum_ids, header["next_id"]),
                                ("lexical_rows", postings.rows, rows)):
        if len(values) and not (values.min() >= 0 and values.max() < limit):
            raise UserError(f"{os.path.join(path, name)}.npy: damaged, expected numbers below {limit}")
    for name, values in (("text_offsets", offsets), ("lexical_starts", starts), ("lexical_terms", terms), ("sum_ids", sum_ids)):
        if (values[1:] < values[:-1]).any():
            raise UserError(f"{os.path.join(path, name)}.npy: damaged, expected ascending numbers")
    return Segment(vectors, scales, label_ids, sum_ids, sums, text_bytes, offsets, postings, counts, lengths)


def open_head(folder: str, header: dict) -> Optional[Head]:
    """The head that an index.json names, with label ids, or None. UserError where its files are damaged."""
    if header["head"] is None:
        return None
    path = os.path.join(folder, header["head"]["folder"])
    labels = open_array(path, "labels", "int32", (None,))
    weights = open_array(path, "weights", "float32", (len(labels), header["dimension"]))
    offsets = open_array(path, "offsets", "float32", (len(labels),))
    if not len(labels) or labels.min() < 0 or labels.max() >= header["next_id"] or len(np.unique(labels)) < len(labels):
        raise UserError(f"{os.path.join(path, 'labels')}.npy: damaged, expected different numbers below {header['next_id']}")
    for name, values in (("weights", weights), ("offsets", offsets)):
        if not np.isfinite(values).all():
            raise UserError(f"{os.path.join(path, name)}.npy: damaged, expected finite numbers")
    return Head(labels, weights, offsets)


def of_single_texts(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The counts and lengths of rows each of which is one text."""
    return np.broadcast_to(np.int32(1), (num_rows,)), np.broadcast_to(np.float32(1), (num_rows,))


def open_array(folder: str, name: str, dtype: str, shape: tuple[Optional[int], ...]) -> np.ndarray:
    """Map folder/name.npy. UserError where it is not an array of this type and shape (None: any length)."""
    path = os.path.join(folder, f"{name}.npy")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        raise UserError(f"{path}: cannot be read ({reason}), expected a file that retrieval_based/build_index.py wrote") from None
    wanted = tuple(length if size is None else size for length, size in zip(values.shape, shape))
    if values.dtype != dtype or values.shape != wanted or len(shape) != values.ndim:
        raise UserError(f"{path}: {values.dtype} {list(values.shape)}, expected {dtype} {list(wanted)}")
    return np.asarray(values)
