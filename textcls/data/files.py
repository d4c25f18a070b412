"""Data files: read, checked, compared, written."""

import array
import codecs
import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Optional

import numpy as np

from textcls.common.errors import MAX_REPORTED, Problems, UserError, did_you_mean
from textcls.common.outputs import GZIP, complete_file, is_gzip
from textcls.common.stored_texts import StoredTexts, store_texts
from textcls.common.texts import LABEL, LINE, NUL, TEXT, tidy_text
from textcls.data.encodings import bom_encoding, guess_encoding
from textcls.data.parquet import find_columns, find_text_column, is_parquet, read_strings

LabelledTexts = tuple[list[str], np.ndarray]  # texts, label ids int64 [num_texts]
SAMPLE = 1 << 16  # bytes of a file whose encoding is guessed


def open_input(path: str) -> BinaryIO:
    """Open a file as a binary stream, decompressed where its name ends in .gz; to be read within `sound_gzip`."""
    return io.BufferedReader(gzip.open(path)) if is_gzip(path) else open(path, "rb")


@contextlib.contextmanager
def sound_gzip(path: str) -> Iterator[None]:
    """Raise UserError where what the block reads is no whole compressed file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        wrong = "ends too early" if isinstance(error, EOFError) else f"damaged, or no gzip file ({error})"
        raise UserError(f"{path}: {wrong}, expected a whole {GZIP} file") from None


def read_lines(path: str, problems: Problems, stream: Optional[BinaryIO] = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) for each sound line of a UTF-8 file, without BOMs at its beginning and CRs at its end: so
    it stays the same when it is written in another place.

    Only LF ends a line. Missing and empty files, invalid UTF-8 and NUL are added to `problems` (such lines are not
    yielded). `stream`: a binary stream to read instead of opening `path`, which then only names it in messages. UserError where a
    .gz file is truncated or damaged.
    """
    try:
        lines = stream if stream is not None else open_input(path)
    except FileNotFoundError:
        return problems.add(path, None, "file not found", "a UTF-8 text file")
    except OSError as error:
        return problems.add(path, None, f"cannot be read ({error.strerror})", "a UTF-8 text file")
    found = False
    with sound_gzip(path), lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                if encoding := bom_encoding(line):
                    return problems.add(path, 1, f"the file is {encoding}", "UTF-8 (save it again as UTF-8)")
                if line == codecs.BOM_UTF8:
                    break
            found = True
            while line.startswith(codecs.BOM_UTF8):
                line = line[3:]
            line = line.removesuffix(b"\n").rstrip(b"\r")
            if b"\0" in line:
                problems.add(path, number, NUL["\0"], "text without control bytes")
                continue
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                hint = _encoding_hint(path if stream is None else None, line) if problems.count < MAX_REPORTED else ""
                problems.add(path, number, f"invalid UTF-8 at byte {error.start + 1}", f"UTF-8 text ({hint})")
    if not found:
        problems.add(path, None, "file is empty", "at least one line")


def _encoding_hint(path: Optional[str], line: bytes) -> str:
    """Say how to make UTF-8 of a file that has a line (bytes) which is none. path: None for a stream."""
    start = b""
    if path is not None and os.path.isfile(path):  # a pipe cannot be read twice
        with open_input(path) as file:
            start = file.read(SAMPLE)
    encoding = guess_encoding(start) or guess_encoding(line)  # other lines may be UTF-8, which is in no other encoding
    return f"convert it: iconv -f {encoding} -t UTF-8" if encoding else "save it again as UTF-8"


def read_labels(path: str, problems: Optional[Problems] = None) -> list[str]:
    """Read label.txt: one label per line, line order = class id; what follows a `==` is of no concern here.

    Returns the list of labels. Empty, duplicate, padded and tabbed labels are problems; without a `problems` to collect
    them in, they raise UserError here.
    """
    return list(read_label_words(path, problems))


