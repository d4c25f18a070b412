"""What a running review does: shows cards, takes decisions, changes labels, learns on the side, applies. Needs no Paddle."""

import os
import shlex
import threading
from argparse import Namespace
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

import numpy as np

from textcls.analysis.review_compare import compare
from textcls.analysis.review_files import (
    ROLES,
    Rows,
    apply_decisions,
    data_path,
    find_unmatched,
    make_cards,
    next_commands,
    read_data,
    write_applied,
)
from textcls.analysis.review_journal import DECIDING, Decisions, Journal, Outcome, cohens_kappa
from textcls.analysis.review_queue import Queue
from textcls.analysis.review_scores import SEED, Model, Scores, fit_round
from textcls.analysis.selection import order_unlabelled
from textcls.common.digests import sha256
from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.common.texts import LABEL

ROUND = 25  # decisions from one model on the side to the next
STOP_TEXTS = 1000  # random texts on which the models of two rounds are compared
STOP_KAPPA, STOP_ROUNDS = 0.99, 3  # agreement of each of so many rounds with the one before, from which more changes little


class Stale(UserError):
    """The card was decided meanwhile by the same person, in another window."""


class Review:
    """The state of a review. Its methods may be called from several threads."""

    def __init__(self, args: Namespace, labels: list[str], data: dict[str, Rows], journal: Journal, scores: Scores,
                 model: Optional[Model], compared: Optional[tuple[np.ndarray, np.ndarray]]) -> None:
        """compared: label ids that the models before and after predict for dev, int64 [num_dev]."""
        self.args, self.labels, self.data, self.journal, self.scores, self.model = args, labels, data, journal, scores, model
        self.compared = compared
        self.decisions = Decisions(labels, journal.entries)
        self.cards = make_cards(data)
        self.queue = Queue(data, self.cards, scores, args.num_suspects, args.overlap)
        self.lock = threading.RLock()
        self.stamps = {role: stamp(rows.path) for role, rows in data.items()}
        self.rounds: list[float] = []  # kappa of each round with the one before
        self.answers: Optional[np.ndarray] = None  # of the last round
        self.learner = ThreadPoolExecutor(1)
        self.is_learning = False
        self.explained: dict[str, dict[str, Any]] = {}  # of cards
        self.wanted: dict[str, str] = {}  # person -> the card whose words were asked for last
        if any(self.decisions.outcome(key)[0] == "decided" for key in self.decisions.stacks):
            self.learn()

    # ---------------------------------------------------------------- what the page shows

    def state(self, who: str) -> dict[str, Any]:
        """Return all that is around the card."""
        with self.lock:
            decisions = self.decisions
            counts = np.bincount([card.label for card in self.cards.values() if card.label is not None] or [0],
                                 minlength=len(decisions.names))
            return {"labels": [describe_label(name) for name in decisions.names], "counts": counts.tolist(),
                    "files": {role: os.path.basename(rows.path) for role, rows in self.data.items()},
                    "can_explain": self.model is not None, "can_compare": self.compared is not None, **self.figures(who)}

    def figures(self, who: str) -> dict[str, Any]:
        """Return the figures that change with each decision."""
        decisions = self.decisions
        return {"progress": self.queue.progress(decisions), "own": decisions.count(who),
                "people": len(decisions.conflicts()), "skipped": len(self.queue.skipped(who, decisions)),
                "agreement": decisions.agreement(), "estimate": self.queue.estimate(decisions),
                "rounds": self.rounds[-STOP_ROUNDS:],
                "may_stop": len(self.rounds) >= STOP_ROUNDS and min(self.rounds[-STOP_ROUNDS:]) >= STOP_KAPPA,
                "num_labels": len(decisions.names), "changed_files": self.changed_files(),
                "unmatched": [entry["text"][:200] for entry in find_unmatched(decisions, self.cards)]}

    def changed_files(self) -> list[str]:
        """List the data files that are not any more what was read at the start."""
        changed = []
        for role, rows in self.data.items():
            now = stamp(rows.path)
            if now == self.stamps[role]:
                continue
            if now is not None and sha256(rows.path) == rows.hash:
                self.stamps[role] = now  # written again, or touched
            else:
                changed.append(rows.path)
        return changed

    def next_card(self, who: str, kind: str) -> Optional[dict[str, Any]]:
        """Return the next card of a kind for a person, None where none is left."""
        with self.lock:
            key = self.queue.next_card(who, kind, self.decisions)
            return self.show(key, who) if key else None

    def show(self, key: str, who: str) -> dict[str, Any]:
        self.queue.lease(key, who)
        return self.queue.show(key, who, self.decisions)

    def explain(self, who: str, key: str) -> dict[str, Any]:
        """Return the words of a card with their shades, as of `Model.explain`; no words where the person asks for another card's
        before the model is free. UserError where no model can say it."""
        if self.model is None or key not in self.cards:
            raise UserError("no model, or no such card, expected --params_path and a card of this review")
        self.wanted[who] = key
        found = self.explained.get(key) or self.model.explain(self.cards[key].text, lambda: self.wanted[who] == key)
        if found is None:
            return {"prediction": None, "words": []}
        self.explained[key] = found
        return found

    def comparison(self) -> list[dict[str, Any]]:
        """Return dev before and after, as of `compare`. UserError where there is nothing to compare."""
        if self.compared is None:
            raise UserError("nothing to compare, expected --compare_path with the model that was trained again")
        with self.lock:
            return compare(self.data["dev"], self.decisions, *self.compared)

    # ---------------------------------------------------------------- what the page does

    def decide(self, who: str, key: str, action: str, label: Optional[int], seen: int, seconds: float, final: bool) -> None:
        """Write a decision down and take it up. seen: number of the person's last entry on the card that the page knows; Stale
        where there is a later one. UserError."""
        with self.lock:
            decisions, card = self.decisions, self.cards.get(key)
            if card is None:
                raise UserError("no such card, expected one of this review: load the page again")
            has_label = label is not None and 0 <= label < len(decisions.names)
            if action not in (*DECIDING, "skip") or (action == "label" and not has_label):
                raise UserError(f"action {action!r} with label {label}, expected label with a label, keep, drop or skip")
            if action == "keep" and card.label is None:
                raise UserError("the text has no label to keep, expected a label")
            own = decisions.of(key).get(who)
            if (own.number if own else 0) != seen:
                raise Stale("this card was decided meanwhile in another window; here is the next one")
            after = label if action == "label" else card.label if action == "keep" else None
            candidates = self.queue.candidates(card)
            suggestion = [decisions.names[candidates[0][0]], round(candidates[0][1], 4)] if candidates else None
            content = {"who": who, "role": card.role, "text": card.text,
                       "before": decisions.names[card.label] if card.label is not None else None,
                       "after": decisions.names[after] if after is not None else None, "suggestion": suggestion,
                       "kind": self.queue.reasons.get(key, {"kind": "control"})["kind"], "seconds": round(seconds, 2)}
            self.take(action, **content, **({"final": True} if final else {}))
            total = sum(1 for entry in self.journal.entries if entry["action"] in DECIDING)
            if action in DECIDING and total % ROUND == 0:
                self.learn()

    def take(self, action: str, **content: Any) -> None:
        """Put an entry into the journal, on the disk, then take it up."""
        self.decisions.take(self.journal.append(action, **content))

    def undo(self, who: str) -> Optional[dict[str, Any]]:
        """Take a person's last decision back. Returns its card, None where there is nothing to undo."""
        with self.lock:
            while (key := self.decisions.last_card(who)) is not None:
                self.take("undo", who=who, undoes=self.decisions.of(key)[who].number)
                if key in self.cards:  # else it is of a file that has changed
                    return self.show(key, who)
            return None

    def change_label(self, who: str, name: str, label: Optional[int]) -> None:
        """Add a label, or rename one. label: its id, None for a new one. UserError."""
        with self.lock:
            if problem := LABEL.problem(name):
                raise UserError(f"label {name!r}: {problem}, expected {LABEL.expected}")
            if name in self.decisions.names or self.decisions.ids.get(name, label) != label:  # but its own
                raise UserError(f"label {name!r} is, or was, the name of a label, expected a new name")
            if label is None:
                self.take("add_label", who=who, label=name)
            elif 0 <= label < len(self.decisions.names):
                self.take("rename_label", who=who, before=self.decisions.names[label], after=name)
            else:
                raise UserError(f"label {label}, expected one of this review")

    def apply(self, overwrite: bool) -> dict[str, Any]:
        """Write the new files, from the data files as they are now. UserError."""
        with self.lock:
            return apply_now(self.args, self.journal, overwrite, self.data)

    # ---------------------------------------------------------------- learning on the side

    def learn(self) -> None:
        """Train a model of what is decided, in a thread of its own, unless one is still at it."""
        if not self.is_learning:
            self.is_learning = True
            self.learner.submit(self._learn)

    def _learn(self) -> None:
        try:
            self.run_round()
        except Exception as error:  # of a thread nobody waits for
            get_logger().warning(f"No model of the decisions so far ({error}).")
        finally:
            self.is_learning = False

    def run_round(self) -> None:
        """Train TF-IDF on the rows as they are decided: its answers say whether more decisions change anything, and where there
        is no checkpoint, which label an unlabelled text may have."""
        with self.lock:
            outcomes, num_labels = dict(self.decisions.outcomes), len(self.decisions.names)
        texts, label_ids, is_decided = self.labelled_rows(outcomes)
        if not texts:
            return
        targets = draw_texts(self.data)
        guides = self.model is None and "data" in self.data
        unlabelled = self.data["data"].texts if guides else []
        probs = fit_round(texts, np.array(label_ids), num_labels, np.array(is_decided), targets + unlabelled)
        answers = probs[:len(targets)].argmax(axis=1)
        own = probs[len(targets):]
        num_labelled = len(set(label_ids))
        order = order_unlabelled(unlabelled, self.scores.vectors[-len(unlabelled):], own) if guides and num_labelled > 1 else None
        with self.lock:
            if self.answers is not None:
                self.rounds.append(cohens_kappa(self.answers.tolist(), answers.tolist()))
            self.answers = answers
            if order is not None:
                self.scores.probs["data"] = own
                self.queue.reorder_unlabelled(order)

    def labelled_rows(self, outcomes: dict[str, Outcome]) -> tuple[list[str], list[int], list[bool]]:
        """Return texts, label ids and whether they are decided, of the cards of train and data that have a label.

        outcomes: of `Decisions`."""
        texts, label_ids, is_decided = [], [], []
        for key, card in self.cards.items():
            status, decision = outcomes.get(key, ("open", None))
            label = decision.label if decision else card.label
            if card.role != "dev" and label is not None and status != "conflict":
                texts.append(card.text)
                label_ids.append(label)
                is_decided.append(status == "decided")
        return texts, label_ids, is_decided


