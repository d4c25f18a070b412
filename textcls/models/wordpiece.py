"""A Rust `tokenizers.Tokenizer` that gives the very ids of a PaddleNLP 2.8.1 ERNIE or BERT tokenizer."""

import itertools
import sys
import unicodedata
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import NFD, Lowercase, Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import BertProcessing

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizer


class _Settings(NamedTuple):
    """What a PaddleNLP tokenizer was told to do."""

    basic: Any  # its basic tokenizer, which finds the words; None: words lie between blanks
    lower: bool  # letters are lower-cased
    strip: bool  # accents are taken off
    special: list[str]  # special tokens
    added: list[str]  # tokens that are cut out of the text before anything else
    normalize: Callable[[str], str]  # lower-cases and takes accents off as it does


class _Characters(NamedTuple):
    """What becomes of each of Unicode's characters."""

    dropped: list[str]  # they vanish
    kept: list[str]  # all others
    blank: list[str]  # of the kept: they end a word
    cjk: list[str]  # of the kept: each is a word of its own, and a blank on either side of it
    punctuation: list[str]  # of the kept: each is a word of its own, too
    marks: list[str]  # of the kept: they are taken off as accents


def build_rust_tokenizer(tokenizer: "PretrainedTokenizer", plain: Collection[str] = ()) -> Tokenizer:
    """Build the Rust twin of a PaddleNLP `ErnieTokenizer` or `BertTokenizer`.

    For every text without lone surrogates (Rust can't hold them), `encode(text).ids` equals
    `tokenizer(text)["input_ids"]`; after `enable_truncation(n)` too, with `max_length=n, truncation=True` and
    n >= 3 (PaddleNLP gives up truncating below). Saved as tokenizer.json it stands alone: its character
    classes come from the PaddleNLP tokenizer and this Python's unicodedata, and are written out. Special tokens
    named in plain (str) are words like any other where a text holds them, which PaddleNLP cannot do. ValueError
    is raised for settings that can't be reproduced, and if Rust's own Unicode tables could change an id with
    this vocabulary. Build again after changing the settings or the added tokens.
    """
    settings = _read_settings(tokenizer, plain)
    characters = _sort_characters(settings)
    _check_added(settings, characters)
    # Ids are asked for, as those of added tokens come before those of the vocabulary.
    vocab = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.vocab.token_to_idx}
    wordpiece = tokenizer.wordpiece_tokenizer
    rust = Tokenizer(WordPiece(vocab, unk_token=str(wordpiece.unk_token),
                               max_input_chars_per_word=wordpiece.max_input_chars_per_word))
    rust.normalizer = _make_normalizer(settings, characters, known=set("".join(vocab)))
    rust.pre_tokenizer = Split(Regex(_word_pattern(tokenizer, settings, characters)), "removed", invert=True)
    rust.post_processor = BertProcessing((str(tokenizer.sep_token), tokenizer.sep_token_id),
                                         (str(tokenizer.cls_token), tokenizer.cls_token_id))
    for token in sorted(settings.added, key=tokenizer.convert_tokens_to_ids):
        add = rust.add_special_tokens if token in settings.special else rust.add_tokens
        add([AddedToken(token, normalized=False)])
        if rust.token_to_id(token) != tokenizer.convert_tokens_to_ids(token):
            raise ValueError(f"Rust can't give the id of the added token {token!r}")
    return rust


def _read_settings(tokenizer: "PretrainedTokenizer", plain: Collection[str]) -> _Settings:
    """The _Settings of a tokenizer; ValueError for those that can't be reproduced."""
    from paddlenlp.transformers import BertTokenizer, ErnieTokenizer

    if type(tokenizer) not in (BertTokenizer, ErnieTokenizer):
        raise ValueError(f"{type(tokenizer).__name__} is not exactly ErnieTokenizer or BertTokenizer")
    if tokenizer.truncation_side != "right" or None in (tokenizer.cls_token, tokenizer.sep_token):
        raise ValueError("truncation_side must be 'right', and cls_token and sep_token must be set")
    basic = tokenizer.basic_tokenizer if getattr(tokenizer, "do_basic_tokenize", True) else None
    lower = bool(tokenizer.do_lower_case)
    if basic and bool(basic.do_lower_case) != lower:
        raise ValueError("do_lower_case differs between the tokenizer and its basic_tokenizer")
    strip = bool(basic and (lower if basic.strip_accents is None else basic.strip_accents))

    def normalize(text: str) -> str:
        text = "".join(map(str.lower, text)) if lower else text
        return basic._run_strip_accents(text) if basic and strip else text

    special, added = ([token for token in tokens if token not in plain]
                      for tokens in (tokenizer.all_special_tokens, tokenizer.unique_no_split_tokens))
    return _Settings(basic, lower, strip, special, added, normalize)


def _sort_characters(settings: _Settings) -> _Characters:
    """Ask the tokenizer what it does with each character."""
    basic, dropped, kept, blank, marks = settings.basic, [], [], [], []
    unassigned = {}  # category of the unassigned and the private characters -> what they become, alike in each of the two
    for char in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(char)
        if category == "Cs":  # surrogates are no characters
            continue
        if basic is None:
            cleaned = char
        elif category in ("Cn", "Co"):
            if category not in unassigned:
                unassigned[category] = basic._clean_text(char) and "x"
            cleaned = unassigned[category]
        else:
            cleaned = basic._clean_text(char)
        if not cleaned:
            dropped.append(char)
            continue
        kept.append(char)
        if cleaned.isspace():
            blank.append(char)
        if settings.strip and category == "Mn":
            marks.append(char)
    cjk = [char for char in kept if basic.tokenize_chinese_chars and basic._is_chinese_char(ord(char))] if basic else []
    # Every second character is a letter: those alone in their piece are words of their own.
    others = sorted(set(kept).difference(cjk))
    pieces = basic._run_split_on_punc("a" + "a".join(others)) if basic else []
    return _Characters(dropped, kept, blank, cjk, [piece for piece in pieces if len(piece) == 1 and piece != "a"], marks)


