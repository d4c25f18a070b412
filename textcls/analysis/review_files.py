"""The data files of a review: read, decided rows put into new ones, exported. Needs no Paddle."""

import contextlib
import json
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple, Optional

import numpy as np

from textcls.analysis.review_journal import Decisions, Entry, card_key
from textcls.common.digests import sha256
from textcls.common.errors import Problems, UserError
from textcls.common.log import get_logger
from textcls.common.outputs import check_output, complete_file
from textcls.data.files import read_labelled, read_labels, read_lines, read_texts
from textcls.data.splitting import write_files

ROLES = ("train", "dev", "data")
JOURNAL, CHANGES = "review.jsonl", "review_changes.tsv"
CHANGES_HEADER = ("file", "line", "text", "before", "after", "who", "time", "note")
NO_LABEL = -1


class Rows(NamedTuple):
    """The rows of a data file."""

    path: str
    texts: list[str]
    label_ids: np.ndarray  # int64 [num_rows]; NO_LABEL throughout data.txt
    hash: str  # SHA-256 of the file


class Card(NamedTuple):
    """A text that can be decided on: all rows of a file that have it."""

    key: str
    role: str
    text: str
    label_ids: list[int]  # of its rows
    lines: list[int]  # from 1
    row: int  # its first one in the file, from 0

    @property
    def label(self) -> Optional[int]:
        """The label that the file gives, the first one where rows differ; None in data.txt."""
        return None if self.label_ids[0] == NO_LABEL else self.label_ids[0]


class Applied(NamedTuple):
    """What applying the decisions writes."""

    outputs: dict[str, list[str]]  # file name -> lines; none: no such file is to be there
    changed: int  # texts with another label than before
    dropped: int
    labelled: int  # texts of data.txt
    conflicts: int  # left as they were
    unmatched: int  # decided texts that are in no file any more


def data_path(args: Namespace, role: str) -> str:
    return os.path.join(args.dataset_dir, getattr(args, f"{role}_file"))


def read_data(args: Namespace) -> tuple[list[str], dict[str, Rows]]:
    """Read label.txt and what is there of train, dev and data.txt: (labels, {role: Rows}). UserError naming all problems."""
    problems, label_path = Problems(), os.path.join(args.dataset_dir, args.label_file)
    labels = read_labels(label_path, problems)
    found: dict[str, Rows] = {}
    for role in ROLES:
        path = data_path(args, role)
        if not os.path.exists(path):
            continue
        if role == "data":
            texts = list(read_texts(path, problems))
            label_ids = np.full(len(texts), NO_LABEL)
        else:
            texts, label_ids = read_labelled(path, [] if problems.count else labels, problems, label_path)
        found[role] = Rows(path, texts, label_ids, sha256(path))
    problems.report()
    if not found:
        names = ", ".join(getattr(args, f"{role}_file") for role in ROLES)
        raise UserError(f"{args.dataset_dir}: none of {names} is there, expected one with rows to decide on")
    return labels, found


def make_cards(data: dict[str, Rows]) -> dict[str, Card]:
    """Make the cards of all texts: {key: Card}, in the order of the files."""
    cards: dict[str, Card] = {}
    for role, rows in data.items():
        for index, (text, label) in enumerate(zip(rows.texts, rows.label_ids.tolist())):
            key = card_key(role, text)
            card = cards.setdefault(key, Card(key, role, text, [], [], index))
            card.label_ids.append(label)
            card.lines.append(index + 1)
    return cards


def has_label(key: str, cards: dict[str, Card]) -> bool:
    """Return whether the text of a card of data.txt is in train or dev, too."""
    return any(card_key(role, cards[key].text) in cards for role in ("train", "dev"))


def find_unmatched(decisions: Decisions, cards: dict[str, Card]) -> list[Entry]:
    """List the entries of decided texts that are in none of the files any more. A text may be in another file by now: those of
    data.txt that were labelled and applied are."""
    return [entry for key, entry in decisions.texts().items()
            if key not in cards and not any(card_key(role, entry["text"]) in cards for role in ROLES)]


