"""A Rust `tokenizers.Tokenizer` that gives the very ids of a PaddleNLP 2.8.1 ERNIE or BERT tokenizer."""
import itertools
import os
import sys
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import NFD, Lowercase, Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import BertProcessing

from textcls.errors import UserError


def _ranges(chars):
    """Write characters as explicit ranges of a regex class, so that no Unicode table is consulted."""
    codes = enumerate(sorted(map(ord, chars)))
    runs = [[code for _, code in run] for _, run in itertools.groupby(codes, lambda pair: pair[1] - pair[0])]
    return "".join(r"\x{%X}-\x{%X}" % (run[0], run[-1]) for run in runs)


def _check_added(lower, added, special, cased):
    """Refuse added tokens that Rust, searching the raw text, could find elsewhere than PaddleNLP does."""
    for one, other in itertools.permutations(set(added).union(special), 2):
        if one in other or any(one.endswith(other[:size]) for size in range(1, len(other))):
            raise ValueError(f"the added tokens {one!r} and {other!r} can overlap in a text")
    for token in added if lower else ():
        # PaddleNLP searches the lower-cased text, in which only special tokens keep their capitals.
        if token not in special if token != token.lower() else cased.intersection(token):
            raise ValueError(f"the added token {token!r} is matched whatever its case: not supported")
    # Special tokens that aren't cut out are lower-cased within their word, on which only sigma depends.
    if lower and "\u03a3" in "".join(set(special).difference(added)):
        raise ValueError("a special token with a capital sigma is not supported")


def _whole_words(tokenizer, special, normalize):
    """List the words that the basic tokenizer leaves whole and that can still reach it."""
    basic, lower, added = tokenizer.basic_tokenizer, tokenizer.do_lower_case, tokenizer.unique_no_split_tokens
    named, whole = set(map(str, basic.never_split)), []
    for word in sorted(named.union(special)):
        # A word that cleaning would break or change never equals a word of the text.
        if basic._tokenize_chinese_chars(basic._clean_text(word)).split() != [word]:
            continue
        # Lower-casing spares special tokens only, and the registered ones have been cut out of the text.
        if lower and word != word.lower() and (word not in special or word in added):
            continue
        if normalize(word) != word:
            raise ValueError(f"{word!r} can't stay unnormalised within a text: drop it from never_split or, "
                             "if it's a special token, load with from_pretrained, which registers it")
        if word in named and (word not in tokenizer.vocab or len(word) > 100):
            raise ValueError(f"the never_split word {word!r} is not one token of the vocabulary")
        whole.append(word)
    return whole


