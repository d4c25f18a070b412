"""Tokenized texts and batches: what is done with texts before a model sees them."""

import array
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional, Union

import numpy as np

from textcls.common.log import Progress, progress_bar
from textcls.common.long_texts import join_windows
from textcls.data.encoders import Encoder, split_texts

SHORTEST_LENGTH, DEFAULT_LENGTH = 3, 128  # tokens: the least max_seq_length, and what it is where nobody says

MapBatches = Callable[[Callable, Iterable], Iterable]  # like `map`


class TokenizedTexts:
    """Token ids of many texts, kept flat: 4 bytes a token, where a list of lists takes 40. A row is a text, or a window of one.

    ids: int32 [num_tokens]; offsets: int64 [num_rows + 1]; labels: [num_rows, ...] or None. owners: int64 [num_rows], rising: the
    number of each row's text; None: each row is a text. vote: how the answers for windows become that of their text.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, labels: Optional[np.ndarray] = None,
                 owners: Optional[np.ndarray] = None, vote: str = "mean"):
        self.ids, self.offsets, self.labels, self.owners, self.vote = ids, offsets, labels, owners, vote
        self.lengths = np.diff(offsets)  # int64 [num_rows], special tokens included

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> "TokenizedTexts":
        """Pack texts that a tokenizer has turned into rows of ids."""
        return cls.from_windows([[row] for row in rows])

    @classmethod
    def from_windows(cls, texts: Sequence[Sequence[Sequence[int]]], vote: str = "mean") -> "TokenizedTexts":
        """Pack texts of one or more windows each."""
        rows = [row for windows in texts for row in windows]
        offsets = np.cumsum([0, *map(len, rows)])
        owners = np.repeat(np.arange(len(texts)), [len(windows) for windows in texts]) if len(rows) > len(texts) else None
        return cls(np.fromiter(itertools.chain.from_iterable(rows), np.int32, offsets[-1]), offsets, None, owners, vote)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"input_ids": int32 [length], "labels": int64 scalar (where there are labels), "owners": the number of the row's
        text (where texts have several rows)}"""
        item = {"input_ids": self.ids[self.offsets[index]:self.offsets[index + 1]]}
        if self.owners is not None:
            item["owners"] = self.owners[index]
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The first row of each text, and the number of rows: int64 [num_texts + 1]."""
        if self.owners is None:
            return np.arange(len(self) + 1)
        return np.concatenate([np.flatnonzero(self.is_first), [len(self)]])

    @functools.cached_property
    def is_first(self) -> np.ndarray:
        """Whether a row is the first of its text: bool [num_rows]."""
        return np.ones(len(self), bool) if self.owners is None else np.diff(self.owners, prepend=-1) > 0

    @functools.cached_property
    def text_lengths(self) -> np.ndarray:
        """The tokens of each text, all its windows together: int64 [num_texts]."""
        return self.lengths if self.owners is None else np.add.reduceat(self.lengths, self.starts[:-1])

    @property
    def num_texts(self) -> int:
        """How many texts there are."""
        return len(self) if self.owners is None else int(self.owners[-1]) + 1

    @property
    def text_labels(self) -> np.ndarray:
        """The labels of the texts: [num_texts, ...]."""
        assert self.labels is not None
        return self.labels[self.starts[:-1]]

    def select(self, indices: np.ndarray) -> "TokenizedTexts":
        """Return the texts with these numbers, in this order. indices: int [num_selected]."""
        counts, rows = np.diff(self.starts)[indices], self.find_rows(indices)
        ids = [self.ids[self.offsets[row]:self.offsets[row + 1]] for row in rows]
        return TokenizedTexts(np.concatenate(ids) if ids else self.ids[:0],
                              np.concatenate([[0], np.cumsum(self.lengths[rows])]),
                              None if self.labels is None else self.labels[rows],
                              None if self.owners is None else np.repeat(np.arange(len(indices)), counts), self.vote)

    def find_rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows of the texts with these numbers, text by text: int64 [num_found]. indices: int [num_selected]."""
        if self.owners is None:
            return indices
        rows = [np.arange(self.starts[index], self.starts[index + 1]) for index in indices]
        return np.concatenate(rows or [np.zeros(0, np.int64)])

    def longest_first(self) -> "TokenizedTexts":
        """Return the same texts by falling length of their longest windows, so that batches in this order are of like length."""
        lengths = self.lengths if self.owners is None else np.maximum.reduceat(self.lengths, self.starts[:-1])
        return self.select(np.argsort(-lengths, kind="stable"))

    def count_texts(self, rows: np.ndarray) -> int:
        """Count the texts whose first row is among these. rows: int [num_rows]."""
        return len(rows) if self.owners is None else int(self.is_first[rows].sum())

    def join(self, answers: np.ndarray) -> np.ndarray:
        """Make the answers for texts of those for rows, by the vote of each text's windows.

        answers: float32 [num_rows, size]. Returns float32 [num_texts, size].
        """
        return answers if self.owners is None else join_windows(answers, self.starts[:-1], self.vote)


