"""Tokenized texts and batches: what is done with texts before a model sees them."""

import array

import numpy as np

from textcls.common.log import progress_bar

TOKENIZE_CHUNK = 8192  # texts handed to the Rust tokenizer at once: bounds memory, keeps both cores busy
SHORTEST_LENGTH, DEFAULT_LENGTH = 3, 128  # tokens: the least max_seq_length, and what it is where nobody says


class TokenizedTexts:
    """Token ids of many texts, kept flat: 4 bytes a token, where a list of lists takes 40.

    ids: int32 [num_tokens]; offsets: int64 [num_texts + 1]; labels: int64 [num_texts] or None.
    """

    def __init__(self, ids, offsets, labels=None):
        self.ids, self.offsets, self.labels = ids, offsets, labels
        self.lengths = np.diff(offsets)  # int64 [num_texts], special tokens included

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        """{"input_ids": int32 [length], "labels": int64 scalar (where there are labels)}"""
        item = {"input_ids": self.ids[self.offsets[index]:self.offsets[index + 1]]}
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item

    def select(self, indices):
        """The texts with these indices, in this order. indices: int [num_selected]. Returns TokenizedTexts."""
        lengths = self.lengths[indices]
        ids = [self.ids[self.offsets[index]:self.offsets[index + 1]] for index in indices]
        return TokenizedTexts(np.concatenate(ids) if ids else self.ids[:0], np.concatenate([[0], np.cumsum(lengths)]),
                              None if self.labels is None else self.labels[indices])

    def longest_first(self):
        """The same texts by falling length, so that batches in this order are of like length. Returns TokenizedTexts."""
        return self.select(np.argsort(-self.lengths, kind="stable"))


def tokenize(texts, encode, labels=None, description="Tokenizing"):
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


def pad_batch(rows, pad_id):
    """Pad a list of id sequences to the longest of them: int64 [len(rows), longest]."""
    batch = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        batch[index, :len(row)] = row
    return batch


def sorted_batches(lengths, batch_size):
    """Indices of the texts in batches of like length, longest first (so that too large a batch fails at once)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def model_inputs(input_ids, names):
    """What a graph with these inputs is fed: {name: int64 [num_texts, length]}; all but input_ids are zeros (one segment)."""
    return {name: input_ids if name == "input_ids" else np.zeros_like(input_ids) for name in names}