def read_label_words(path: str, problems: Optional[Problems] = None) -> dict[str, dict[str, int]]:
    """Read label.txt with the words that stand for the labels: lines `label`, `label==word` or `label==word==word`, or several
    lines of one label with a word each.

    Returns {label: {word: its line number}} in the order of the class ids; a label without `==` is its own word, or what follows
    its last `##`. problems: as of `read_labels`.
    """
    reports_here = problems is None
    problems = problems or Problems()
    before = problems.count
    seen: dict[str, dict[str, int]] = {}  # label -> {word: line number}
    first_lines: dict[str, int] = {}
    for number, line in read_lines(path, problems):
        label, *words = line.split("==")
        word_problem = next(filter(None, map(LINE.problem, words)), None)
        if problem := LABEL.problem(label):
            problems.add(path, number, f"label {label!r}: {problem}", LABEL.expected)
        elif label in seen and not (words and seen[label]):
            problems.add(path, number, f"label {label!r} again (first in line {first_lines[label]})", "each label once")
        elif word_problem:
            problems.add(path, number, f"a word of label {label!r}: {word_problem}", "label==word")
        first_lines.setdefault(label, number)
        seen.setdefault(label, {}).update({word.strip(): number for word in words if word.strip()})
    if problems.count == before and len(seen) < 2:
        problems.add(path, None, "only one label", "at least two labels")
    if reports_here:
        problems.report()
    return {label: words or {label.rpartition("##")[2]: first_lines[label]} for label, words in seen.items()}


def draw_shots(texts: Sequence[str], label_ids: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Draw `shots` rows of each class at random, or all of a class that has fewer. Returns their indices, int64, in file order.

    texts: list of str; label_ids: int64 [num_texts]; seed: of the draw, which depends on nothing else.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(texts))
    drawn = [order[label_ids[order] == label][:shots] for label in np.unique(label_ids)]
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, np.int64)


def read_labelled(path: str, labels: Sequence[str], problems: Problems, label_path: str = "label.txt",
                  columns: tuple[Optional[str], Optional[str]] = (None, None)) -> LabelledTexts:
    """Read a `<text>\\t<label>` file, or a Parquet file, whose texts are made such as fit on a line.

    Returns (texts: list of str, label_ids: int64 [num_texts]); unsound rows are added to `problems` and left out.
    labels: names in the order of their ids; empty where label.txt itself is wrong: then no label counts as unknown.
    columns: of the texts and of the labels in a Parquet file; None: found. UserError.
    """
    label_ids = array.array("q")
    texts = list(_sound_texts(path, labels, problems, label_path, columns, label_ids))
    return texts, np.array(label_ids, np.int64)


def store_labelled(path: str, labels: Sequence[str], problems: Problems, label_path: str,
                   columns: tuple[Optional[str], Optional[str]], folder: str) -> tuple[StoredTexts, np.ndarray]:
    """Read as `read_labelled` does, but keep the texts in a temporary file of a folder: for files of any size."""
    label_ids = array.array("q")
    texts = store_texts(_sound_texts(path, labels, problems, label_path, columns, label_ids), folder)
    return texts, np.array(label_ids, np.int64)


def _sound_texts(path: str, labels: Sequence[str], problems: Problems, label_path: str,
                 columns: tuple[Optional[str], Optional[str]], label_ids: array.array) -> Iterator[str]:
    """Yield the text of each sound row, and append the id of its label to `label_ids`. Arguments: as of `read_labelled`."""
    label2id = {label: index for index, label in enumerate(labels)}
    rows: Iterator[tuple[int, str, str]]
    if is_parquet(path):
        expected = "a text and a label"
        rows = ((number, tidy_text(text), label)
                for number, (text, label) in read_strings(path, find_columns(path, *columns), problems))
    else:
        expected, rows = "<text><tab><label>", _split_lines(path, problems)
    for number, text, label in rows:
        if problem := TEXT.problem(text):
            problems.add(path, number, f"text: {problem}", expected)
        elif label not in label2id and (labels or not label.strip()):
            hint = did_you_mean(label, labels) if problems.count < MAX_REPORTED else ""
            wrong = f"label {_shorten(label)!r} is not in {label_path}{hint}" if label.strip() else "empty label"
            problems.add(path, number, wrong, f"one of its {len(labels)} labels" if labels else expected)
        else:
            label_ids.append(label2id.get(label, 0))
            yield text