def tokenize(texts: Sequence[str], encode: Encoder, labels: Optional[np.ndarray] = None, description: str = "Tokenizing",
             whole_lengths: Optional[list[int]] = None) -> TokenizedTexts:
    """Tokenize texts. labels: [num_texts, ...], of the texts. whole_lengths: gets the number of tokens of each whole text."""
    ids, lengths, counts = array.array("i"), array.array("q", [0]), array.array("q")
    with progress_bar(len(texts), description) as progress:
        for part in split_texts(texts):
            for whole in encode.encode_whole(part):
                windows = encode.fit(whole)
                for window in windows:
                    ids.extend(window)
                    lengths.append(len(window))
                counts.append(len(windows))
                if whole_lengths is not None:
                    whole_lengths.append(len(whole))
            progress.update(len(part))
    owners = None
    if len(lengths) - 1 > len(texts):
        owners = np.repeat(np.arange(len(texts)), np.frombuffer(counts, np.int64))
        labels = None if labels is None else labels[owners]
    return TokenizedTexts(np.frombuffer(ids, np.int32), np.cumsum(np.frombuffer(lengths, np.int64)), labels, owners,
                          encode.long_text.window_vote)


def pad_batch(rows: Sequence[Union[Sequence[int], np.ndarray]], pad_id: int) -> np.ndarray:
    """Pad a list of id sequences to the longest of them: int64 [len(rows), longest]."""
    batch = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        batch[index, :len(row)] = row
    return batch


def sorted_batches(lengths: Union[Sequence[int], np.ndarray], batch_size: int) -> list[np.ndarray]:
    """Return the indices of the texts in batches of like length, longest first (so that too large a batch fails at once)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def run_by_length(run: Callable[[np.ndarray], np.ndarray], tokens: TokenizedTexts, batch_size: int, pad_id: int, size: int, *,
                  map_batches: MapBatches = map, progress: Optional[Progress] = None) -> np.ndarray:
    """Run a model over tokenized texts in batches of like length; returns float32 [num_texts, size] in the order of the texts.
    Of a text of several windows each is run, and their answers are joined.

    run: function of a padded batch, int64 [batch, length], that returns float32 [batch, size]: Paddle, ONNX Runtime or Paddle
    Serving. map_batches: like `map`, but it may run several batches at a time. progress: to advance by the texts done, or None.
    """
    answers = np.empty((len(tokens), size), np.float32)

    def run_batch(indices: np.ndarray) -> None:
        answers[indices] = run(pad_batch([tokens[index]["input_ids"] for index in indices], pad_id))
        if progress is not None:
            progress.update(tokens.count_texts(indices))

    for _ in map_batches(run_batch, sorted_batches(tokens.lengths, batch_size)):
        pass  # until the last batch is done, or an error of one is raised here
    return tokens.join(answers)


def model_inputs(input_ids: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return what a graph with these inputs is fed: {name: int64 [num_texts, length]}; all but input_ids: zeros, one segment."""
    return {name: input_ids if name == "input_ids" else np.zeros_like(input_ids) for name in names}
