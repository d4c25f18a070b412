"""What index.py has changed in an index and the data files may not say yet: kept in index.json, and carried over into them.

It is kept as what it comes to, not as a list of steps. Needs no Paddle.
"""

import copy
import os
import unicodedata
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.outputs import complete_file
from textcls.data.files import LabelledTexts

KINDS = {"new": list, "renamed": dict, "removed": list, "added": dict, "described": dict}
MOST_SHOWN = 8  # labels in a message
Pending = dict[str, Any]  # of KINDS: new labels, {name as built: name now}, names as built, {label: texts}, {label: words}
Row = tuple[str, str]  # (text, label)


class DataFiles(NamedTuple):
    """The content of label.txt, train.txt and dev.txt."""

    words: dict[str, list[str]]  # {label: its descriptions and synonyms}, in the order of the ids
    train: list[Row]
    dev: list[Row]


class Change(NamedTuple):
    """A change that the data files lack."""

    kind: str  # label: a new label, add: a training text, describe: a word, rename: text is the new name, remove: a text or, "",
    label: str  # the label itself
    text: str


def no_changes() -> Pending:
    return {name: kind() for name, kind in KINDS.items()}


def is_pending(value: object) -> bool:
    """Whether this is what index.json holds: None (changed by an edition that kept no list), or a Pending."""
    return value is None or (isinstance(value, dict) and all(type(value[name]) is kind for name, kind in KINDS.items()))


def note_texts(pending: Optional[Pending], label: str, is_new: bool, texts: Iterable[str], words: Iterable[str]
               ) -> Optional[Pending]:
    """Note that texts were added to a label, which may be a new one, and words to what describes it."""
    if pending is None:
        return None
    pending = copy.deepcopy(pending)
    if is_new:
        pending["new"].append(label)
    for kind, items in (("added", texts), ("described", words)):
        if together := list(dict.fromkeys([*pending[kind].get(label, []), *items])):
            pending[kind][label] = together
    return pending


def note_name(pending: Optional[Pending], old: str, new: Optional[str]) -> Optional[Pending]:
    """Note that a label was renamed; new: None: that it was removed."""
    if pending is None:
        return None
    pending = copy.deepcopy(pending)
    for kind in ("added", "described"):
        own = pending[kind].pop(old, None)
        if own and new is not None:
            pending[kind][new] = own
    if old in pending["new"]:
        pending["new"] = [new if name == old else name for name in pending["new"] if name != old or new is not None]
        return pending
    origin = next((built for built, now in pending["renamed"].items() if now == old), old)
    pending["renamed"].pop(origin, None)
    if new is None:
        pending["removed"].append(origin)
    elif new != origin:
        pending["renamed"][origin] = new
    return pending


def settle(pending: Optional[Pending]) -> Optional[Pending]:
    """What is kept of changes that the data files have: the texts, which they would lack if they were put back. Names that have
    changed are not kept, since a name may now be that of another label."""
    return pending and {**no_changes(), "added": pending["added"], "described": pending["described"]}


def names_to_come(pending: Pending, words: Iterable[str]) -> list[str]:
    """The labels that label.txt lacks and will have: after a kill the rows may have them already. words: the labels of it."""
    known = set(words)
    names = [new for old, new in pending["renamed"].items() if old in known]
    return [name for name in dict.fromkeys([*names, *pending["new"], *pending["added"], *pending["described"]])
            if name not in known]


def is_done(pending: Pending, old: str, words: Iterable[str]) -> bool:
    """Whether the data files have a renaming already, so that `old` in them is another label: a new one, or one renamed to that.

    words: the labels of label.txt. What was renamed to a name whose label was renamed, too, is followed to the last name.
    """
    renamed = pending["renamed"]
    name, names = old, set()
    while name in renamed and name not in names:
        names.add(name)
        name = renamed[name]
    if name in names:  # labels have changed their names with each other, which looks the same before and after
        return False
    return (old in pending["new"] or old in renamed.values()) and name in words and name not in pending["removed"]


