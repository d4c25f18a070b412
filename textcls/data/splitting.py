"""From rows of text and label to a data folder: what data/doccano.py and data/table.py share. Needs no Paddle.

A row is a tuple (place, text, label); text and label: as they stand in the file, to be checked here.
"""

import argparse
import array
import contextlib
import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple, NoReturn, Optional, TypeVar

import numpy as np

from textcls.common.errors import Problems, UserError
from textcls.common.log import Progress, progress_bar
from textcls.common.outputs import DATA_FILES, check_output_folder, complete_file
from textcls.common.stored_texts import PART, StoredTexts, store_texts
from textcls.common.texts import BREAKS, LABEL, TEXT, tidy_text
from textcls.data.files import read_labels, read_lines

SPLITS = DATA_FILES[:3]  # train.txt, dev.txt, test.txt
NO_LABEL = -1  # in the place of a label's id
Value = TypeVar("Value")
Place = tuple[str, Optional[int]]  # the first two arguments of Problems.add: (path, line) or (path with row, None)
Row = tuple[Place, object, object]


def add_split_options(parser: argparse.ArgumentParser, source: str) -> None:
    """Add the options of the split and of the output; source: what the input file is called in the help."""
    parser.add_argument("--save_dir", default="./data", help="Folder for the files written.")
    parser.add_argument("--splits", type=float, nargs="+", default=[0.8, 0.1, 0.1], metavar="SHARE",
                        help="Shares of train, dev and test, which sum to 1; the last ones may be left out.")
    parser.add_argument("--seed", type=int, default=3, help="Seed of the split and of the shuffling.")
    parser.add_argument("--label_file", help="Existing label.txt whose labels and order are kept; without it the "
                                             f"labels stand in the order of their first appearance in the {source}.")
    parser.add_argument("--overwrite", action="store_true", help="Replace files that exist in save_dir.")


def check_shares(shares: Sequence[float]) -> None:
    """Raise UserError where --splits are no shares of a whole."""
    wrong = ("too many numbers" if len(shares) > 3 else
             "a number is out of range" if not all(0 <= share <= 1 for share in shares) or shares[0] == 0 else
             f"the sum is {sum(shares):.9g}" if abs(sum(shares) - 1) > 1e-6 else None)
    if wrong:
        raise UserError(f"--splits {' '.join(f'{share:g}' for share in shares)}: {wrong}, expected 1 to 3 numbers from "
                        "0 to 1 (train, dev, test; train more than 0) that sum to 1, e.g. --splits 0.8 0.1 0.1")


# ---------------------------------------------------------------- reading and checking rows


def read_json_rows(path: str, problems: Problems, stream: Optional[BinaryIO] = None) -> Iterator[tuple[Place, object]]:
    """Yield (place, value) for each JSON value of a file that has one per line, or one array of them, which is read whole.

    stream: a binary stream to read instead of opening `path`.
    """
    rest, start = read_lines(path, problems, stream), []
    for line in rest:
        start.append(line)
        if line[1].strip():
            break
    lines: Iterator[tuple[Optional[int], str]] = itertools.chain(start, rest)
    if start and start[-1][1].lstrip().startswith("["):
        whole = "\n".join(text for _, text in lines)
        # Without its unsound lines, which are reported already, an array would be no JSON.
        lines = iter([] if problems.count else [(None, whole)])
    for number, text in lines:
        if not text.strip():
            continue
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            wrong = f"invalid JSON ({getattr(error, 'msg', error)})"
            problems.add(path, number or getattr(error, "lineno", None), wrong, "one JSON object per line or one array")
            continue
        if number:
            yield (path, number), value
        else:
            yield from (((f"{path}: row {index}", None), row) for index, row in enumerate(value, 1))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which JSON has not")


