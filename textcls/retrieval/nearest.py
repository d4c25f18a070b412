"""The rows nearest to queries: exact search, and approximate indexes, whose types stand in TYPES. Needs no Paddle.

An approximate index is built over segment 0, the rows that a new index begins with. What it finds is measured again by their
vectors; where it finds too few, and in rows that were added later, the search is exact.
"""

import argparse
import logging
import os
import secrets
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.common.options import positive_int

if TYPE_CHECKING:
    from textcls.retrieval.index import SearchIndex, Segment

QUERIES, ROWS = 512, 32768  # of a block of similarities, 64 MiB
SAME = 1e-6  # similarities that are closer count as equal: the order of sums in a matrix product changes the last bits
MOST_EXACT = 100_000  # rows that are searched exactly where nobody says otherwise
OVERSAMPLING = 2  # an approximate index has vectors of its own, less exact: so many times the wanted rows are measured again
WIDENING, ENOUGH_RECALL = (1, 2, 2, 2, 2), 0.99  # its expansion is multiplied until recall@10 is enough
BLOCK = 16384  # rows added at a time
logger = logging.getLogger("textcls")  # without a handler: in a server it goes to the server's log


# ---- approximate indexes


class Hnsw:
    """The graph of Malkov and Yashunin (2016, arXiv:1603.09320) by usearch. Another type has the same attributes and methods."""

    suffix = ".usearch"  # of its file
    settings = ("connectivity", "expansion")  # numbers in index.json; expansion: how many rows a search looks at, at least
    hint = "larger --hnsw_m and --hnsw_ef find more"

    def __init__(self, dimension: int, settings: dict[str, int]) -> None:
        """An empty one. ImportError where its package is missing."""
        from usearch.index import Index

        self.expansion = settings["expansion"]
        # Any: the setter of expansion_search stands where mypy does not look
        self._index: Any = Index(ndim=dimension, metric="cos", dtype="i8", connectivity=settings["connectivity"],
                                 expansion_add=self.expansion, expansion_search=self.expansion)
        self._lock = threading.Lock()  # usearch's searches share their scratch memory

    def __len__(self) -> int:
        return len(self._index)

    def add(self, first: int, vectors: np.ndarray, threads: int) -> None:
        """Add rows. first: the number of the first one; vectors: float32 [num_rows, dimension], unit length; threads: 0: all."""
        self._index.add(np.arange(first, first + len(vectors)), vectors, threads=threads)

    def save(self, path: str) -> None:
        self._index.save(path)

    def open(self, path: str) -> None:
        """Map the file that `save` wrote. Any exception where it is damaged."""
        self._index.view(path)

    def search(self, queries: np.ndarray, count: int) -> Optional[np.ndarray]:
        """About the nearest rows, in any order: int64 [num_queries, count]; None where the graph does not reach so many."""
        with self._lock:
            self._index.expansion_search = count
            keys = np.asarray(self._index.search(queries, count).keys).astype(np.int64)
        return keys.reshape(len(queries), count) if keys.size == len(queries) * count else None


Approximate = Hnsw  # of several types their Union
TYPES = {"hnsw": Hnsw}  # by the name of the entry in index.json and of its options


class WantedType(NamedTuple):
    """An approximate index that is to be built."""

    name: str  # of TYPES
    settings: dict[str, int]
    beyond: int = 0  # so many rows are searched exactly


