"""A Rust `tokenizers.Tokenizer` that gives the very ids of a PaddleNLP 2.8.1 ERNIE or BERT tokenizer."""
import itertools
import sys
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import NFD, Lowercase, Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import BertProcessing


def _char_set(chars):
    """Write characters as the inside of a regex class, in explicit ranges, so that no Unicode table is consulted."""
    codes = sorted(map(ord, chars))
    parts = []
    for _, group in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0]):
        run = [code for _, code in group]
        parts.append(r"\x{%X}-\x{%X}" % (run[0], run[-1]))
    return "".join(parts)


def _kept_words(tokenizer, basic, special, normalize):
    """List the words that the basic tokenizer leaves whole and that can still reach it."""
    lower, no_split = tokenizer.do_lower_case, tokenizer.unique_no_split_tokens
    named, kept = set(map(str, basic.never_split)), []
    for word in sorted(named.union(special if hasattr(tokenizer, "do_basic_tokenize") else ())):
        # A word broken or changed by the cleaning never equals a word of the text.
        if basic._clean_text(word) != word or basic._tokenize_chinese_chars(word).split() != [word]:
            continue
        # Lower-casing spares special tokens only, and those in no_split have been cut out of the text before.
        if lower and word != word.lower() and (word not in special or word in no_split):
            continue
        if normalize(word) != word:
            raise ValueError(f"{word!r} must stay as it is inside a normalised text: load with from_pretrained, "
                             "which registers special tokens, or change never_split")
        if word in named and (word not in tokenizer.vocab or len(word) > 100):
            raise ValueError(f"the never_split word {word!r} is not one token of the vocabulary")
        kept.append(word)
    return kept


def _check_no_split(lower, no_split, special, cased):
    """Refuse tokens that Rust, searching the raw text, would find elsewhere than PaddleNLP's trie."""
    for one, other in itertools.permutations(set(no_split).union(special), 2):
        if one in other or any(one.endswith(other[:size]) for size in range(1, len(other))):
            raise ValueError(f"the added tokens {one!r} and {other!r} can overlap in a text")
    for token in no_split if lower else ():
        # PaddleNLP searches the lower-cased text, where only special tokens keep their capitals.
        if token not in special if token != token.lower() else cased.intersection(token):
            raise ValueError(f"the added token {token!r} is matched whatever its case: not supported")
    # Only a sigma lower-cased within its word depends on its neighbours.
    if lower and any("\u03a3" in token for token in set(special).difference(no_split)):
        raise ValueError("a special token with a capital sigma is not supported")