def check_journal(path: str, decisions: Decisions, cards: dict[str, Card]) -> list[Entry]:
    """Return and log what no longer matches. UserError where nothing does: the journal is one of other data."""
    acted, unmatched = decisions.texts(), find_unmatched(decisions, cards)
    if acted and len(unmatched) == len(acted):
        raise UserError(f"{path}: none of the {len(acted)} texts decided there is in these data files, so it is the journal of "
                        "other data, expected another --journal")
    if unmatched:
        shown = "; ".join(f"{entry['role']}: {entry['text'][:40]}" for entry in unmatched[:5])
        get_logger().warning(f"{path}: {len(unmatched)} of the {len(acted)} decided texts are in no data file any more; they "
                             f"stay in the journal, and --apply lists them: {shown}{' ...' if len(unmatched) > 5 else ''}")
    return unmatched


def read_suspects(path: str, train: Rows) -> np.ndarray:
    """Read the report of dirty.py (--report_file): the train rows that it lists, in its order, int64. UserError."""
    problems, rows = Problems(), {text: row for row, text in reversed(list(enumerate(train.texts)))}
    lines = [line.split("\t") for _, line in read_lines(path, problems)]
    problems.report()
    if lines[0][:4] != ["rank", "line", "score", "text"]:
        raise UserError(f"{path}:1: not the header of a report of dirty.py, expected its --report_file")
    texts = [line[3] for line in lines[1:] if len(line) > 3]
    found = [rows[text] for text in texts if text in rows]
    if len(found) < len(texts):
        get_logger().warning(f"{path}: {len(texts) - len(found)} of its {len(texts)} texts are not in {train.path}.")
    return np.array(list(dict.fromkeys(found)), np.int64)


# ---------------------------------------------------------------- applying


def reviewed_name(name: str) -> str:
    """Name the file that is written beside a data file: train.txt -> train_reviewed.txt -> train_reviewed2.txt."""
    stem, ending = re.fullmatch(r"(.*?)(\.[^.]*)?", name, re.DOTALL).groups()  # type: ignore[union-attr]
    number = re.search(r"_reviewed(\d*)$", stem)
    if number:
        return f"{stem[:number.start()]}_reviewed{int(number.group(1) or 1) + 1}{ending or ''}"
    return f"{stem}_reviewed{ending or ''}"


def apply_decisions(args: Namespace, labels: list[str], data: dict[str, Rows], decisions: Decisions) -> Applied:
    """Put the decisions into the rows. The order of the rows stays; labelled texts of data.txt, but those that
    train or dev hold already, follow at the end of train."""
    cards = make_cards(data)
    rows: dict[str, list[str]] = {"train": [], **{role: [] for role in data}}
    changes: list[tuple[str, ...]] = []
    counts = dict.fromkeys(("changed", "dropped", "labelled", "conflicts"), 0)
    labelled: list[str] = []
    for role, file in data.items():
        for line, (text, own) in enumerate(zip(file.texts, file.label_ids.tolist()), 1):
            key = card_key(role, text)
            status, decision = decisions.outcome(key)
            before = decisions.names[own] if own != NO_LABEL else ""
            after = decisions.names[decision.label] if decision and decision.label is not None else "" if decision else before
            note = "conflict" if status == "conflict" else "drop" if decision and decision.action == "drop" else ""
            is_first = cards[key].lines[0] == line
            if note or after != before:
                changes.append((os.path.basename(file.path), str(line), text, labels[own] if before else "", after,
                                decision.who if decision else " / ".join(decisions.of(key)),
                                decision.entry["time"] if decision else "", note))
                kind = "conflicts" if note == "conflict" else "dropped" if note else "changed" if before else "labelled"
                counts[kind] += is_first
            elif own != NO_LABEL and after != labels[own]:
                changes.append((os.path.basename(file.path), str(line), text, labels[own], after, "", "", "rename"))
            if note != "drop":
                if role == "data" and after:
                    labelled += [f"{text}\t{after}"] if is_first and not has_label(key, cards) else []
                else:
                    rows[role].append(f"{text}\t{after}" if role != "data" else text)
    rows["train"] += labelled
    unmatched = find_unmatched(decisions, cards)
    changes += [(entry["role"], "", entry["text"], entry.get("before") or "", entry.get("after") or "", entry["who"],
                 entry["time"], "not found") for entry in unmatched]
    outputs = {reviewed_name(args.label_file): label_lines(args, labels, decisions)}
    outputs.update((reviewed_name(getattr(args, f"{role}_file")), lines) for role, lines in rows.items())
    outputs[CHANGES] = ["\t".join(row) for row in (CHANGES_HEADER, *changes)]
    return Applied(outputs, **counts, unmatched=len(unmatched))


