"""Turn a doccano export of a text classification project into the data files of train.py.

    python data/doccano.py --doccano_file doccano.jsonl --save_dir ./data --splits 0.8 0.1 0.1
    python data/doccano.py --doccano_file doccano.jsonl --save_dir ./data --splits 0.9 0.1 --label_file old/label.txt

Reads   doccano_file: JSONL (one object per line) or one JSON array of objects, UTF-8. The text stands under `text`,
        `data` or `column_data`; the label under `label`, `labels` or `column_label`: a list of strings or one string.
Writes  save_dir/: train.txt, dev.txt, test.txt (<text><tab><label>; a split of 0 or not given is not written),
        label.txt (one label per line, line order = class id), data.txt (texts without a label, if there are any).

The split is stratified by label, shuffled, and the same for the same export, options and seed. Rows with several labels
and texts that occur with different labels are reported and left out; rows without a label are reported too. Broken rows
(no JSON, no text, spans instead of labels, ...) are all reported; then nothing is written and the exit code is 2.
"""

import argparse
import contextlib
import json
import os
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import read_labels, read_lines
from textcls.errors import Problems, UserError, run_script
from textcls.outputs import complete_file

SPLITS = ("train.txt", "dev.txt", "test.txt")
TEXT_KEYS = ("text", "data", "column_data")
LABEL_KEYS = ("label", "labels", "column_label")
BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")  # a tab, and all that str.splitlines() splits at
ONE_LABEL = "exactly one label (a list of one string, or a string)"


def parse_arguments():
    """Options from the command line. Raises UserError."""
    parser = argparse.ArgumentParser(description="Turn a doccano export into the data files of train.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--doccano_file", default="doccano.jsonl", help="Export of doccano: JSONL or a JSON array.")
    parser.add_argument("--save_dir", default="./data", help="Folder for the files written.")
    parser.add_argument("--splits", type=float, nargs="+", default=[0.8, 0.1, 0.1], metavar="SHARE",
                        help="Shares of train, dev and test, which sum to 1; the last ones may be left out.")
    parser.add_argument("--seed", type=int, default=3, help="Seed of the split and of the shuffling.")
    parser.add_argument("--label_file", help="Existing label.txt whose labels and order are kept; without it the "
                                             "labels stand in the order of their first appearance in the export.")
    parser.add_argument("--overwrite", action="store_true", help="Replace files that exist in save_dir.")
    args = parser.parse_args()
    shares = args.splits
    wrong = ("too many numbers" if len(shares) > 3 else
             "a number is out of range" if not all(0 <= share <= 1 for share in shares) or shares[0] == 0 else
             f"the sum is {sum(shares):.9g}" if abs(sum(shares) - 1) > 1e-6 else None)
    if wrong:
        raise UserError(f"--splits {' '.join(f'{share:g}' for share in shares)}: {wrong}, expected 1 to 3 numbers from "
                        "0 to 1 (train, dev, test; train more than 0) that sum to 1, e.g. --splits 0.8 0.1 0.1")
    return args


def read_rows(path, problems):
    """Yield (place, row) for each JSON value of the export; *place are the first two arguments of Problems.add."""
    lines = dict(read_lines(path, problems))  # number -> line
    if next(filter(str.strip, lines.values()), "").lstrip().startswith("["):
        # Without its unsound lines, which are reported already, an array would be no JSON.
        lines = {} if problems.count else {None: "\n".join(lines.values())}
    for number, text in lines.items():
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            wrong = f"invalid JSON ({getattr(error, 'msg', error)})"
            problems.add(path, number or getattr(error, "lineno", None), wrong, "one JSON object per line or one array")
            continue
        if number:
            yield (path, number), value
        else:
            yield from (((f"{path}: row {index}", None), row) for index, row in enumerate(value, 1))


def pick(row, keys):
    """Value under that of `keys` which the row has. Raises ValueError(wrong, expected)."""
    found = [key for key in keys if key in row]
    expected = f"the key {', '.join(map(repr, keys[:-1]))} or {keys[-1]!r}"
    if not found:
        raise ValueError(f"no {keys[0]}", expected)
    if any(row[key] != row[found[0]] for key in found):
        raise ValueError(f"{' and '.join(map(repr, found))} differ", f"only one of these keys for the {keys[0]}")
    return row[found[0]]


