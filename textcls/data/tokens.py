"""Tokenized texts and batches: what is done with texts before a model sees them."""

import array
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional, Union

import numpy as np

from textcls.common.log import Progress, progress_bar

TOKENIZE_CHUNK = 8192  # texts handed to the Rust tokenizer at once: bounds memory, keeps both cores busy
SHORTEST_LENGTH, DEFAULT_LENGTH = 3, 128  # tokens: the least max_seq_length, and what it is where nobody says


class TokenizedTexts:
    """Token ids of many texts, kept flat: 4 bytes a token, where a list of lists takes 40.

    ids: int32 [num_tokens]; offsets: int64 [num_texts + 1]; labels: int64 [num_texts] or None.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, labels: Optional[np.ndarray] = None):
        self.ids, self.offsets, self.labels = ids, offsets, labels
        self.lengths = np.diff(offsets)  # int64 [num_texts], special tokens included

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> "TokenizedTexts":
        """Pack texts that a tokenizer has turned into rows of ids."""
        offsets = np.cumsum([0, *map(len, rows)])
        return cls(np.fromiter(itertools.chain.from_iterable(rows), np.int32, offsets[-1]), offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"input_ids": int32 [length], "labels": int64 scalar (where there are labels)}"""
        item = {"input_ids": self.ids[self.offsets[index]:self.offsets[index + 1]]}
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item

    def select(self, indices: np.ndarray) -> "TokenizedTexts":
        """Return the texts with these indices, in this order. indices: int [num_selected]."""
        lengths = self.lengths[indices]
        ids = [self.ids[self.offsets[index]:self.offsets[index + 1]] for index in indices]
        return TokenizedTexts(np.concatenate(ids) if ids else self.ids[:0], np.concatenate([[0], np.cumsum(lengths)]),
                              None if self.labels is None else self.labels[indices])

    def longest_first(self) -> "TokenizedTexts":
        """Return the same texts by falling length, so that batches in this order are of like length."""
        return self.select(np.argsort(-self.lengths, kind="stable"))


def tokenize(texts: list[str], encode: Callable[[list[str]], Sequence[Sequence[int]]],
             labels: Optional[np.ndarray] = None, description: str = "Tokenizing") -> TokenizedTexts:
    """Tokenize a list of str with an encoder of `make_encoder`; returns TokenizedTexts."""
    ids, lengths = array.array("i"), array.array("q", [0])
    with progress_bar(len(texts), description) as progress:
        for start in range(0, len(texts), TOKENIZE_CHUNK):
            chunk = texts[start:start + TOKENIZE_CHUNK]
            for encoded in encode(chunk):
                ids.extend(encoded)
                lengths.append(len(encoded))
            progress.update(len(chunk))
    return TokenizedTexts(np.frombuffer(ids, np.int32), np.cumsum(np.frombuffer(lengths, np.int64)), labels)


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
                  map_batches: Callable[[Callable, Iterable], Iterable] = map, progress: Optional[Progress] = None) -> np.ndarray:
    """Run a model over tokenized texts in batches of like length; returns float32 [num_texts, size] in the order of the texts.

    run: function of a padded batch, int64 [batch, length], that returns float32 [batch, size]: Paddle, ONNX Runtime or Paddle
    Serving. map_batches: like `map`, but it may run several batches at a time. progress: to advance by the texts done, or None.
    """
    answers = np.empty((len(tokens), size), np.float32)

    def run_batch(indices: np.ndarray) -> None:
        answers[indices] = run(pad_batch([tokens[index]["input_ids"] for index in indices], pad_id))
        if progress is not None:
            progress.update(len(indices))

    for _ in map_batches(run_batch, sorted_batches(tokens.lengths, batch_size)):
        pass  # until the last batch is done, or an error of one is raised here
    return answers


def model_inputs(input_ids: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return what a graph with these inputs is fed: {name: int64 [num_texts, length]}; all but input_ids: zeros, one segment."""
    return {name: input_ids if name == "input_ids" else np.zeros_like(input_ids) for name in names}
