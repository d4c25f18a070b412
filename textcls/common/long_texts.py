"""What a model reads of a text that has more tokens than it takes. Needs NumPy only, since
deploy/triton_serving/build_repository.py copies this file to where nothing else of this repository is.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

MODES = ("cut", "head_tail", "window")
VOTES = ("mean", "max", "unit_mean")  # unit_mean: of vectors of length 1, which the mean is again


class LongText(NamedTuple):
    """How long texts are read: long_text in config.json and deploy.json, where it is left out for the mode cut."""

    mode: str = "cut"  # cut: the beginning; head_tail: the beginning and the end; window: overlapping parts, all of the text
    head_share: float = 0.25  # of head_tail: the beginning's share of the room, 0 to 1
    window_stride: Optional[int] = None  # tokens from the beginning of a window to that of the next; None: 3/4 of the room
    max_windows: int = 8  # of a text: of one that needs more, so many, evenly spread over it
    window_vote: str = "mean"  # one of VOTES: what becomes of the logits or vectors of a text's windows


CUT = LongText()
Span = tuple[int, int]  # from a token, to before another


def find_spans(num_tokens: int, room: int, long_text: LongText) -> list[list[Span]]:
    """Choose what is read of a text: its windows, of which each is a list of spans of its tokens.

    num_tokens: of the text, without special tokens. room: tokens that fit into one window.
    """
    if num_tokens <= room:
        return [[(0, num_tokens)]]
    if long_text.mode == "cut":
        return [[(0, room)]]
    if long_text.mode == "head_tail":
        head = round(room * long_text.head_share)
        return [[(0, head), (num_tokens - room + head, num_tokens)]]
    last = num_tokens - room  # where the last window begins
    count = min(long_text.max_windows, 1 - (-last // (long_text.window_stride or default_stride(room))))
    starts = [round(last * index / max(1, count - 1)) for index in range(count)]
    return [[(start, start + room)] for start in starts]


def default_stride(room: int) -> int:
    """Return the stride of windows where nobody says it: three quarters of the room, in tokens."""
    return max(1, room * 3 // 4)


def fit_windows(ids: Sequence[int], num_before: int, num_after: int, max_seq_length: int, long_text: LongText) -> list[list[int]]:
    """Make what a model reads of a text: the token ids of its windows, at most max_seq_length each.

    ids: of the whole text, with the num_before special tokens before it and the num_after behind it, which each window gets.
    """
    if len(ids) <= max_seq_length:
        return [list(ids)]
    end = len(ids) - num_after
    before, text, after = list(ids[:num_before]), ids[num_before:end], list(ids[end:])
    windows = []
    for spans in find_spans(len(text), max_seq_length - num_before - num_after, long_text):
        parts = [token for start, stop in spans for token in text[start:stop]]
        windows.append(before + parts + after)
    return windows


def join_windows(answers: np.ndarray, starts: np.ndarray, vote: str) -> np.ndarray:
    """Make the answers for texts of those for their windows. answers: float32 [num_windows, size], text by text; starts: int64
    [num_texts], the first window of each text; vote: one of VOTES. Returns float32 [num_texts, size].
    """
    if vote == "max":
        return np.maximum.reduceat(answers, starts)
    counts = np.diff(starts, append=len(answers))
    means = np.add.reduceat(answers, starts) / counts[:, None].astype(answers.dtype)
    return means / np.linalg.norm(means, axis=1, keepdims=True) if vote == "unit_mean" else means