def _split_lines(path: str, problems: Problems) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, text, label) for each line of a file that has these two."""
    for number, line in read_lines(path, problems):
        text, tab, label = line.partition("\t")
        if not tab:
            wrong = "empty line" if not line.strip() else f"no tab in {_shorten(line)!r}"
            problems.add(path, number, wrong, "<text><tab><label>")
        elif "\t" in label:
            problems.add(path, number, f"{label.count(chr(9)) + 1} tabs", "exactly one tab: <text><tab><label>")
        else:
            yield number, text, label


def read_texts(path: str, problems: Problems, stream: Optional[BinaryIO] = None, text_column: Optional[str] = None
               ) -> Iterator[str]:
    """Yield the texts of an unlabelled file: one per line, where empty lines and lines with a tab are problems, or those of a
    Parquet file. text_column: of the latter; None: found. UserError.
    """
    if stream is None and is_parquet(path):
        for number, [text] in read_strings(path, [find_text_column(path, text_column)], problems):
            if problem := TEXT.problem(text):
                problems.add(path, number, problem, TEXT.expected)
            else:
                yield text
        return
    for number, text in read_lines(path, problems, stream):
        if not text.strip():
            problems.add(path, number, "empty line", "one text per line")
        elif "\t" in text:
            problems.add(path, number, "a tab", "one text per line, without a label")
        elif problem := TEXT.problem(text):
            problems.add(path, number, problem, TEXT.expected)
        else:
            yield text


def write_rows(path: str, texts: Iterable[str], names: Iterable[str]) -> None:
    """Write rows of `<text>\\t<label>`. texts, names: lists of str."""
    with complete_file(path, newline="\n") as output:
        output.writelines(f"{text}\t{name}\n" for text, name in zip(texts, names))


def compare_labels(trained: Sequence[str], listed: Sequence[str], path: str, folder: str) -> None:
    """Raise UserError naming the first difference between a checkpoint's labels and those of a label.txt."""
    expected = f"the labels that {folder} was trained with, in the same order"
    for number, (label, other) in enumerate(zip(trained, listed), 1):
        if label != other:
            raise UserError(f"{path}:{number}: label {other!r} where the checkpoint has {label!r}, expected {expected}")
    if len(trained) != len(listed):
        raise UserError(f"{path}: {len(listed)} labels where the checkpoint has {len(trained)}, expected {expected}")


def check_splits(train_path: str, dev_path: str, train: tuple[Sequence[str], np.ndarray],
                 dev: tuple[Sequence[str], np.ndarray], labels: Sequence[str], problems: Problems) -> None:
    """Add the warnings that need whole files: a class without training rows, a text in both train and dev.

    train, dev: (texts, label_ids) as `read_labelled` or `store_labelled` returns them.
    """
    counts = np.bincount(train[1], minlength=len(labels)) if len(train[1]) else np.zeros(len(labels), int)
    for label, count in zip(labels, counts):
        if count == 0:
            problems.warn(train_path, None, f"class {label!r} has no training rows", "at least one row per class")
    train_hashes, dev_hashes = (np.fromiter(map(hash, texts), np.int64, len(texts)) for texts in (train[0], dev[0]))
    hashes, first_rows = np.unique(dev_hashes, return_index=True)
    shared = np.flatnonzero(np.isin(train_hashes, hashes))
    dev_rows = first_rows[np.searchsorted(hashes, train_hashes[shared])]
    for row, dev_row in zip(shared.tolist(), dev_rows.tolist()):
        text = train[0][row]
        if text == dev[0][dev_row]:  # other texts may have the same hash
            problems.warn(train_path, row + 1, f"text {_shorten(text)!r} is also in {dev_path}:{dev_row + 1}",
                          "different texts in train and dev")


def _shorten(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[:length] + "..."


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object (UTF-8, a BOM is accepted); UserError where the file is missing or not one."""
    content, _ = load_json(path, "a JSON object")
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON {type(content).__name__}, expected an object")
    return content


def load_json(path: str, expected: str, object_pairs_hook: Optional[Callable[[list], Any]] = None) -> tuple[Any, str]:
    """Read a JSON file as json.loads does. Returns what it holds, and its text. expected: for the message of the UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        return json.loads(text, object_pairs_hook=object_pairs_hook), text
    except FileNotFoundError:
        raise UserError(f"{path}: file not found, expected {expected}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}), expected {expected}") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, or a number of thousands of digits
        raise UserError(f"{path}: cannot be read as JSON ({error}), expected {expected}") from None