def add_type_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which approximate index is built."""
    parser.add_argument("--hnsw", choices=["auto", "on", "off"], default="auto", help=f"auto: beyond {MOST_EXACT} rows")
    parser.add_argument("--hnsw_m", type=positive_int, default=16, help="HNSW: edges per row, 2 or more")
    parser.add_argument("--hnsw_ef", type=positive_int, default=64, help="HNSW: rows looked at while one is added or searched")


def wanted_type(args: argparse.Namespace) -> Optional[WantedType]:
    """The type that the options of `add_type_options` name, or None: exact search. UserError."""
    if args.hnsw_m < 2:
        raise UserError(f"--hnsw_m {args.hnsw_m}: expected 2 or more")
    if args.hnsw == "off":
        return None
    return WantedType("hnsw", {"connectivity": args.hnsw_m, "expansion": args.hnsw_ef}, 0 if args.hnsw == "on" else MOST_EXACT)


def build_approximate(folder: str, index: "SearchIndex", wanted: WantedType) -> Optional[dict]:
    """Build an approximate index over segment 0 and save it in the folder. Returns its entry of index.json.

    None where it finds too little, which the log says. UserError where its package is missing.
    """
    name = wanted.name.upper()
    for threads in (0, 1):  # rows that usearch 2.23 adds at the same time may lose each other: recall 0.98 to 1, by chance
        entry = save_approximate(folder, index, wanted, threads)
        get_logger().info(f"{name}: recall@10 against exact search {entry['recall']:.4f}")
        if entry["recall"] >= ENOUGH_RECALL:
            return entry
        if threads == 0:
            get_logger().info(f"{name}: too little, it is built again by one thread, which loses no rows")
    get_logger().warning(f"{name} finds too few of the nearest rows, expected {ENOUGH_RECALL} or more: this index is searched "
                         f"exactly; {TYPES[wanted.name].hint}.")
    return None


def save_approximate(folder: str, index: "SearchIndex", wanted: WantedType, threads: int) -> dict:
    """Build an approximate index over segment 0, widen its search until it finds enough, and save it. Returns its entry."""
    segment = index.segments[0]
    try:
        built = TYPES[wanted.name](segment.vectors.shape[1], wanted.settings)
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing, expected it for {wanted.name.upper()}, or --{wanted.name} off"
                        ) from None
    for start in range(0, len(segment.vectors), BLOCK):
        built.add(start, segment.block(start, start + BLOCK), threads)
    file = f"{wanted.name}-{secrets.token_hex(8)}{built.suffix}"
    path = os.path.join(folder, file)
    built.save(path)
    settings = dict(wanted.settings)
    for factor in WIDENING:
        settings["expansion"] *= factor
        entry: dict = {"file": file, "bytes": os.path.getsize(path), "rows": len(built), **settings}
        opened = open_approximate(folder, {**index.header, wanted.name: entry}, len(built))
        entry["recall"] = recall(index._replace(approximate=opened))
        if entry["recall"] >= ENOUGH_RECALL:
            break
    return entry


def open_approximate(folder: str, header: dict, num_rows: int) -> Optional[Approximate]:
    """The approximate index that an index.json names, or None. num_rows: of segment 0. UserError where its file is damaged."""
    name = next((name for name in TYPES if header[name]), None)
    if name is None:
        return None
    entry = header[name]
    path = os.path.join(folder, entry["file"])
    try:
        opened = TYPES[name](header["dimension"], entry)
    except ImportError as error:
        logger.warning(f"The package {error.name} is missing: the index is searched exactly, which takes longer.")
        return None
    try:
        if os.path.getsize(path) != entry["bytes"]:
            raise ValueError(f"{os.path.getsize(path)} bytes, expected {entry['bytes']}")
        opened.open(path)
        if len(opened) != num_rows:
            raise ValueError(f"{len(opened)} rows")
    except Exception as error:  # the libraries raise RuntimeError and others
        raise UserError(f"{path}: cannot be read ({error}), expected what retrieval_based/build_index.py wrote") from None
    return opened


# ---- search


def select_top(scores: np.ndarray, k: int, least: float = -np.inf) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row of scores above `least`, largest first, the lower column first among equals.

    scores: float32 [num_rows, num_columns]. Returns (values float32, columns int64), [num_rows, k]; -inf and -1 fill up.
    """
    values = np.full((len(scores), k), -np.inf, np.float32)
    columns = np.full((len(scores), k), -1, np.int64)
    floor: np.ndarray = np.full((len(scores), 1), least, np.float32)
    if k < scores.shape[1]:
        floor = np.maximum(floor, np.partition(scores, scores.shape[1] - k, axis=1)[:, -k, None] - SAME)
    row, column = np.nonzero((scores >= floor) & (scores > least))
    score = scores[row, column]
    order = np.lexsort((column, -np.rint(score / SAME), row))
    row, column, score = row[order], column[order], score[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < k
    values[row[kept], place[kept]], columns[row[kept], place[kept]] = score[kept], column[kept]
    return values, columns


def merge_top(parts: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of several results of `select_top`."""
    values, columns = (np.concatenate(arrays, axis=1) for arrays in zip(*parts))
    order = np.lexsort((columns, -np.rint(values / SAME)), axis=1)[:, :k]
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(columns, order, axis=1)


def exact_search(segment: "Segment", row_labels: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of a segment: (similarities, rows) as of `select_top`.

    row_labels: int32 [rows], -1: skip the row. queries: float32 [num_queries, dimension].
    """
    removed = row_labels < 0
    nothing: tuple[np.ndarray, np.ndarray] = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    found = [nothing]
    for start in range(0, len(row_labels), ROWS):
        block = segment.block(start, start + ROWS)
        best = []
        for first in range(0, len(queries), QUERIES):
            scores = queries[first:first + QUERIES] @ block.T
            if removed[start:start + ROWS].any():
                scores[:, removed[start:start + ROWS]] = -np.inf
            best.append(select_top(scores, k))
        values, columns = (np.concatenate(arrays) for arrays in zip(*best))
        found.append((values, np.where(columns >= 0, columns + start, -1)))
    return merge_top(found, k) if len(found) != 2 else found[1]


def approximate_search(approximate: Approximate, segment: "Segment", row_labels: np.ndarray, queries: np.ndarray, k: int
                       ) -> Optional[tuple[np.ndarray, np.ndarray]]:
    """As `exact_search`, with exact similarities, too; None where too few rows are found that are not removed."""
    count = max(OVERSAMPLING * k, approximate.expansion)
    while count < len(row_labels):
        keys = approximate.search(queries, count)
        if keys is None:
            return None  # many equal rows
        keys = np.sort(keys, axis=1)  # ties: the lower row first
        scores = np.einsum("qd,qkd->qk", queries, segment.take(keys))
        scores[row_labels[keys] < 0] = -np.inf
        if (np.isfinite(scores).sum(axis=1) >= k).all():
            values, places = select_top(scores, k)
            return values, np.take_along_axis(keys, places, axis=1)
        count *= 8
    return None


def nearest(index: "SearchIndex", queries: np.ndarray, k: int, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of an index that are not removed: (similarities float32, rows int64), [num_queries, k].

    queries: float32 [num_queries, dimension], unit length. exact: do without an approximate index.
    """
    k = min(k, len(index.row_labels))
    parts = []
    for number, (segment, start, end) in enumerate(zip(index.segments, index.starts, index.starts[1:])):
        row_labels, found = index.row_labels[start:end], None
        if number == 0 and index.approximate is not None and not exact:
            blocks = [approximate_search(index.approximate, segment, row_labels, queries[first:first + QUERIES], k)
                      for first in range(0, len(queries), QUERIES)]
            if all(block is not None for block in blocks):
                found = [np.concatenate(arrays) for arrays in zip(*blocks)]
        values, rows = found or exact_search(segment, row_labels, queries, k)
        parts.append((values, np.where(rows >= 0, rows + start, -1)))
    return merge_top(parts, k) if len(parts) > 1 else parts[0]


def recall(index: "SearchIndex", k: int = 10, samples: int = 1000) -> float:
    """Share of the k nearest rows of evenly spaced rows that the approximate index finds, 0 to 1; of rows that are as near any
    will do."""
    rows = np.arange(0, len(index.row_labels), -(-len(index.row_labels) // samples))
    queries = index.take(rows)
    exact, found = (nearest(index, queries, k, exact=exact)[0] for exact in (True, False))
    return float(np.mean(found >= exact[:, -1:] - SAME))