def check_row(text: object, label: object, labels: Optional[Sequence[str]], one_label: str) -> tuple[str, list[str]]:
    """Return (tidy text, list of labels) of a row; labels: those allowed, or None. Raises ValueError(wrong, expected)."""
    if not isinstance(text, str):
        raise ValueError(f"the text is a JSON {type(text).__name__}", "a string")
    tidy = tidy_text(text)
    if problem := TEXT.problem(tidy):
        raise ValueError(f"text: {problem}", TEXT.expected)
    found = [] if label is None or label == "" else [label] if isinstance(label, str) else label
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        spans = isinstance(found, list) and any(isinstance(label, (list, dict)) for label in found)
        wrong = "spans of sequence labelling" if spans else "not strings"
        raise ValueError(f"the labels are {wrong}", f"text classification: {one_label}")
    for name in found:
        if problem := LABEL.problem(name):
            raise ValueError(f"label {name!r}: {problem}", LABEL.expected)
        if labels is not None and name not in labels:
            raise ValueError(f"label {name!r} is not in --label_file", f"one of its {len(labels)} labels")
    return tidy, list(dict.fromkeys(found))


class KeptRows:
    """What memory holds of the sound rows of a file that have one label or none: 28 bytes of each, however long it is.

    label_ids: numbers into `labels`, or NO_LABEL; lines: 0 where a row has none; digests: 16 bytes of each.
    """

    def __init__(self, path: str, labels: Sequence[str]):
        self.path, self.label2id = path, {label: index for index, label in enumerate(labels)}
        self.label_ids, self.lines, self.digests = array.array("i"), array.array("q"), bytearray()
        self.places: dict[int, str] = {}  # of rows without a line: those of a JSON array, which is read whole anyway

    def add(self, place: Place, text: str, label: Optional[str]) -> None:
        """Note a row, and its label where that is new."""
        if place[1] is None:
            self.places[len(self.lines)] = place[0]
        self.lines.append(place[1] or 0)
        self.label_ids.append(NO_LABEL if label is None else self.label2id.setdefault(label, len(self.label2id)))
        # a text has no tab: so one without a label is no repetition of one that has a label
        content = text if label is not None else f"{text}\t"
        self.digests += hashlib.blake2b(content.encode("utf-8"), digest_size=16).digest()

    def find_first_rows(self) -> np.ndarray:
        """Return the first row with the text of each row: int64 [num_rows]."""
        halves = np.frombuffer(self.digests, np.uint64).reshape(-1, 2).T
        order = np.lexsort(halves)  # rows of one text behind each other, the first one first
        begins = np.arange(len(order)) == 0
        for half in halves:
            in_order = half[order]
            begins[1:] |= in_order[1:] != in_order[:-1]
        first_rows = np.empty(len(order), np.int64)
        first_rows[order] = order[begins][np.cumsum(begins) - 1]
        return first_rows

    def warn_of_conflicts(self, rows: np.ndarray, first_rows: np.ndarray) -> None:
        """Print the warnings about rows that have another label than the first rows with their texts. Both: int64."""
        problems, labels = Problems(), list(self.label2id)
        for row, first in zip(rows.tolist(), first_rows.tolist()):
            name = f"line {self.lines[first]}" if self.lines[first] else self.places[first][len(self.path) + 2:]
            own, other = (labels[self.label_ids[number]] for number in (row, first))
            problems.warn(self.places.get(row, self.path), self.lines[row],
                          f"label {own!r} for the text of {name}, which has {other!r}", "one label per text")
        problems.report()


class UsableRows(NamedTuple):
    """The rows of a file that go into the data folder, each text once."""

    texts: StoredTexts  # of all its sound rows
    label_ids: np.ndarray  # int32 of each
    labels: list[str]  # position = label id
    labelled: np.ndarray  # int64: the numbers of those to split
    unlabelled: np.ndarray  # int64

    def group_by_label(self) -> dict[str, array.array]:
        """Return {label: the numbers of its rows to split, in their order}."""
        ids = self.label_ids[self.labelled]
        order, counts = np.argsort(ids, kind="stable"), np.bincount(ids, minlength=len(self.labels))
        groups = np.split(self.labelled[order], np.cumsum(counts)[:-1])
        return {label: array.array("q", group.tobytes()) for label, group in zip(self.labels, groups)}

    def make_lines(self, rows: array.array) -> Iterator[str]:
        """Yield <text><tab><label> of the rows with these numbers."""
        numbers = np.array(rows, np.int64)
        for text, label_id in zip(self.texts[numbers], self.label_ids[numbers]):
            yield f"{text}\t{self.labels[label_id]}"


