"""What persons decided on rows: an append-only journal, what it says now, and how far the persons agree. Needs no Paddle."""

import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Optional

from textcls.common.errors import UserError
from textcls.common.log import get_logger

DECIDING = ("label", "keep", "drop")  # actions after which a row is decided
ACTIONS = (*DECIDING, "skip", "undo", "add_label", "rename_label", "opened")
Entry = dict[str, Any]  # a line of the journal


class Decision(NamedTuple):
    """What a person decided on a card, as far as it is not undone."""

    number: int  # of its entry in the journal
    who: str
    action: str  # one of DECIDING, or skip
    label: Optional[int]  # the label's id; None: drop and skip
    is_final: bool  # settles a conflict between persons
    entry: Entry


Outcome = tuple[str, Optional[Decision]]


class Interval(NamedTuple):
    """A share of a random sample and its interval of 95 %, all 0 to 1."""

    share: float
    low: float
    high: float


def card_key(role: str, text: str) -> str:
    """Name the card of a text. role: train, dev or data. Of equal texts of a file there is one card."""
    return f"{role}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


class Journal:
    """A file of JSON lines to which entries are only added, by one process at a time; what `append` returns is on the disk."""

    def __init__(self, path: str) -> None:
        """Open or make the file, and read its entries. UserError where it is no journal, or in use."""
        self.path = path
        try:
            self.file = open(path, "a+b")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}), expected a file in a writable folder") from None
        self.lock_file()
        self.lock = threading.Lock()
        self.entries: list[Entry] = self.read()

    def lock_file(self) -> None:
        """UserError while another process has the journal. Linux and macOS; elsewhere nothing is checked."""
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"{self.path}: another review.py is using it, expected its end, or another --journal") from None

    def read(self) -> list[Entry]:
        """Read all entries; a damaged last line, as a loss of power leaves one, is moved to a file beside. UserError."""
        self.file.seek(0)
        lines = self.file.read().split(b"\n")
        entries: list[Entry] = []
        for number, line in enumerate(lines[:-1], 1):
            entry = parse(line)
            if entry is None and number == len(lines) - 1 and not lines[-1]:
                self.set_aside(line + b"\n", number)
            elif entry is None:
                raise self.no_entry(number)
            else:
                entries.append(entry)
        if parse(lines[-1]):  # whole but for its line end
            self.file.write(b"\n")
            entries.append(json.loads(lines[-1]))
        elif lines[-1]:
            self.set_aside(lines[-1], len(lines))
        self.sync()
        return entries

    def no_entry(self, number: int) -> UserError:
        return UserError(f"{self.path}:{number}: no entry of a journal, expected a JSON object with an action, as review.py "
                         "writes it, or another --journal")

    def set_aside(self, rest: bytes, number: int) -> None:
        """Move the last line, `number` from 1, to a file beside the journal. UserError where it is no journal at all."""
        if number == 1 and not b'{"id"'.startswith(rest.strip(b"\0\n")[:5]):
            raise self.no_entry(1)
        beside = f"{self.path}.damaged"
        with open(beside, "ab") as file:
            file.write(rest.rstrip(b"\n") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.file.truncate(self.file.seek(0, os.SEEK_END) - len(rest))
        get_logger().warning(f"{self.path}: its last line is damaged, as after a loss of power; moved to {beside}. All decisions "
                             "before it are there.")

    def append(self, action: str, **content: Any) -> Entry:
        """Add an entry; it is on the disk when this returns. OSError, UserError where it cannot be; then it is not added."""
        with self.lock:
            self.check_place()
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            entry: Entry = {"id": len(self.entries) + 1, "time": now, "action": action, **content}
            end = self.file.seek(0, os.SEEK_END)
            try:
                self.file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                self.sync()
            except OSError:
                self.file.truncate(end)  # half a line, where the disk is full
                raise
            self.entries.append(entry)
            return entry

    def check_place(self) -> None:
        """UserError where the path does not lead to the file any more: what is added to it then would be lost."""
        try:
            is_there = os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except OSError:
            is_there = False
        if not is_there:
            raise UserError(f"{self.path}: was moved, deleted or replaced since review.py was started; this is not saved, "
                            "expected that file back, or review.py started again")

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def parse(line: bytes) -> Optional[Entry]:
    """Return the entry in a line, None where there is none."""
    try:
        entry = json.loads(line)
    except ValueError:  # UnicodeDecodeError too
        return None
    if not isinstance(entry, dict) or entry.get("action") not in ACTIONS or not isinstance(entry.get("id"), int):
        return None
    wanted = {"rename_label": ("before", "after"), "add_label": ("label",), "undo": ("who",), "opened": ()}
    names = wanted.get(entry["action"], ("who", "role", "text"))
    is_whole = all(isinstance(entry.get(name), str) for name in names)
    return entry if is_whole and isinstance(entry.get("after"), (str, type(None))) else None


class Decisions:
    """What the entries of a journal say now. Labels have ids: those of label.txt in its order, then those that were added."""

    def __init__(self, labels: Sequence[str], entries: Iterable[Entry] = ()) -> None:
        self.names = list(labels)  # as they are called now
        self.ids = {name: index for index, name in enumerate(labels)}  # of every name that a label ever had
        self.stacks: dict[str, dict[str, list[Decision]]] = {}  # card -> person -> decisions, the latest last
        self.outcomes: dict[str, Outcome] = {}  # of each card of stacks
        self.done: dict[str, list[str]] = {}  # person -> the cards of the decisions that can be undone, the latest last
        entries = list(entries)
        for entry in reversed(entries):  # a label.txt in which a label has its new name already
            if entry["action"] == "rename_label" and entry["before"] not in self.ids and entry["after"] in self.ids:
                self.ids[entry["before"]] = self.ids[entry["after"]]
        for entry in entries:
            self.take(entry)

    def take(self, entry: Entry) -> None:
        """Take an entry up."""
        action, who = entry["action"], entry.get("who", "")
        if action in (*DECIDING, "skip"):
            key = card_key(entry["role"], entry["text"])
            label = self.label_id(entry["after"]) if entry.get("after") is not None else None
            decision = Decision(entry["id"], who, action, label, bool(entry.get("final")), entry)
            self.stacks.setdefault(key, {}).setdefault(who, []).append(decision)
            self.done.setdefault(who, []).append(key)
            self.outcomes[key] = self.judge(key)
        elif action == "undo" and self.done.get(who):
            key = self.done[who].pop()
            self.stacks[key][who].pop()
            self.outcomes[key] = self.judge(key)
        elif action == "add_label":
            self.label_id(entry["label"])
        elif action == "rename_label":
            label = self.label_id(entry["before"])
            self.names[label] = entry["after"]
            self.ids[entry["after"]] = label

    def label_id(self, name: str) -> int:
        """Return the id of a label, which is added where it is new."""
        if name not in self.ids:
            self.ids[name] = len(self.names)
            self.names.append(name)
        return self.ids[name]

    def of(self, key: str) -> dict[str, Decision]:
        """Return the latest decision of each person on a card, skipping included."""
        return {who: stack[-1] for who, stack in self.stacks.get(key, {}).items() if stack}

    def votes(self, key: str) -> dict[str, Decision]:
        """Return the latest decision of each person on a card. Skipping it after that, where persons differ, takes none back."""
        deciding = {who: [decision for decision in stack if decision.action in DECIDING]
                    for who, stack in self.stacks.get(key, {}).items()}
        return {who: own[-1] for who, own in deciding.items() if own}

    def outcome(self, key: str) -> Outcome:
        """Return (open, decided or conflict; the decision that counts, None while there is none)."""
        return self.outcomes.get(key, ("open", None))

    def judge(self, key: str) -> Outcome:
        """Find the outcome of a card from what persons decided."""
        deciding = list(self.votes(key).values())
        if not deciding:
            return "open", None
        last_word = max((decision.number for decision in deciding if decision.is_final), default=0)
        counting = [decision for decision in deciding if decision.number >= last_word]  # what it settled is settled
        if len({decision.label for decision in counting}) == 1:
            return "decided", max(counting, key=lambda decision: decision.number)
        return "conflict", None

    def last_card(self, who: str) -> Optional[str]:
        """Return the card that an undo of this person would go back to."""
        return self.done[who][-1] if self.done.get(who) else None

    def count(self, who: str) -> int:
        """Return on how many cards a person has decided."""
        return sum(any(decision.action in DECIDING for decision in self.stacks[key][who]) for key in set(self.done.get(who, ())))

    def texts(self) -> dict[str, Entry]:
        """Return the entry that decides, or leaves undecided, of each card that somebody acted on."""
        return {key: max(latest.values(), key=lambda decision: decision.number).entry
                for key in self.stacks if (latest := self.of(key))}

    def conflicts(self) -> list[str]:
        """List the cards on which persons decided differently, none of whom had the last word."""
        return [key for key in self.stacks if self.outcome(key)[0] == "conflict"]

    def agreement(self) -> list[dict[str, Any]]:
        """Compare each two persons on the cards that both decided: dicts of persons, count, agreed (0 to 1) and kappa.

        kappa: Cohen's (1960), dropping a row being a label of its own; a decision that settles a conflict does not count.
        """
        answers: dict[str, dict[str, int]] = {}
        for key in self.stacks:
            for who, stack in self.stacks[key].items():
                own = [decision for decision in stack if decision.action in DECIDING and not decision.is_final]
                if own:
                    answers.setdefault(who, {})[key] = -1 if own[-1].label is None else own[-1].label
        found = []
        for first, second in itertools.combinations(sorted(answers), 2):
            both = sorted(answers[first].keys() & answers[second].keys())
            if both:
                one, other = ([answers[who][key] for key in both] for who in (first, second))
                found.append({"persons": [first, second], "count": len(both),
                              "agreed": sum(a == b for a, b in zip(one, other)) / len(both), "kappa": cohens_kappa(one, other)})
        return found


def cohens_kappa(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the agreement of two lists of labels beyond chance, at most 1; 1 where both only ever say the same label."""
    from sklearn.metrics import cohen_kappa_score

    return 1.0 if list(first) == list(second) else float(cohen_kappa_score(first, second))


def share_interval(hits: int, count: int) -> Interval:
    """Return the share of hits in a random sample of count rows, 1 or more, with the two-sided interval of Clopper and Pearson
    (Biometrika 26, 1934)."""
    from scipy.stats import beta

    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return Interval(hits / count, low, high)
