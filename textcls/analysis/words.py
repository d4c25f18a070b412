"""The words of a text, where its tokens stand in it, and attributions of tokens joined to words. Needs no Paddle.

Offsets count Python characters (code points) of the original text; an end is exclusive.
"""

import functools
import logging
import re
import types
import unicodedata
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.long_texts import find_spans

if TYPE_CHECKING:
    from textcls.models.checkpoints import Checkpoint

    from paddlenlp.transformers import PretrainedTokenizer

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af\u3005\u3007"
# Punctuation that no word holds, in whatever script: brackets, quotes, ends of sentences, everything full-width.
SEPARATORS = r"()\[\]{}<>\"!?;\u2018-\u201d\u2026\u3001\u3002\u3008-\u301f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
# Chinese with the letters and digits that touch it goes to jieba, which knows "B超"; all else ends at a blank or a separator.
RUNS = re.compile(f"(?P<chinese>[A-Za-z0-9]*[{HAN}]+(?:[A-Za-z0-9]+[{HAN}]+)*(?:[A-Za-z0-9]+(?![.,:/-]?\\w))?)"
                  f"|[{SEPARATORS}]+|[^\\s{HAN}{SEPARATORS}]+")


class Word(NamedTuple):
    """A word of a text and what it counts."""

    text: str
    start: int
    end: int
    attribution: Optional[float]  # None where the model has not read the word, or not in the window that decided


class Explanation(NamedTuple):
    """Why the model predicts what it predicts for a text."""

    prediction: int  # class id
    probability: float  # of the prediction, 0 to 1
    words: list[Word]
    window: Optional[tuple[int, int]] = None  # the characters of the window that decided; None: the text has one window


class Window(NamedTuple):
    """What the model reads at once of a text."""

    ids: list[int]  # with the special tokens and the prompt's
    offsets: list[tuple[int, int]]  # (start, end) in the text of each of the others
    read: list[tuple[int, int]]  # the parts of the text that these are


@functools.cache
def _jieba() -> types.ModuleType:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources is deprecated, says setuptools
        import jieba
    jieba.setLogLevel(logging.WARNING)  # not "Building prefix dict from the default dictionary ..."
    jieba.initialize()
    return jieba


def split_words(text: str) -> list[tuple[str, int, int]]:
    """Split a text into words: (word, start, end) of each, in order, with nothing but blanks between them.

    Chinese is segmented by jieba, other scripts by blanks; punctuation at the edges of a word is a word of its own.
    """
    words = []
    for run in RUNS.finditer(text):
        start, end = run.span()
        if run["chinese"]:
            words += [(word, start + first, start + last) for word, first, last in _jieba().tokenize(run.group())]
            continue
        inner = [index for index in range(start, end) if unicodedata.category(text[index])[0] not in "PS"]
        edges = [start, inner[0], inner[-1] + 1, end] if inner else [start, end]
        words += [(text[a:b], a, b) for a, b in zip(edges, edges[1:]) if a < b]
    return words


def locate_tokens(checkpoint: "Checkpoint", text: str) -> list[Window]:
    """Find what the model reads of a text, and where its tokens stand there. UserError for a text that cannot be traced."""
    encode, tokenizer = checkpoint.encode, checkpoint.tokenizer
    if checkpoint.rust_tokenizer is not None:
        encoding = checkpoint.rust_tokenizer.encode(text)
        ids, offsets = encoding.ids, encoding.offsets[encode.num_before:-encode.num_after]
    else:
        ids, offsets = list(encode.encode_whole([text])[0]), _slow_offsets(tokenizer, text)
    room, windows = encode.max_seq_length - encode.num_before - encode.num_after, []
    for own, spans in zip(encode.fit(ids), find_spans(len(offsets), room, encode.long_text)):
        read = [(0 if start == 0 else offsets[start][0], len(text) if stop == len(offsets) else offsets[stop - 1][1])
                for start, stop in spans if start < stop or start == 0]
        windows.append(Window(own, [offset for start, stop in spans for offset in offsets[start:stop]], read))
    return windows