def collect_rows(path: str, rows: Iterable[Row], labels: Optional[Sequence[str]], one_label: str, problems: Problems,
                 folder: str) -> UsableRows:
    """Check the rows of the file `path`; prints the warnings about single rows and, unless there are problems, their numbers.

    labels: those allowed, or None; one_label: in the messages, what a row should have as its label; folder: where a temporary
    file keeps the texts.
    """
    kept, none, several = KeptRows(path, labels or []), Problems(), Problems()
    count = joined = 0

    def sound_texts() -> Iterator[str]:
        nonlocal count, joined
        for place, value, label in rows:
            count += 1
            joined += isinstance(value, str) and BREAKS.search(value) is not None
            try:
                text, found = check_row(value, label, labels, one_label)
            except ValueError as error:
                problems.add(*place, *error.args)
                continue
            if len(found) > 1:
                several.warn(*place, f"{len(found)} labels {found}", one_label)
                continue
            if not found:
                none.warn(*place, "no label", one_label)
            kept.add(place, text, found[0] if found else None)
            yield text

    with progress_bar(None, f"Reading {path}", "rows") as progress:
        texts = store_texts(counted(sound_texts(), progress), folder)
    num_none, num_several = none.num_warnings, several.num_warnings
    none.report()  # each kind by itself, so that many of one do not hide the others
    several.report()
    label_ids, first_rows = np.array(kept.label_ids, np.int32), kept.find_first_rows()
    differs, is_first = label_ids != label_ids[first_rows], first_rows == np.arange(len(label_ids))
    kept.warn_of_conflicts(np.flatnonzero(differs), first_rows[differs])
    problems.report()
    is_labelled, in_conflict = label_ids != NO_LABEL, np.zeros(len(label_ids), bool)
    in_conflict[first_rows[differs]] = True
    for number, meaning in ((num_none, "rows without a label (their texts go to data.txt)"),
                            (num_several, "rows with several labels (left out)"),
                            (in_conflict.sum(), "texts that occur with different labels (left out)"),
                            ((is_labelled & ~is_first & ~differs).sum(), "repetitions of a text with the same label (left out)"),
                            (joined, "texts with tabs or line breaks (replaced by one blank)")):
        if number:
            print(f"{meaning}: {number}")
    labelled, unlabelled = (np.flatnonzero(is_first & part) for part in (is_labelled & ~in_conflict, ~is_labelled))
    if not len(labelled):
        raise UserError(f"{path}: none of {count} rows is usable, expected at least one text with {one_label}")
    return UsableRows(texts, label_ids, list(kept.label2id), labelled, unlabelled)


def counted(values: Iterable[Value], progress: Progress) -> Iterator[Value]:
    """Yield values, and advance a progress bar by them."""
    number = 0
    for number, value in enumerate(values, 1):
        yield value
        if number % PART == 0:
            progress.update(PART)
    progress.update(number % PART)


# ---------------------------------------------------------------- the split


def share_out(count: int, shares: Sequence[float], given: Sequence[int]) -> list[int]:
    """Return the numbers of rows (at least 1 each) that a class of `count` rows gives to the splits; given: those of before."""
    numbers = [max(1, int(count * share + 1e-9)) for share in shares]
    while sum(numbers) > count:
        numbers[numbers.index(max(numbers))] -= 1
    # What rounding leaves over goes where most is missing in total: many small classes would else distort the shares.
    total = sum(given) + count
    surplus = [given[index] + numbers[index] - share * total for index, share in enumerate(shares)]
    for index in sorted(range(len(shares)), key=surplus.__getitem__)[:count - sum(numbers)]:
        numbers[index] += 1
    return numbers


def split_rows(rows: dict[str, array.array], shares: Sequence[float], seed: int, problems: Problems) -> list[array.array]:
    """Split {label: numbers of its rows} by `shares`, stratified; returns the shuffled numbers of each share."""
    rng = random.Random(str(seed))  # as an int, -3 would be the same seed as 3
    splits = [array.array("q") for _ in shares]
    for label, numbers in rows.items():
        if len(numbers) >= len(shares):
            counts = share_out(len(numbers), shares, list(map(len, splits)))
        else:
            counts = [len(numbers)]
            wrong = f"label {label!r} has only {len(numbers)} rows" + (", all of them go to train.txt" if numbers else "")
            problems.warn("label.txt", None, wrong, f"at least {len(shares)}, one per split")
        rng.shuffle(numbers)
        for split, end, count in zip(splits, itertools.accumulate(counts), counts):
            split += numbers[end - count:end]
    for split in splits:
        rng.shuffle(split)
    return splits