def _make_normalizer(settings: _Settings, characters: _Characters, known: set[str]) -> Sequence:
    """Make Rust steps that drop, lower-case and take accents off as PaddleNLP does.

    known: set of the vocabulary's characters. ValueError where Rust's Unicode tables differ in a way that could be seen.
    """
    # The marks that NFD moves vanish before it: older tables than Python's would take some for unmovable.
    first = characters.dropped + [char for char in characters.marks if unicodedata.combining(char)]
    steps: list[Any] = [Replace(Regex(f"[{_ranges(first)}]"), "")] if first else []
    steps += [Lowercase()] if settings.lower else []
    steps += [NFD(), Replace(Regex(f"[{_ranges(characters.marks)}]"), "")] if settings.strip else []
    edges = set(characters.blank + characters.cjk + characters.punctuation)

    def differing(chars: list[str]) -> dict[str, str]:
        """Find the characters that Rust normalises otherwise than Python, and what Python makes of them: {char: text}."""
        wanted = zip(chars, settings.normalize("\n".join(chars)).split("\n"))
        got = Sequence(steps).normalize_str("\n".join(chars)).split("\n")
        # A character outside the vocabulary makes its word unknown, however it's normalised.
        return {char: want for (char, want), text in zip(wanted, got) if text != want and (
            known.issuperset(text) or known.issuperset(want) or edges.intersection(text + want))}

    replaced = differing([char for char in characters.kept if char != "\n"])
    steps = [Replace(char, want) for char, want in replaced.items()] + steps
    moving = [char for char in known.difference(characters.marks, characters.dropped)
              if settings.strip and unicodedata.combining(char)]
    bad = list(differing(list(replaced))) + [
        pair for pair in map("".join, itertools.permutations(moving, 2))
        if Sequence(steps).normalize_str("x" + pair) != settings.normalize("x" + pair)]
    if bad:
        raise ValueError(f"Rust and Python normalise {ascii(bad)} differently, and the vocabulary has them")
    return Sequence(steps)


def _word_pattern(tokenizer: "PretrainedTokenizer", settings: _Settings, characters: _Characters) -> str:
    """Write a regex of the words and lone characters between blanks: one is faster than padding and splitting twice."""
    alone = characters.cjk + characters.punctuation
    pattern = (f"[{_ranges(alone)}]|" if alone else "") + f"[^{_ranges(alone + characters.blank)}]+"
    whole = _whole_words(tokenizer, settings) if settings.basic else []
    if whole:
        inside = f"[^{_ranges(characters.blank + characters.cjk)}]"
        words = "|".join("".join(r"\x{%X}" % ord(char) for char in word) for word in whole)
        pattern = f"(?<!{inside})(?:{words})(?!{inside})|{pattern}"
    return pattern


def _whole_words(tokenizer: "PretrainedTokenizer", settings: _Settings) -> list[str]:
    """List the words that the basic tokenizer leaves whole and that can still reach it."""
    from paddlenlp.transformers import BertTokenizer

    basic = settings.basic
    special = settings.special if type(tokenizer) is BertTokenizer else ()  # ERNIE's does not tell its basic tokenizer
    named, whole = set(map(str, basic.never_split)), []
    for word in sorted(named.union(special)):
        # A word that cleaning would break or change never equals a word of the text.
        if basic._tokenize_chinese_chars(basic._clean_text(word)).split() != [word]:
            continue
        # Lower-casing spares special tokens only, and the registered ones have been cut out of the text.
        if settings.lower and word != word.lower() and (word not in special or word in settings.added):
            continue
        if settings.normalize(word) != word:
            raise ValueError(f"{word!r} can't stay unnormalised within a text: drop it from never_split or, "
                             "if it's a special token, load with from_pretrained, which registers it")
        if word in named and (word not in tokenizer.vocab or len(word) > 100):
            raise ValueError(f"the never_split word {word!r} is not one token of the vocabulary")
        whole.append(word)
    return whole


def _check_added(settings: _Settings, characters: _Characters) -> None:
    """Refuse added tokens that Rust, searching the raw text, could find elsewhere than PaddleNLP does."""
    special, added = settings.special, settings.added
    for one, other in itertools.permutations(set(added).union(special), 2):
        if one in other or any(one.endswith(other[:size]) for size in range(1, len(other))):
            raise ValueError(f"the added tokens {one!r} and {other!r} can overlap in a text")
    if not settings.lower:
        return
    cased = {low for char in characters.kept if char != char.lower() for low in char.lower()}
    for token in added:
        # PaddleNLP searches the lower-cased text, in which only special tokens keep their capitals.
        if token not in special if token != token.lower() else cased.intersection(token):
            raise ValueError(f"the added token {token!r} is matched whatever its case: not supported")
    # Special tokens that aren't cut out are lower-cased within their word, on which only sigma depends.
    if "\u03a3" in "".join(set(special).difference(added)):
        raise ValueError("a special token with a capital sigma is not supported")


def _ranges(chars: Collection[str]) -> str:
    """Write characters as explicit ranges of a regex class, so that no Unicode table is consulted."""
    codes = np.unique(np.fromiter(map(ord, chars), np.int64, len(chars)))
    runs = np.split(codes, np.flatnonzero(np.diff(codes) > 1) + 1) if len(codes) else []
    return "".join(r"\x{%X}-\x{%X}" % (run[0], run[-1]) for run in runs)