def build_rust_tokenizer(tokenizer):
    """Build the Rust twin of a PaddleNLP `ErnieTokenizer` or `BertTokenizer`.

    For every text without lone surrogates (Rust can't hold them), `encode(text).ids` equals
    `tokenizer(text)["input_ids"]`; after `enable_truncation(n)` too, with `max_length=n, truncation=True` and
    n >= 3 (PaddleNLP gives up truncating below). Saved as tokenizer.json it stands alone: its character
    classes come from the PaddleNLP tokenizer and this Python's unicodedata, and are written out. ValueError
    is raised for settings that can't be reproduced, and if Rust's own Unicode tables could change an id with
    this vocabulary. Build again after changing the settings or the added tokens.
    """
    from paddlenlp.transformers import BertTokenizer, ErnieTokenizer

    if type(tokenizer) not in (BertTokenizer, ErnieTokenizer):
        raise ValueError(f"{type(tokenizer).__name__} is not exactly ErnieTokenizer or BertTokenizer")
    if tokenizer.truncation_side != "right" or None in (tokenizer.cls_token, tokenizer.sep_token):
        raise ValueError("truncation_side must be 'right', and cls_token and sep_token must be set")
    basic = tokenizer.basic_tokenizer if getattr(tokenizer, "do_basic_tokenize", True) else None
    lower, wordpiece = bool(tokenizer.do_lower_case), tokenizer.wordpiece_tokenizer
    if basic and bool(basic.do_lower_case) != lower:
        raise ValueError("do_lower_case differs between the tokenizer and its basic_tokenizer")
    strip = basic and (basic.strip_accents or (lower and basic.strip_accents is None))
    special, added = tokenizer.all_special_tokens, tokenizer.unique_no_split_tokens

    def normalize(text):
        text = "".join(map(str.lower, text)) if lower else text
        return basic._run_strip_accents(text) if strip else text

    chars = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    dropped = [char for char in chars if not basic._clean_text(char)] if basic else []
    chars = sorted(set(chars).difference(dropped))
    blank = [char for char in chars if (basic._clean_text(char) if basic else char).isspace()]
    pads = basic and basic.tokenize_chinese_chars
    cjk = [char for char in chars if pads and basic._is_chinese_char(ord(char))]
    alone = cjk + [char for char in chars if basic and len(basic._run_split_on_punc("a" + char)) == 2]
    marks = [char for char in chars if strip and unicodedata.category(char) == "Mn"]
    # The marks that NFD moves vanish before it: older tables than Python's would take some for unmovable.
    first = dropped + [char for char in marks if unicodedata.combining(char)]
    steps = [Replace(Regex(f"[{_ranges(first)}]"), "")] if first else []
    steps += [Lowercase()] if lower else []
    steps += [NFD(), Replace(Regex(f"[{_ranges(marks)}]"), "")] if strip else []

    known, edges = set("".join(tokenizer.vocab.token_to_idx)), set(alone + blank)
    wanted = {char: normalize(char) for char in chars if char != "\n"}

    def differing():
        got = zip(wanted.items(), Sequence(steps).normalize_str("\n".join(wanted)).split("\n"))
        # A character outside the vocabulary makes its word unknown, however it's normalised.
        return [char for (char, want), text in got if text != want and (
            known.issuperset(text) or known.issuperset(want) or edges.intersection(text + want))]

    steps = [Replace(char, wanted[char]) for char in differing()] + steps
    moving = [char for char in known.difference(marks, dropped) if strip and unicodedata.combining(char)]
    bad = differing() + [pair for pair in map("".join, itertools.permutations(moving, 2))
                         if Sequence(steps).normalize_str("x" + pair) != normalize("x" + pair)]
    if bad:
        raise ValueError(f"Rust and Python normalise {ascii(bad)} differently, and the vocabulary has them")
    cased = {low for char in chars if char != char.lower() for low in char.lower()}
    _check_added(lower, added, special, cased)

    # One regex finds the words and lone characters between blanks: faster than padding and splitting twice.
    pattern = (f"[{_ranges(alone)}]|" if alone else "") + f"[^{_ranges(edges)}]+"
    whole = basic and _whole_words(tokenizer, special if type(tokenizer) is BertTokenizer else (), normalize)
    if whole:
        inside = f"[^{_ranges(blank + cjk)}]"
        words = "|".join("".join(r"\x{%X}" % ord(char) for char in word) for word in whole)
        pattern = f"(?<!{inside})(?:{words})(?!{inside})|{pattern}"

    # Ids are asked for, as those of added tokens come before those of the vocabulary.
    vocab = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.vocab.token_to_idx}
    rust = Tokenizer(WordPiece(vocab, unk_token=str(wordpiece.unk_token),
                               max_input_chars_per_word=wordpiece.max_input_chars_per_word))
    rust.normalizer = Sequence(steps)
    rust.pre_tokenizer = Split(Regex(pattern), "removed", invert=True)
    rust.post_processor = BertProcessing((str(tokenizer.sep_token), tokenizer.sep_token_id),
                                         (str(tokenizer.cls_token), tokenizer.cls_token_id))
    for token in sorted(added, key=tokenizer.convert_tokens_to_ids):
        add = rust.add_special_tokens if token in special else rust.add_tokens
        add([AddedToken(token, normalized=False)])
        if rust.token_to_id(token) != tokenizer.convert_tokens_to_ids(token):
            raise ValueError(f"Rust can't give the id of the added token {token!r}")
    return rust


def rust_tokenizer(tokenizer, max_seq_length, saved=None):
    """The `tokenizers` twin of a PaddleNLP BERT or ERNIE tokenizer, cutting at max_seq_length; None for other kinds.

    saved: a tokenizer.json that this function's result was saved as; it spares the two seconds of building.
    """
    if type(tokenizer).__name__ not in ("BertTokenizer", "ErnieTokenizer"):
        return None
    if saved is not None and os.path.isfile(saved):
        try:
            rust = Tokenizer.from_file(saved)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{saved}: cannot be read ({error}), expected the file that train.py wrote") from None
        if any(rust.token_to_id(token) != index for token, index in tokenizer.get_vocab().items()):
            raise UserError(f"{saved}: its vocabulary is not that of vocab.txt, expected the two files that train.py wrote")
    else:
        try:
            rust = build_rust_tokenizer(tokenizer)
        except ValueError as error:
            print(f"warning: tokenizing with PaddleNLP's slower tokenizer: {error}", file=sys.stderr)
            return None
    rust.enable_truncation(max_seq_length)
    return rust


def make_encoder(tokenizer, rust, max_seq_length):
    """Return a function: list of str -> list of lists of token ids, special tokens included, cut to max_seq_length.

    rust: as `rust_tokenizer` returns it; with None PaddleNLP's own tokenizer does the work.
    """
    if rust is not None:
        return lambda texts: [encoding.ids for encoding in rust.encode_batch_fast(texts)]
    return lambda texts: [tokenizer(text, max_length=max_seq_length, truncation=True)["input_ids"] for text in texts]