def read_row(row, labels):
    """Return (text, list of labels) of a row; labels: those allowed, or None. Raises ValueError(wrong, expected)."""
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}", "an object with a text and a label")
    text, found = pick(row, TEXT_KEYS), pick(row, LABEL_KEYS)
    if not isinstance(text, str):
        raise ValueError(f"the text is a JSON {type(text).__name__}", "a string")
    if not text.strip().strip("\ufeff"):
        raise ValueError("empty text", "a text to classify")
    found = [] if found is None or found == "" else [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        spans = isinstance(found, list) and any(isinstance(label, (list, dict)) for label in found)
        wrong = "spans of sequence labelling" if spans else "not strings"
        raise ValueError(f"the labels are {wrong}", f"text classification: {ONE_LABEL}")
    if any(re.search("[\0\ud800-\udfff]", value) for value in (text, *found)):
        raise ValueError("a NUL or half a character (lone surrogate)", "characters that a UTF-8 text file can hold")
    for label in found:
        # A byte order mark would vanish when label.txt is read again.
        if not label.strip() or label != label.strip().strip("\ufeff") or BREAKS.search(label):
            wrong = f"label {label!r} is empty, has blanks around it, a tab or a line break"
            raise ValueError(wrong, "a label on one line, without blanks around it")
        if labels is not None and label not in labels:
            raise ValueError(f"label {label!r} is not in --label_file", f"one of its {len(labels)} labels")
    return text, list(dict.fromkeys(found))


def read_export(path, labels, problems):
    """Read and check the export; prints the warnings about single rows and, unless there are problems, their numbers.

    Returns (texts: dict text -> label, unlabelled: list of texts), both in the order of the file, each text once.
    """
    places, texts, unlabelled, conflicts = {}, {}, {}, set()
    none, several, different = kinds = Problems(), Problems(), Problems()
    rows = repeated = joined = 0
    for place, row in read_rows(path, problems):
        rows += 1
        try:
            text, found = read_row(row, labels)
        except ValueError as error:
            problems.add(*place, *error.args)
            continue
        if BREAKS.search(text):
            text, joined = BREAKS.sub(" ", text).strip(), joined + 1
        if not found:
            none.warn(*place, "no label", ONE_LABEL)
            unlabelled[text] = None
        elif len(found) > 1:
            several.warn(*place, f"{len(found)} labels {found}", ONE_LABEL)
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
    for count, meaning in counts:
        if count:
            print(f"{meaning}: {count}")
    texts = {text: label for text, label in texts.items() if text not in conflicts}
    if not texts:
        raise UserError(f"{path}: none of {rows} rows is usable, expected at least one text with {ONE_LABEL}")
    return texts, list(unlabelled)


def share_out(count, shares, given):
    """Numbers of rows (at least 1 each) that a class of `count` rows gives to the splits; given: those given so far."""
    numbers = [max(1, int(count * share + 1e-9)) for share in shares]
    while sum(numbers) > count:
        numbers[numbers.index(max(numbers))] -= 1
    # What rounding leaves over goes where most is missing in total: many small classes would else distort the shares.
    total = sum(given) + count
    surplus = [given[index] + numbers[index] - share * total for index, share in enumerate(shares)]
    for index in sorted(range(len(shares)), key=surplus.__getitem__)[:count - sum(numbers)]:
        numbers[index] += 1
    return numbers


def split_texts(texts, labels, shares, seed, problems):
    """Split {text: label} by `shares`, stratified; returns one shuffled list of (text, label) per share."""
    rng = random.Random(str(seed))  # as an int, -3 would be the same seed as 3
    by_label = {label: [] for label in labels}
    for text, label in texts.items():
        by_label[label].append((text, label))
    splits = [[] for _ in shares]
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


def check_outputs(args, names, problems):
    """Add to `problems` what must not be replaced, and warn of files that do not belong to this split."""
    inputs = {os.path.realpath(path) for path in (args.doccano_file, args.label_file) if path}
    for name in (*SPLITS, "label.txt", "data.txt"):
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


def write_outputs(save_dir, outputs):
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


def main():
    started = time.perf_counter()
    args = parse_arguments()
    problems = Problems()
    labels = read_labels(args.label_file, problems) if args.label_file else None
    problems.report()  # without sound labels every row would be reported
    texts, unlabelled = read_export(args.doccano_file, labels, problems)
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
    check_outputs(args, outputs, problems)
    problems.report()
    write_outputs(args.save_dir, outputs)
    print(f"Finished! It takes {time.perf_counter() - started:.2f} seconds")


if __name__ == "__main__":
    run_script(main)