# ---------------------------------------------------------------- the files


def check_files(args: argparse.Namespace, path: str, names: Iterable[str], problems: Problems) -> None:
    """Add to `problems` what must not be replaced by the files `names`, and warn of files that do not belong to this split."""
    inputs = {os.path.realpath(name) for name in (path, args.label_file) if name}
    for name in DATA_FILES:
        path = os.path.join(args.save_dir, name)
        if not os.path.lexists(path):
            continue
        if name not in names:
            if os.path.realpath(path) not in inputs:
                problems.warn(path, None, "left from before, not of this split", "it removed if no longer needed")
        elif os.path.isdir(path) or os.path.realpath(path) in inputs:
            problems.add(path, None, "is a folder or an input of this run", "another --save_dir")
        elif not args.overwrite:
            problems.add(path, None, "the file exists", "--overwrite, or another --save_dir")


def write_files(save_dir: str, outputs: Mapping[str, Iterable[str]], num_lines: Optional[int] = None) -> None:
    """Write {name: lines}: all files in full under temporary names, then all get their final names.

    num_lines: of all files, where it is known.
    """
    counts = dict.fromkeys(outputs, 0)
    try:
        with contextlib.ExitStack() as stack, progress_bar(num_lines, f"Writing {save_dir}", "lines") as progress:
            for name, lines in outputs.items():
                output = stack.enter_context(complete_file(os.path.join(save_dir, name), newline="\n"))
                for line in counted(lines, progress):
                    output.write(f"{line}\n")
                    counts[name] += 1
                output.flush()  # a full disk must show before the first file is renamed
    except OSError as error:
        raise UserError(f"{save_dir}: cannot be written ({error.strerror}), expected a writable folder") from None
    for name, count in counts.items():
        kind = "labels" if name == "label.txt" else "examples"
        print(f"Save {count} {kind} to {os.path.join(save_dir, name)}.")


def make_data_folder(args: argparse.Namespace, path: str, rows: Iterable[Row], one_label: str, problems: Problems) -> None:
    """Check, split and save the rows of the file `path`, which its reader yields, adding to `problems` what it cannot read.

    args: the options of add_split_options; one_label: as in collect_rows. Raises UserError.
    """
    started = time.perf_counter()
    check_output_folder(args.save_dir, "--save_dir")
    labels = read_labels(args.label_file) if args.label_file else None  # without sound labels every row would be reported
    usable = collect_rows(path, rows, labels, one_label, problems, args.save_dir)
    by_label = usable.group_by_label()
    if labels is None:
        labels = sorted(filter(by_label.get, by_label), key=lambda label: by_label[label][0])  # by their first appearance
    if len(labels) < 2:
        problems.warn("label.txt", None, f"only one label {labels[0]!r}", "at least two labels for train.py")

    names, shares = zip(*[(name, share) for name, share in zip(SPLITS, args.splits) if share > 0])
    splits = split_rows({label: by_label[label] for label in labels}, shares, args.seed, problems)
    problems.report()
    outputs: dict[str, Iterable[str]] = {"label.txt": labels}  # first in, last renamed: train.py reads it first
    outputs.update((name, usable.make_lines(split)) for name, split in zip(names, splits))
    if len(usable.unlabelled):
        outputs["data.txt"] = usable.texts[usable.unlabelled]
    label_path = os.path.join(args.save_dir, "label.txt")
    if args.label_file and os.path.realpath(args.label_file) == os.path.realpath(label_path):
        del outputs["label.txt"]  # it stands there already
    for name, split in zip(names, splits):
        if not split:
            problems.warn(os.path.join(args.save_dir, name), None, "no rows for it", "more rows, or other --splits")
    check_files(args, path, outputs, problems)
    problems.report()
    write_files(args.save_dir, outputs, len(labels) + len(usable.labelled) + len(usable.unlabelled))
    print(f"Finished! It takes {time.perf_counter() - started:.2f} seconds")