def build_fast_tokenizer(tokenizer):
    """Build the Rust twin of a PaddleNLP `ErnieTokenizer` or `BertTokenizer`.

    For every text without lone surrogates (Rust can't hold them), `encode(text).ids` equals
    `tokenizer(text)["input_ids"]`, and so it does after `enable_truncation(n)` for `max_length=n, truncation=True`
    with n >= 3 (PaddleNLP gives up truncating below). Saved to tokenizer.json it stands alone: the character classes
    are asked from the PaddleNLP tokenizer and from this Python's unicodedata, and written out. Where the tables of
    Rust can't be overruled, ValueError is raised if the vocabulary makes it matter, as for any other setting
    that can't be reproduced. Build again after adding tokens or changing settings.
    """
    from paddlenlp.transformers import BertTokenizer, ErnieTokenizer

    if type(tokenizer) not in (BertTokenizer, ErnieTokenizer):
        raise ValueError(f"{type(tokenizer).__name__} is not exactly ErnieTokenizer or BertTokenizer")
    if tokenizer.truncation_side != "right" or None in (tokenizer.cls_token, tokenizer.sep_token):
        raise ValueError("truncation_side must be 'right', and cls_token and sep_token be set")
    basic = tokenizer.basic_tokenizer if getattr(tokenizer, "do_basic_tokenize", True) else None
    lower, wordpiece = tokenizer.do_lower_case, tokenizer.wordpiece_tokenizer
    if basic and bool(basic.do_lower_case) != bool(lower):
        raise ValueError("do_lower_case differs between the tokenizer and its basic_tokenizer")
    strip = basic and (basic.strip_accents or (lower and basic.strip_accents is None))
    special, no_split = tokenizer.all_special_tokens, tokenizer.unique_no_split_tokens

    def normalize(text):
        text = "".join(map(str.lower, text)) if lower else text
        return basic._run_strip_accents(text) if strip else text

    chars = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    dropped = [char for char in chars if not basic._clean_text(char)] if basic else []
    chars = sorted(set(chars).difference(dropped))
    blanks = [char for char in chars if char.isspace() or basic and basic._clean_text(char) == " "]
    alone = []
    if basic:
        alone = [char for char in chars if len(basic._run_split_on_punc("a" + char)) == 2
                 or basic.tokenize_chinese_chars and basic._is_chinese_char(ord(char))]
    marks = [char for char in chars if unicodedata.category(char) == "Mn"] if strip else []
    # Marks that NFD may reorder go first: Rust's older NFD doesn't know them all, and they vanish anyway.
    first = dropped + [char for char in marks if unicodedata.combining(char)]
    steps = [Replace(Regex(f"[{_char_set(first)}]"), "")] if first else []
    steps += [Lowercase()] if lower else []
    steps += [NFD(), Replace(Regex(f"[{_char_set(marks)}]"), "")] if strip else []

    # A character outside the vocabulary makes its word unknown, however it's normalised.
    matters = set("".join(tokenizer.vocab.token_to_idx)).union(alone, blanks)
    wanted = {char: normalize(char) for char in chars if char != "\n"}

    def differences():
        got = Sequence(steps).normalize_str("\n".join(wanted)).split("\n")
        return [char for char, text in zip(wanted, got)
                if text != wanted[char] and (matters.issuperset(text) or matters.issuperset(wanted[char]))]

    steps = [Replace(char, wanted[char]) for char in differences()] + steps
    movable = [char for char in chars if unicodedata.combining(char) and char in matters] if strip else []
    swapped = [a + b for a, b in itertools.permutations(set(movable).difference(marks), 2)
               if Sequence(steps).normalize_str("x" + a + b) != normalize("x" + a + b)]
    if swapped or differences():
        raise ValueError(f"Rust and Python normalise {ascii(swapped or differences())} differently")

    cased = {low for char in chars if char != char.lower() for low in char.lower()}
    _check_no_split(lower, no_split, special, cased)
    pattern = f"[{_char_set(alone)}]|[^{_char_set(alone + blanks)}]+" if alone else f"[^{_char_set(blanks)}]+"
    kept = _kept_words(tokenizer, basic, special, normalize) if basic else []
    if kept:
        cjk = [char for char in alone if basic.tokenize_chinese_chars and basic._is_chinese_char(ord(char))]
        inner = f"[^{_char_set(blanks + cjk)}]"
        words = "|".join("".join(r"\x{%X}" % ord(char) for char in word) for word in kept)
        pattern = f"(?<!{inner})(?:{words})(?!{inner})|{pattern}"

    # The added ids win over the vocabulary, as in convert_tokens_to_ids.
    vocab = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.vocab.token_to_idx}
    fast = Tokenizer(WordPiece(vocab, unk_token=str(wordpiece.unk_token),
                               max_input_chars_per_word=wordpiece.max_input_chars_per_word))
    fast.normalizer = Sequence(steps)
    # One regex cuts words, lone characters and drops blanks: cheaper than padding CJK and splitting twice.
    fast.pre_tokenizer = Split(Regex(pattern), "removed", invert=True)
    fast.post_processor = BertProcessing((str(tokenizer.sep_token), tokenizer.sep_token_id),
                                         (str(tokenizer.cls_token), tokenizer.cls_token_id))
    for token in sorted(no_split, key=tokenizer.convert_tokens_to_ids):
        fast.add_tokens([AddedToken(token, normalized=False, special=token in special)])
        if fast.token_to_id(token) != tokenizer.convert_tokens_to_ids(token):
            raise ValueError(f"Rust can't give the id of the added token {token!r}")
    return fast