def _slow_offsets(tokenizer: "PretrainedTokenizer", text: str) -> list[tuple[int, int]]:
    """Find the offsets of all tokens of PaddleNLP's own tokenizer: [(start, end)]. UserError."""
    try:
        offsets = _sentencepiece_offsets(tokenizer, text) if hasattr(tokenizer, "sp_model") else \
            tokenizer.get_offset_mapping(text)
        complete = len(offsets) == len(tokenizer.tokenize(text))
    except (ValueError, IndexError):  # what PaddleNLP raises where it loses its way
        complete = False
    if not complete:
        raise UserError(f"{text!r}: its tokens cannot be traced back to its characters with this {type(tokenizer).__name__}, "
                        "expected a text without unusual characters, or the tokenizer that train.py saves")
    return offsets


def _sentencepiece_offsets(tokenizer: "PretrainedTokenizer", text: str) -> list[tuple[int, int]]:
    """Find the offsets of all tokens of an ERNIE-M tokenizer: [(start, end)].

    From SentencePiece itself: PaddleNLP 2.8.1's get_offset_mapping searches the tokens in a text normalized its own way and
    raises ValueError where SentencePiece normalizes otherwise. Can go when PaddleNLP asks SentencePiece.
    """
    offsets, position = [], 0
    for part in tokenizer.tokens_trie.split(text):  # as PretrainedTokenizer.tokenize does
        if part in tokenizer.unique_no_split_tokens:
            offsets.append((position, position + len(part)))
        else:
            lowered = part.lower() if tokenizer.do_lower_case and len(part.lower()) == len(part) else part
            normal, places = tokenizer.sp_model.Normalize(lowered, with_offsets=True)
            spans = [(position + start, position + max(end, start + 1)) for char, start, end in zip(normal, places, places[1:])
                     if char != "\u2581"]  # which stands for a blank and is in no id
            used = 0
            for token in tokenizer._tokenize(lowered):
                covered = spans[used:used + len(token.replace("\u2581", ""))]
                used += len(covered)
                offsets.append((covered[0][0], covered[-1][1]) if covered else (position, position))
            if used != len(spans):
                raise ValueError(f"{part!r}: tokens without a place")
        position += len(part)
    return offsets


def join_words(words: list[tuple[str, int, int]], window: Window, attributions: np.ndarray) -> list[Word]:
    """Sum the attributions of tokens to words. A token across several words is shared between them by its characters.

    words: of `split_words`; window: of `locate_tokens`; attributions: float [num_tokens], of the window's offsets.
    """
    sums = np.zeros(len(words))
    length = max([end for _, _, end in words] + [end for _, end in window.offsets], default=0)
    owner = np.full(length + 1, -1)  # word of each character
    for index, (_, start, end) in enumerate(words):
        owner[start:end] = index
    for (start, end), attribution in zip(window.offsets, attributions):
        owners = owner[start:max(end, start + 1)]
        owners = owners[owners >= 0]
        if not len(owners) and words:  # a token without a visible character counts for the word before it
            owners = np.array([max(0, sum(first <= start for _, first, _ in words) - 1)])
        np.add.at(sums, owners, attribution / max(1, len(owners)))
    joined = []
    for (word, start, end), value in zip(words, sums):
        is_read = any(first <= start < last or start <= first < end for first, last in window.read)
        joined.append(Word(word, start, end, float(value) if is_read else None))
    return joined


def find_key_words(words: list[Word], count: int) -> list[int]:
    """Return the indices of the `count` words that speak most for the prediction, the strongest first; words cut off are none."""
    values = [(-word.attribution, index) for index, word in enumerate(words) if word.attribution is not None]
    return [index for _, index in sorted(values)[:count]]


def make_segments(text: str, words: list[Word]) -> list[dict]:
    """Make what the macro `shaded` of words_macros.html shows: dicts of blanks (before the word), word, value, shade (-1 to 1).

    The shades of a text are its attributions by the strongest of them.
    """
    position, segments = 0, []
    strongest = max((abs(value) for *_, value in words if value), default=0.0) or 1.0  # all zero: nothing is shaded
    for word, start, end, value in words:
        segments.append({"blanks": text[position:start], "word": word, "value": value,
                         "shade": 0 if value is None else value / strongest})
        position = end
    return segments