def carry_over(pending: Pending, data: DataFiles) -> tuple[DataFiles, list[Change]]:
    """Carry the changes of an index over into the data files: (what they then hold, what they lacked). UserError."""
    changes: list[Change] = []
    moved: dict[str, Optional[str]] = {}
    for old, new in pending["renamed"].items():
        if old in data.words and not is_done(pending, old, data.words):
            moved[old] = new
            changes.append(Change("rename", old, new))
    moved.update((old, None) for old in pending["removed"] if old in data.words)
    changes += [Change("remove", old, "") for old, new in moved.items() if new is None and old not in pending["new"]]
    own = {(text, label) for label in pending["new"] for text in pending["added"].get(label, [])}  # of new labels of old names

    def move(rows: list[Row]) -> list[Row]:
        kept = []
        for text, label in rows:
            name = label if (text, label) in own else moved.get(label, label)
            if name is None:
                changes.append(Change("remove", label, text))
            else:
                kept.append((text, name))
        return kept

    words: dict[str, list[str]] = {}
    for label, descriptions in data.words.items():
        name = moved.get(label, label)
        if name is not None:
            words[name] = list(dict.fromkeys([*words.get(name, []), *descriptions]))
        elif label in pending["new"]:  # removed, and added anew
            words[label] = [word for word in descriptions if word in pending["described"].get(label, [])]
    train, dev = move(data.train), move(data.dev)
    for label in dict.fromkeys([*pending["new"], *pending["added"], *pending["described"]]):
        if label not in words:
            check_letters(label, words)
            words[label] = []
            if label not in data.words:
                changes.append(Change("label", label, ""))
    present = set(train)
    added = [(text, label) for label, texts in pending["added"].items() for text in texts if (text, label) not in present]
    changes += [Change("add", label, text) for text, label in added]
    for label, descriptions in pending["described"].items():
        lacking = [word for word in descriptions if word not in words[label]]
        words[label] += lacking
        changes += [Change("describe", label, word) for word in lacking]
    return DataFiles(words, train + added, dev), changes


def check_letters(name: str, labels: Iterable[str]) -> None:
    """UserError where a new label is one of `labels` but for full-width letters, upper case and blanks."""
    folded = fold(name)
    for label in labels:
        if label != name and fold(label) == folded:
            raise UserError(f"label {name!r}: is the label {label!r} in other letters, expected that name, or one that "
                            "differs in more than width, case and blanks")


def fold(name: str) -> str:
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())


def texts_of_two_labels(changes: Iterable[Change], train: Iterable[Row]) -> list[tuple[str, list[str]]]:
    """The added texts that are training texts of several labels: list of (text, labels). train: with the changes."""
    labels: dict[str, list[str]] = {change.text: [] for change in changes if change.kind == "add"}
    for text, label in dict.fromkeys(train):
        if text in labels:
            labels[text].append(label)
    return [(text, own) for text, own in labels.items() if len(own) > 1]


def summarize(changes: Iterable[Change]) -> list[str]:
    """Say what is changed, a line for each label."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for kind, label, text in changes:
        kinds.setdefault(label, {}).setdefault(kind, []).append(text)
    lines = []
    for label, own in kinds.items():
        parts = ["new label"] if "label" in own else []
        parts += [f"renamed to {own['rename'][0]}"] if "rename" in own else []
        removed = own.get("remove", [])
        parts += ["label removed"] if "" in removed else []
        for texts, noun, verb in (([text for text in removed if text], "text", "removed"), (own.get("add", []), "text", "added"),
                                  (own.get("describe", []), "description", "added")):
            parts += [f"{len(texts)} {noun}{'s' if len(texts) > 1 else ''} {verb}"] if texts else []
        lines.append(f"{label}: {', '.join(parts)}")
    return lines


def summarize_briefly(changes: Iterable[Change]) -> str:
    """As `summarize`, in one line, the first MOST_SHOWN labels."""
    lines = summarize(changes)
    more = [f"{len(lines) - MOST_SHOWN} more labels"] if len(lines) > MOST_SHOWN else []
    return "; ".join(lines[:MOST_SHOWN] + more)


def name_rows(rows: Optional[LabelledTexts], labels: list[str]) -> list[Row]:
    """Rows with the names of their labels. rows: as of read_labelled; None: there are none."""
    return [] if rows is None else [(text, labels[label]) for text, label in zip(rows[0], rows[1].tolist())]


def number_rows(rows: list[Row], labels: Iterable[str]) -> LabelledTexts:
    """The reverse of `name_rows`."""
    ids = {label: number for number, label in enumerate(labels)}
    return [text for text, _ in rows], np.array([ids[label] for _, label in rows], np.int64)


def write_data_files(folder: str, data: DataFiles, old: DataFiles) -> None:
    """Write those of label.txt, train.txt and dev.txt that differ from old, all of them complete before the first is replaced;
    label.txt is the last, so that `names_to_come` says what rows of an earlier run have."""
    lines = {"label.txt": ["==".join([label, *words]) for label, words in data.words.items()] if data.words != old.words else [],
             "train.txt": ["\t".join(row) for row in data.train] if data.train != old.train else [],
             "dev.txt": ["\t".join(row) for row in data.dev] if data.dev != old.dev else []}
    with ExitStack() as files:
        for name, content in lines.items():
            if content:
                file = files.enter_context(complete_file(os.path.join(folder, name), newline="\n"))
                file.writelines(line + "\n" for line in content)
