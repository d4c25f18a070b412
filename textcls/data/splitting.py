"""From rows of text and label to a data folder: what data/doccano.py and data/table.py share. Needs no Paddle.

A row is a tuple (place, text, label); text and label: as they stand in the file, to be checked here.
"""

import argparse
import contextlib
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NoReturn, Optional

from textcls.common.errors import Problems, UserError
from textcls.common.outputs import DATA_FILES, check_output_folder, complete_file
from textcls.common.texts import BREAKS, LABEL, TEXT, tidy_text
from textcls.data.files import read_labels, read_lines

SPLITS = DATA_FILES[:3]  # train.txt, dev.txt, test.txt
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
    """Yield (place, value) for each JSON value of a file that has one per line, or one array of them.

    stream: a binary stream to read instead of opening `path`.
    """
    lines: dict[Optional[int], str] = dict(read_lines(path, problems, stream))  # number -> line
    if next(filter(str.strip, lines.values()), "").lstrip().startswith("["):
        # Without its unsound lines, which are reported already, an array would be no JSON.
        lines = {} if problems.count else {None: "\n".join(lines.values())}
    for number, text in lines.items():
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


def collect_texts(path: str, rows: Iterable[Row], labels: Optional[Sequence[str]], one_label: str,
                  problems: Problems) -> tuple[dict[str, str], list[str]]:
    """Check the rows of the file `path`; prints the warnings about single rows and, unless there are problems, their numbers.

    labels: those allowed, or None; one_label: in the messages, what a row should have as its label.
    Returns (texts: dict text -> label, unlabelled: list of texts), both in the order of the file, each text once.
    """
    places: dict[str, Place] = {}  # of the first row of a text
    texts: dict[str, str] = {}
    unlabelled: dict[str, None] = {}
    conflicts = set()
    none, several, different = kinds = Problems(), Problems(), Problems()
    count = repeated = joined = 0
    for place, value, label in rows:
        count += 1
        joined += isinstance(value, str) and BREAKS.search(value) is not None
        try:
            text, found = check_row(value, label, labels, one_label)
        except ValueError as error:
            problems.add(*place, *error.args)
            continue
        if not found:
            none.warn(*place, "no label", one_label)
            unlabelled[text] = None
        elif len(found) > 1:
            several.warn(*place, f"{len(found)} labels {found}", one_label)
        elif texts.setdefault(text, found[0]) != found[0]:
            first = f"line {places[text][1]}" if places[text][1] else places[text][0][len(path) + 2:]
            wrong = f"label {found[0]!r} for the text of {first}, which has {texts[text]!r}"
            different.warn(*place, wrong, "one label per text")
            conflicts.add(text)
        else:
            repeated += text in places
            places.setdefault(text, place)
    counts = ((len(none.warnings), "rows without a label (their texts go to data.txt)"),
              (len(several.warnings), "rows with several labels (left out)"),
              (len(conflicts), "texts that occur with different labels (left out)"),
              (repeated, "repetitions of a text with the same label (left out)"),
              (joined, "texts with tabs or line breaks (replaced by one blank)"))
    for kind in kinds:
        kind.report()  # each by itself, so that many of one kind do not hide the others
    problems.report()
    for number, meaning in counts:
        if number:
            print(f"{meaning}: {number}")
    texts = {text: label for text, label in texts.items() if text not in conflicts}
    if not texts:
        raise UserError(f"{path}: none of {count} rows is usable, expected at least one text with {one_label}")
    return texts, list(unlabelled)


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


def split_texts(texts: dict[str, str], labels: Sequence[str], shares: Sequence[float], seed: int,
                problems: Problems) -> list[list[tuple[str, str]]]:
    """Split {text: label} by `shares`, stratified; returns one shuffled list of (text, label) per share."""
    rng = random.Random(str(seed))  # as an int, -3 would be the same seed as 3
    by_label: dict[str, list[tuple[str, str]]] = {label: [] for label in labels}
    for text, label in texts.items():
        by_label[label].append((text, label))
    splits: list[list[tuple[str, str]]] = [[] for _ in shares]
    for label, rows in by_label.items():
        if len(rows) >= len(shares):
            numbers = share_out(len(rows), shares, list(map(len, splits)))
        else:
            numbers = [len(rows)]
            wrong = f"label {label!r} has only {len(rows)} rows" + (", all of them go to train.txt" if rows else "")
            problems.warn("label.txt", None, wrong, f"at least {len(shares)}, one per split")
        rng.shuffle(rows)
        for split, number in zip(splits, numbers):
            split += rows[:number]
            rows = rows[number:]
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


def write_files(save_dir: str, outputs: dict[str, list[str]]) -> None:
    """Write {name: list of lines}: all files in full under temporary names, then all get their final names."""
    try:
        with contextlib.ExitStack() as stack:
            for name, lines in outputs.items():
                output = stack.enter_context(complete_file(os.path.join(save_dir, name), newline="\n"))
                output.writelines(f"{line}\n" for line in lines)
                output.flush()  # a full disk must show before the first file is renamed
    except OSError as error:
        raise UserError(f"{save_dir}: cannot be written ({error.strerror}), expected a writable folder") from None
    for name, lines in outputs.items():
        kind = "labels" if name == "label.txt" else "examples"
        print(f"Save {len(lines)} {kind} to {os.path.join(save_dir, name)}.")


def make_data_folder(args: argparse.Namespace, path: str, rows: Iterable[Row], one_label: str, problems: Problems) -> None:
    """Check, split and save the rows of the file `path`, which its reader yields, adding to `problems` what it cannot read.

    args: the options of add_split_options; one_label: as in collect_texts. Raises UserError.
    """
    started = time.perf_counter()
    check_output_folder(args.save_dir, "--save_dir")
    labels = read_labels(args.label_file) if args.label_file else None  # without sound labels every row would be reported
    texts, unlabelled = collect_texts(path, rows, labels, one_label, problems)
    labels = list(dict.fromkeys(texts.values())) if labels is None else labels
    if len(labels) < 2:
        problems.warn("label.txt", None, f"only one label {labels[0]!r}", "at least two labels for train.py")

    names, shares = zip(*[(name, share) for name, share in zip(SPLITS, args.splits) if share > 0])
    splits = split_texts(texts, labels, shares, args.seed, problems)
    problems.report()
    outputs = {"label.txt": labels}  # first in, last renamed: train.py reads it first
    outputs.update((name, ["\t".join(row) for row in split]) for name, split in zip(names, splits))
    if unlabelled:
        outputs["data.txt"] = unlabelled
    label_path = os.path.join(args.save_dir, "label.txt")
    if args.label_file and os.path.realpath(args.label_file) == os.path.realpath(label_path):
        del outputs["label.txt"]  # it stands there already
    for name in names:
        if not outputs[name]:
            problems.warn(os.path.join(args.save_dir, name), None, "no rows for it", "more rows, or other --splits")
    check_files(args, path, outputs, problems)
    problems.report()
    write_files(args.save_dir, outputs)
    print(f"Finished! It takes {time.perf_counter() - started:.2f} seconds")