def label_lines(args: Namespace, labels: list[str], decisions: Decisions) -> list[str]:
    """Return the lines of the new label.txt: its own with their words (`label==word`), renamed, and the added ones."""
    path, lines = os.path.join(args.dataset_dir, args.label_file), []
    for _, line in read_lines(path, Problems()):
        label, *words = line.split("==")
        lines.append("==".join([decisions.names[decisions.ids[label]], *words]))
    return lines + decisions.names[len(labels):]


def write_applied(args: Namespace, applied: Applied, overwrite: bool) -> list[str]:
    """Write the new files and return their paths; a file from before of which no row is left is removed. UserError where some
    are there and may not be replaced."""
    paths = {name: os.path.join(args.dataset_dir, name) for name in applied.outputs}
    there = [path for path in paths.values() if os.path.lexists(path)]
    if there and not overwrite:
        raise UserError(f"{', '.join(there)}: there from before, expected --overwrite, or these files moved away")
    for path in paths.values():
        check_output(path, [data_path(args, role) for role in ROLES] + [args.journal], args.dataset_dir)
    written = {name: lines for name, lines in applied.outputs.items() if lines}
    write_files(args.dataset_dir, written)
    for name in applied.outputs.keys() - written.keys():
        with contextlib.suppress(FileNotFoundError):
            os.remove(paths[name])
    return [paths[name] for name in written]


def same_options(args: Namespace) -> list[str]:
    """Return the options by which another review.py reads the same files and decisions."""
    words = ["--dataset_dir", args.dataset_dir]
    for role in (*ROLES, "label"):
        if getattr(args, f"{role}_file") != f"{role}.txt":
            words += [f"--{role}_file", getattr(args, f"{role}_file")]
    return words if args.journal == os.path.join(args.dataset_dir, JOURNAL) else [*words, "--journal", args.journal]


def next_commands(args: Namespace, applied: Applied) -> list[list[str]]:
    """Return the commands to train again and to compare, as lists of words; without a dev file, to split the rows first."""
    names = {role: reviewed_name(getattr(args, f"{role}_file")) for role in (*ROLES, "label")}
    if not applied.outputs.get(names["dev"]):
        return [["python", "analysis/review.py", *same_options(args), "--export", "doccano", "--export_file", "reviewed.jsonl"],
                ["python", "data/doccano.py", "--doccano_file", "reviewed.jsonl", "--save_dir", "reviewed_data",
                 "--splits", "0.9", "0.1"],
                ["python", "train.py", "--data_dir", "reviewed_data", "--output_dir", "checkpoint_reviewed", "--do_train",
                 "--do_eval"]]
    models = (["--params_path", args.params_path, "--compare_path", "checkpoint_reviewed"] if args.params_path else
              ["--params_path", "checkpoint_reviewed"])  # nothing to compare with
    return [["python", "train.py", "--data_dir", args.dataset_dir, "--train_file", names["train"], "--dev_file", names["dev"],
             "--label_file", names["label"], "--output_dir", "checkpoint_reviewed", "--do_train", "--do_eval"],
            ["python", "analysis/review.py", *same_options(args), *models]]


# ---------------------------------------------------------------- exporting


def decided_rows(data: dict[str, Rows], decisions: Decisions) -> Iterator[tuple[str, Optional[str]]]:
    """Yield (text, label or None) of all rows as they are decided, each card once; left out are dropped rows, and texts of
    data.txt that train or dev hold already."""
    cards = make_cards(data)
    for key, card in cards.items():
        _, decision = decisions.outcome(key)
        if card.role == "data" and has_label(key, cards):
            continue
        if decision is None:
            for label in dict.fromkeys(card.label_ids):
                yield card.text, None if label == NO_LABEL else decisions.names[label]
        elif decision.label is not None:
            yield card.text, decisions.names[decision.label]


def export_rows(form: str, path: str, data: dict[str, Rows], decisions: Decisions) -> int:
    """Write all rows for doccano (JSONL) or Label Studio (JSON): data/doccano.py, data/table.py read them. Returns how many."""
    rows = list(decided_rows(data, decisions))
    with complete_file(path, newline="\n") as output:
        if form == "doccano":
            for text, label in rows:
                output.write(json.dumps({"text": text, "label": [label] if label else []}, ensure_ascii=False) + "\n")
        else:
            tasks = [{"data": {"text": text}, "annotations": [{"result": [
                {"from_name": "label", "to_name": "text", "type": "choices", "value": {"choices": [label]}}]}] if label else []}
                for text, label in rows]
            json.dump(tasks, output, ensure_ascii=False, indent=1)
    return len(rows)
