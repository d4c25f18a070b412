"""Which card comes next, and what is on it. Needs no Paddle."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import numpy as np

from textcls.analysis.review_files import NO_LABEL, Card, Rows, has_label
from textcls.analysis.review_journal import Decision, Decisions, share_interval
from textcls.analysis.review_scores import SEED, Scores, nearest_of

KINDS = ("train", "duplicates", "dev", "data")  # of cards, in this order where a person works through all of them
BLOCK = 10  # of so many cards of a person one is drawn at random from the rows that nothing speaks against
LEASE_SECONDS = 600  # so long a card that one person has open is not shown to another
CANDIDATES = 9  # labels with a key of their own
Vote = tuple[str, Optional[str]]  # person, label, None: the row dropped


class Progress(NamedTuple):
    """How far the cards of a kind are decided."""

    decided: int
    total: int


class Queue:
    """The cards in their order. Which are control cards, drawn at random, is told to nobody who decides on them."""

    def __init__(self, data: dict[str, Rows], cards: dict[str, Card], scores: Scores, num_suspects: int, overlap: float) -> None:
        """num_suspects: train rows that are worth reading; overlap: share of the cards that every person gets."""
        self.data, self.cards, self.scores, self.overlap = data, cards, scores, overlap
        self.offsets = dict(zip(data, np.cumsum([0, *(len(rows.texts) for rows in data.values())]).tolist()))
        self.key_of_row = self.find_rows()
        self.reasons: dict[str, dict[str, Any]] = {}  # card -> why it is here
        self.order: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.fill(num_suspects)
        self.control = self.draw_control()
        self.is_control = set(self.control)
        self.leases: dict[str, tuple[str, float]] = {}  # card -> who has it open, since when

    def row_of(self, card: Card) -> int:
        """Return the row of a card in the vectors of `Scores`."""
        return self.offsets[card.role] + card.row

    def find_rows(self) -> list[str]:
        """Return the card of each row of the vectors."""
        found = [""] * sum(len(rows.texts) for rows in self.data.values())
        for key, card in self.cards.items():
            for line in card.lines:
                found[self.offsets[card.role] + line - 1] = key
        return found

    def add(self, kind: str, row: int, **reason: Any) -> None:
        """Put the card of a row at the end of a kind, unless it has its place already."""
        key = self.key_of_row[row]
        if key not in self.reasons:
            self.reasons[key] = {"kind": kind, **reason}
            self.order[kind].append(key)

    def fill(self, num_suspects: int) -> None:
        """Put all cards but the control cards in their order."""
        scores, train = self.scores, self.offsets.get("train", 0)
        for row in scores.suspects[:num_suspects].tolist():
            self.add("train", train + row)
        for group in scores.duplicates:
            for row in group:
                self.add("duplicates", train + row, lines=[other + 1 for other in group if other != row][:5])
        if "dev" in self.data and "dev" in scores.probs:
            probs, label_ids = scores.probs["dev"], self.data["dev"].label_ids
            wrong = np.flatnonzero(probs.argmax(axis=1) != label_ids)
            for row in wrong[np.argsort(-probs[wrong].max(axis=1), kind="stable")].tolist():
                self.add("dev", self.offsets["dev"] + row)
        for row in scores.unlabelled.tolist():
            self.add("data", self.offsets["data"] + row)
        self.order["data"] = [key for key in self.order["data"] if not has_label(key, self.cards)]

    def reorder_unlabelled(self, order: Iterable[int]) -> None:
        """Put the unlabelled cards into another order. order: rows of data.txt."""
        keys = [self.key_of_row[self.offsets["data"] + row] for row in order]
        self.order["data"] = [key for key in dict.fromkeys(keys) if not has_label(key, self.cards)]

    def draw_control(self) -> list[str]:
        """Return the cards of all other training rows in random order, the same in each run."""
        rest = [card.key for card in self.cards.values() if card.role == "train" and card.key not in self.reasons]
        return [rest[index] for index in np.random.default_rng(SEED).permutation(len(rest))]

    # ---------------------------------------------------------------- the next card

    def next_card(self, who: str, kind: str, decisions: Decisions) -> Optional[str]:
        """Return the next card of a kind for a person, None where none is left. kind: one of KINDS, all, people or skipped."""
        if kind == "people":
            def put_off(key: str) -> int:  # what the person has skipped comes last
                own = decisions.of(key).get(who)
                return own.number if own and own.action == "skip" else 0

            return min((key for key in decisions.conflicts() if key in self.cards), key=put_off, default=None)
        if kind == "skipped":
            return next(iter(self.skipped(who, decisions)), None)
        if kind in ("all", "train") and self.is_control_turn(who, decisions.count(who)):
            key = next((key for key in self.control if self.is_free(key, who, decisions)), None)
            if key:
                return key
        kinds = KINDS if kind == "all" else (kind,)
        return next((key for kind in kinds for key in self.order[kind] if self.is_free(key, who, decisions)), None)

    def is_control_turn(self, who: str, count: int) -> bool:
        """Tell whether the next card after `count` of a person is a control card: one of each BLOCK, at a random place of it."""
        block, place = divmod(count, BLOCK)
        seed = [SEED, block, *who.encode()]
        return place == int(np.random.default_rng(seed).integers(BLOCK))

    def is_free(self, key: str, who: str, decisions: Decisions) -> bool:
        """Tell whether a card is still to be decided by a person."""
        latest = decisions.of(key)
        if who in latest:
            return False
        if int(key[-8:], 16) < self.overlap * 2 ** 32:  # everybody gets it
            return True
        holder, since = self.leases.get(key, (who, 0.0))
        is_taken = holder != who and time.monotonic() - since < LEASE_SECONDS
        return not is_taken and not decisions.votes(key)

    def lease(self, key: str, who: str) -> None:
        """Note that a person has a card open, and no other one."""
        self.leases = {other: holder for other, holder in self.leases.items() if holder[0] != who}
        self.leases[key] = who, time.monotonic()

    def skipped(self, who: str, decisions: Decisions) -> list[str]:
        """List the cards that a person has put off."""
        return [key for key in decisions.stacks if key in self.cards and who in decisions.of(key)
                and decisions.of(key)[who].action == "skip" and decisions.outcome(key)[0] == "open"]

    # ---------------------------------------------------------------- what is on a card

    def show(self, key: str, who: str, decisions: Decisions) -> dict[str, Any]:
        """Return what the page needs to show a card, labels as ids. It does not tell a control card from a suspect row, nor what
        others have decided, but where they differ."""
        card, row = self.cards[key], self.row_of(self.cards[key])
        candidates = self.candidates(card)
        votes: list[Vote] = []
        if decisions.outcome(key)[0] == "conflict":
            votes = [(person, None if decision.label is None else decisions.names[decision.label])
                     for person, decision in decisions.votes(key).items()]
        own = decisions.of(key).get(who)
        reason = {**self.reasons.get(key, {"kind": "train"})}
        if card.label is not None and candidates:
            reason["probability"] = float(self.scores.probs[card.role][card.row][card.label])
        return {"key": key, "role": card.role, "text": card.text, "lines": card.lines[:5], "label": card.label,
                "labels": sorted(set(card.label_ids) - {NO_LABEL}), "candidates": candidates, "reason": reason, "votes": votes,
                "nearest": self.nearest(row, decisions), "seen": own.number if own else 0}

    def candidates(self, card: Card) -> list[tuple[int, float]]:
        """Return the likeliest labels of a card, best first: (id, probability); empty where no model says anything."""
        if card.role not in self.scores.probs:
            return []
        probs = self.scores.probs[card.role][card.row]
        return [(int(label), float(probs[label])) for label in np.argsort(-probs, kind="stable")[:CANDIDATES] if probs[label] > 0]

    def current_label(self, key: str, decisions: Decisions) -> Optional[int]:
        """Return the label of a card as it is decided, else as its file has it; None where it has none."""
        _, decision = decisions.outcome(key)
        return decision.label if decision and decision.label is not None else self.cards[key].label

    def nearest(self, row: int, decisions: Decisions) -> list[dict[str, Any]]:
        """Return the three nearest rows that have labels, with these as they are decided."""
        has_label = np.ones(len(self.key_of_row), bool)
        if "data" in self.data:
            start = self.offsets["data"]
            has_label[start:] = False
            for key in decisions.stacks:
                if key in self.cards and self.cards[key].role == "data" and decisions.outcome(key)[0] == "decided":
                    has_label[self.row_of(self.cards[key])] = True
        found = []
        for other, cosine in nearest_of(self.scores.vectors, row, has_label):
            card = self.cards[self.key_of_row[other]]
            found.append({"text": card.text[:300], "role": card.role, "line": other - self.offsets[card.role] + 1,
                          "label": self.current_label(card.key, decisions), "cosine": cosine})
        return found

    # ---------------------------------------------------------------- figures

    def progress(self, decisions: Decisions) -> dict[str, Progress]:
        """Return how many cards of each kind are decided."""
        done = {key for key in decisions.stacks if decisions.outcome(key)[0] != "open"}
        return {kind: Progress(sum(key in done for key in self.order[kind]), len(self.order[kind])) for kind in KINDS}

    def estimate(self, decisions: Decisions) -> dict[str, Any]:
        """Say how many labels are wrong among the training rows that nothing speaks against, by the control cards decided so far.

        Returns count, wrong, rest (the rows that stand for) and, from one card on, share, low and high (95 %, Clopper-Pearson).
        """
        counts, wrong = 0, 0
        for key in decisions.stacks:
            status, decision = decisions.outcome(key)
            # decided as one drawn at random: a row that was suspect with other options, or before it was mended, is none
            if (key in self.is_control and status == "decided" and decision is not None
                    and decision.entry.get("kind") == "control"):
                counts += 1
                wrong += decision.label != self.label_before(key, decision, decisions)
        found: dict[str, Any] = {"count": counts, "wrong": wrong, "rest": len(self.control)}
        if counts:
            found.update(share_interval(wrong, counts)._asdict())
        return found

    def label_before(self, key: str, decision: Decision, decisions: Decisions) -> Optional[int]:
        """Return the label that a card had when it was first decided on: the file may hold the decision already."""
        before = decision.entry.get("before")
        return self.cards[key].label if before is None else decisions.ids.get(before, NO_LABEL)