def stamp(path: str) -> Optional[tuple[int, int]]:
    """Return what changes when a file is written: time and size; None where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def describe_label(name: str) -> dict[str, str]:
    """Return a label's name with what finds it: its pinyin and the initials of that, lower case, letters and digits only."""
    from pypinyin import Style, lazy_pinyin

    def join(parts: list[str]) -> str:
        return "".join(filter(str.isalnum, "".join(parts).lower()))

    return {"name": name, "pinyin": join(lazy_pinyin(name)), "initials": join(lazy_pinyin(name, style=Style.FIRST_LETTER))}


def draw_texts(data: dict[str, Rows]) -> list[str]:
    """Draw the texts on which rounds are compared, the same each time: of data.txt and dev, of train where there is neither."""
    texts = [text for role in ("data", "dev") if role in data for text in data[role].texts] or data["train"].texts
    return [texts[index] for index in np.random.default_rng(SEED).permutation(len(texts))[:STOP_TEXTS]]


def apply_now(args: Namespace, journal: Journal, overwrite: bool, known: Iterable[str] = ()) -> dict[str, Any]:
    """Apply a journal to the data files as they are now: returns paths, counts and the next commands. UserError.

    known: roles of files that were there at the start; without one of them the new files would not be whole.
    """
    labels, data = read_data(args)
    reasons = dict.fromkeys(known, "it was there when review.py was started")
    reasons.update((entry["role"], "there are decisions on its rows") for entry in journal.entries if "role" in entry)
    missing = [role for role in ROLES if role in reasons and role not in data]
    if missing:
        raise UserError(f"{data_path(args, missing[0])}: file not found, and {reasons[missing[0]]}, expected it back; the "
                        f"decisions are in {args.journal}")
    applied = apply_decisions(args, labels, data, Decisions(labels, journal.entries))
    paths = write_applied(args, applied, overwrite)
    counts = {name: value for name, value in applied._asdict().items() if name != "outputs"}
    return {"paths": paths, **counts, "commands": [shlex.join(words) for words in next_commands(args, applied)]}
