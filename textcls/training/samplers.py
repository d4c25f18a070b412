"""Batches of texts of like length, by texts or by tokens. The windows of a text are in one batch, together."""

from collections.abc import Iterator

import numpy as np

from textcls.data.tokens import TokenizedTexts
from textcls.models.paddle_setup import paddle

GROUP_BATCHES = 50  # batches that are sorted by length together: enough to save the padding, few enough to stay random


class LengthGroupedBatchSampler(paddle.io.DistributedBatchSampler):
    """Batches of texts of like length, shuffled anew in every epoch.

    Every rank draws the same order from (seed, epoch) and takes its share of each step, so that the ranks work on
    batches of like length. Texts are repeated where the last step could not be shared out evenly. draw_windows: an epoch has of
    each text one window, drawn at random, in the place of all of them.
    """

    def __init__(self, dataset: TokenizedTexts, batch_size: int, seed: int, num_replicas: int, rank: int, drop_last: bool,
                 draw_windows: bool = False):
        super().__init__(dataset, batch_size, num_replicas=num_replicas, rank=rank, drop_last=drop_last)
        self.seed, self.draw_windows = seed, draw_windows

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order, size = self.draw_order(generator), self.texts_per_step() * GROUP_BATCHES
        lengths, drawn = self.dataset.text_lengths, None
        if self.draw_windows and self.dataset.owners is not None:
            starts = self.dataset.starts
            drawn = starts[:-1] + generator.integers(np.diff(starts))
            lengths = self.dataset.lengths[drawn]
        groups = [order[start:start + size] for start in range(0, len(order), size)]
        order = np.concatenate([group[np.argsort(lengths[group], kind="stable")] for group in groups])
        ends = self.find_ends(lengths[order])
        for index in generator.permutation(len(self)):
            batch = order[ends[index]:ends[index + 1]]
            if len(batch) % self.nranks:
                batch = np.resize(batch, len(batch) + self.nranks - len(batch) % self.nranks)
            own = batch[self.local_rank::self.nranks]
            yield (self.dataset.find_rows(own) if drawn is None else drawn[own]).tolist()

    def texts_per_step(self) -> int:
        """Return how many texts a step of all ranks has, or has on average."""
        return self.batch_size * self.nranks

    def find_ends(self, lengths: np.ndarray) -> np.ndarray:
        """Find where the batches of an epoch begin and end: int64 [len(self) + 1]. lengths: of its texts in order."""
        return np.minimum(np.arange(len(self) + 1) * self.texts_per_step(), len(lengths))

    def draw_order(self, generator: np.random.Generator) -> np.ndarray:
        """Return the texts of an epoch in random order: int64 [num_texts]."""
        return generator.permutation(self.dataset.num_texts)

    def __len__(self) -> int:
        step = self.batch_size * self.nranks
        return self.dataset.num_texts // step if self.drop_last else -(-self.dataset.num_texts // step)


class TokenBatchSampler(LengthGroupedBatchSampler):
    """As its base, but each batch of a rank has about num_tokens tokens, and so the more texts the shorter these are.

    num_tokens: as many as the longest row has, or more.
    """

    def __init__(self, dataset: TokenizedTexts, num_tokens: int, seed: int, num_replicas: int, rank: int):
        super().__init__(dataset, 1, seed, num_replicas, rank, drop_last=False)
        self.num_steps = max(1, len(dataset.ids) // (num_tokens * num_replicas))

    def texts_per_step(self) -> int:
        return -(-self.dataset.num_texts // self.num_steps)

    def find_ends(self, lengths: np.ndarray) -> np.ndarray:
        shares = np.arange(1, self.num_steps) / self.num_steps
        ends = np.searchsorted(np.cumsum(lengths), shares * lengths.sum(), side="right")
        return np.concatenate([[0], ends, [len(lengths)]])

    def __len__(self) -> int:
        return self.num_steps
