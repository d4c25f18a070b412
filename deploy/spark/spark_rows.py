"""Labels the rows of a table with a model that was shipped: what runs in Spark's Python workers (spark_model.py sends it)."""

import functools
import hashlib
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import pyarrow as pa
from pyspark import SparkFiles, TaskContext

from textcls.common.digests import sha256
from textcls.common.errors import UserError
from textcls.common.probabilities import DECIMALS, UNDECIDED, is_decided, top_labels
from textcls.common.texts import TEXT

EXPORT, INDEX = "export", "index"  # the folders of an archive
TOP = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
ANSWER = {"label": pa.string(), "probability": pa.float64(), "top_k": TOP, "error": pa.string()}
KNOWN = {"known": pa.float64()}  # one more column, of a model that tells unknown texts
REPLACEMENT = "\ufffd"
TopLabels = Sequence[tuple[str, float]]  # (label, probability), best first


class Settings(NamedTuple):
    """A model as a worker gets it, and what is asked of it."""

    archive: str  # name of the archive's folder among the executor's files
    sha256: str  # of `folder_sha256`
    has_index: bool  # a sentence encoder with its index, in the place of a classifier
    dtype: str
    batch_size: int
    max_seq_length: Optional[int]
    top_k: int
    threshold: float
    tells_unknown: bool  # whether it says how probably a text is of a label at all
    least_known: float
    max_text_length: int  # characters
    window: int  # rows that are answered at a time, in batches of like length


def answer_kinds(settings: Settings) -> dict[str, pa.DataType]:
    """Return the columns that answers have."""
    return {**ANSWER, **KNOWN} if settings.tells_unknown else ANSWER


def folder_sha256(folder: Union[str, Path]) -> str:
    """Return one SHA-256 of the names and the contents of all files in a folder, in hexadecimal digits. UserError."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(str(path))}\n".encode())
    return digest.hexdigest()


def open_predictor(folder: str, settings: Settings, num_threads: int, **options: Any) -> Any:
    """Open the model in an archive's folder: Predictor or SearchPredictor. options: more of the Predictor's. UserError."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(num_threads))  # threads of the tokenizer
    options = {**options, "dtype": settings.dtype, "num_threads": num_threads, "batch_size": settings.batch_size,
               "max_seq_length": settings.max_seq_length}
    try:
        if settings.has_index:
            from textcls.retrieval.predictor import SearchPredictor

            return SearchPredictor(os.path.join(folder, EXPORT), os.path.join(folder, INDEX), **options)
        from textcls.runtime.predictor import Predictor

        return Predictor(os.path.join(folder, EXPORT), **options)
    except ImportError as error:
        raise UserError(f"{socket.gethostname()}: {sys.executable} lacks the package {error.name}, expected an environment with "
                        "those of deploy/spark/requirements.txt") from None


@functools.lru_cache(maxsize=1)  # one model per worker, kept from task to task
def open_shipped(settings: Settings) -> Callable[[list[str]], Iterable[tuple[TopLabels, Optional[float]]]]:
    """Open a model that was shipped to this executor; returns a function of texts to their labels, and how known each text is,
    None where the model does not tell. UserError."""
    folder = SparkFiles.get(settings.archive)
    found = folder_sha256(folder) if os.path.isdir(folder) else "none, it is missing"
    if found != settings.sha256:
        raise UserError(f"{socket.gethostname()}: the archive of the model has the SHA-256 {found[:20]}, expected "
                        f"{settings.sha256[:20]}, that of the driver's: --archive has to be what --write_archive wrote of it")
    task = TaskContext.get()
    predictor = open_predictor(folder, settings, task.cpus() if task else 1)
    if settings.has_index:
        return lambda texts: [([(label, probability) for label, probability, _ in answer.top_k], answer.known)
                              for answer in predictor.answer(texts, settings.top_k)]

    def answer(texts: list[str]) -> Iterable[tuple[TopLabels, Optional[float]]]:
        probs, known = predictor.answer(texts)
        return zip(top_labels(probs, predictor.labels, settings.top_k), [None] * len(texts) if known is None else known.tolist())

    return answer


def answer_batches(batches: Iterable[pa.RecordBatch], column: str, settings: Settings, is_decoded: bool = False
                   ) -> Iterator[pa.RecordBatch]:
    """Append columns of answers to the rows of a partition, in their order. column: of the texts; is_decoded: of `read_text`."""
    for window in cut_windows(batches, settings.window):
        for name, values in answer_column(window.column(column), settings, is_decoded).items():
            window = window.append_column(name, values)
        yield from window.to_batches()


def cut_windows(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Cut the rows of a partition into tables of `size` rows each, the last one smaller, wherever Spark's batches end."""
    parts, count = [], 0
    for batch in batches:
        while batch.num_rows:
            part = batch.slice(0, size - count)
            parts.append(part)
            count += part.num_rows
            batch = batch.slice(part.num_rows)
            if count == size:
                yield pa.Table.from_batches(parts)
                parts, count = [], 0
    if parts:
        yield pa.Table.from_batches(parts)


def answer_column(column: Union[pa.Array, pa.ChunkedArray], settings: Settings, is_decoded: bool = False) -> dict[str, pa.Array]:
    """Label a column of texts: the columns of `answer_kinds`. A row that is no text gets an error in the place of an answer."""
    values = [read_text(value, settings.max_text_length, is_decoded) for value in column.cast(pa.binary()).to_pylist()]
    places = [place for place, (text, _) in enumerate(values) if text is not None]
    rows: list[tuple] = [(None, None, None, error, None) for _, error in values]
    if places:
        answer = open_shipped(settings)
        for place, (top, known) in zip(places, answer([values[place][0] for place in places])):
            label, probability = top[0]
            decided = is_decided(probability, settings.threshold, known, settings.least_known)
            rows[place] = (label if decided else UNDECIDED, probability,
                           [{"label": name, "probability": value} for name, value in top], None,
                           None if known is None else round(known, DECIMALS))
    kinds = answer_kinds(settings)
    return {name: pa.array([row[place] for row in rows], kinds[name]) for place, name in enumerate(kinds)}


def read_text(value: Optional[bytes], longest: int, is_decoded: bool) -> tuple[Optional[str], Optional[str]]:
    """Return (text, None) of a cell, or (None, what is wrong with it). is_decoded: by a reader that has put REPLACEMENT in the
    place of what it could not read."""
    problem = "null"
    if value is not None:
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            problem = "not a string (invalid UTF-8)"
        else:
            problem = TEXT.problem(text) or ("U+FFFD (not in the file's encoding)" if is_decoded and REPLACEMENT in text else "")
            if not problem and len(text) > longest:
                return None, f"{len(text)} characters, expected at most {longest}"
    return (None, f"{problem}, expected {TEXT.expected}") if problem else (text, None)
