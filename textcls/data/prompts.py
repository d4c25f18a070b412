"""Prompts: the template language, the words that stand for labels, and how both become tokens. Needs no Paddle.

A template puts a text beside words of its own and a mask whose filling tells the label: {'text': 'text'}这条新闻写的是{'mask'}
Its tokens are the same for every text, so that a tokenizer.json can hold them: see `add_prompt`.
"""

import re
from typing import NamedTuple, Optional

from textcls.common.errors import UserError
from textcls.common.log import get_logger

KEYWORDS = ("text", "hard", "mask", "soft", "prefix", "sep")
ATTRIBUTES = {  # name -> (the keywords it belongs to, the types of its values)
    "length": (("mask", "soft", "prefix"), int), "encoder": (("soft", "prefix"), str),
    "hidden_size": (("soft", "prefix"), int), "soft_id": (("soft",), int), "token_type": (("text", "hard", "soft", "mask"), int),
    "truncate": (("text",), bool), "add_space": (("text", "hard"), bool)}
ENCODERS = ("lstm", "mlp")
RANGES = {"length": (1, 512), "hidden_size": (1, 8192), "soft_id": (0, 999_999_999), "token_type": (0, 1)}
TOKENS = re.compile(r"""\s*(?:(?P<string>'[^'\\]*'|"[^"\\]*")|(?P<number>\d{1,9})|(?P<word>\w+)|(?P<mark>[:,}]))""")
CONSTANTS = {"True": True, "False": False, "None": None}


class Prompt(NamedTuple):
    """A template as tokens; config.json of a prompt model keeps it as a JSON object of the same names."""

    template: list  # of dicts, as `parse_template` returns them
    words: list  # of lists of str: the words of each class
    before: list  # token ids before the text, [CLS] among them; vocab_size + i is the soft token i
    after: list  # token ids after the text, [SEP] among them
    mask_id: int
    num_masks: int
    num_soft: int = 0  # rows of trained embeddings, after those of the vocabulary
    prefix_length: int = 0  # trained keys and values before each layer's own
    encoder: Optional[str] = None  # lstm or mlp: what the soft tokens go through before they are used
    encoder_size: int = 0  # its hidden size
    types: Optional[list] = None  # token types: of the tokens before, of the text (one number), of those after; None: all 0


def parse_template(template):
    """Parse a template. Returns its parts: list of dicts, each with its keyword first, {'hard': '...'} for plain text.

    A string without blocks is a hard part between the text and the mask; None is one soft token before them. Nothing is ever
    evaluated: a block holds keywords, strings, numbers, True, False and None. UserError, with the position, for anything else.
    """
    if template is None:
        return [{"soft": None}, {"text": "text_a"}, {"mask": None}]
    if "{" not in template and "}" not in template:
        if not template.strip():
            raise UserError("--prompt: is empty, expected a template")
        _check_hard(template, template, 0)
        return [{"text": "text_a"}, {"hard": template}, {"mask": None}]
    parts, position = [], 0
    while position < len(template):
        if template[position] == "{":
            part, position = _parse_block(template, position)
            parts.append(part)
            continue
        end = next((index for index in range(position, len(template)) if template[index] in "{}"), len(template))
        if end < len(template) and template[end] == "}":
            raise _error(template, end, "a } without its {")
        _check_hard(template, template[position:end], position)
        parts.append({"hard": template[position:end]})
        position = end
    for keyword in ("text", "mask"):
        if not any(keyword in part for part in parts):
            raise UserError(f"--prompt {template!r}: has no {keyword}, expected {{'text': 'text'}} and {{'mask'}} in it")
    if sum("text" in part for part in parts) > 1:
        raise UserError(f"--prompt {template!r}: has two texts, expected one: a row has one text")
    return parts


def _parse_block(template, start):
    """Parse the block that begins at start. Returns (its dict, the position behind it)."""
    position, part = start + 1, {}
    while True:
        name, kind, begin, position = _next_token(template, position)
        if kind != "string":
            raise _error(template, begin, f"{name!r} is not a name in quotes")
        value, (mark, kind, place, position) = None, _next_token(template, position)
        if (mark, kind) == (":", "mark"):
            value, kind, place, position = _next_token(template, position)
            if kind == "mark" or (kind == "word" and value not in CONSTANTS):
                raise _error(template, place, f"{value!r} is neither a string nor a number, True, False or None")
            value = CONSTANTS[value] if kind == "word" else int(value) if kind == "number" else value
            mark, kind, place, position = _next_token(template, position)
        _check_entry(template, begin, name, value, part)
        part[name] = value
        if (mark, kind) == ("}", "mark"):
            return part, position
        if (mark, kind) != (",", "mark"):
            raise _error(template, place, f"{mark!r} where , or }} should stand")


def _next_token(template, position):
    """The token at a position of a block: (its text, its kind, the position where it begins, the position behind it)."""
    token = TOKENS.match(template, position)
    if token is None:
        rest = template[position:].lstrip()
        raise _error(template, len(template) - len(rest), f"{rest[0]!r} has no meaning in a block" if rest else
                     "the block has no }")
    kind = token.lastgroup
    return token[kind][1:-1] if kind == "string" else token[kind], kind, token.start(kind), token.end()


def _check_entry(template, position, name, value, part):
    """UserError where an entry does not belong into the block, whose earlier entries are part."""
    if not part:
        if name not in KEYWORDS:
            raise _error(template, position, f"{name!r} is no keyword, expected one of {', '.join(KEYWORDS)}")
        if name == "hard":
            if not isinstance(value, str) or not value:
                raise _error(template, position, "'hard' without its words")
            _check_hard(template, value, position)
        elif value is not None and not isinstance(value, str):
            raise _error(template, position, f"the value of {name!r} is {value!r}, expected a string")
        return
    keyword = next(iter(part))
    keywords, kind = ATTRIBUTES.get(name, ((), None))
    if keyword not in keywords or name in part:
        known = [key for key, (names, _) in ATTRIBUTES.items() if keyword in names]
        raise _error(template, position, f"{name!r} is no attribute of {keyword!r} (or stands twice), expected "
                     f"{', '.join(known) or 'none'}")
    least, most = RANGES.get(name, (None, None))
    if type(value) is not kind or (kind is int and not least <= value <= most):
        wanted = f"a number, {least} to {most}" if kind is int else f"a {kind.__name__}"
        raise _error(template, position, f"the value of {name!r} is {value!r}, expected {wanted}")
    if name == "encoder" and value not in ENCODERS:
        raise _error(template, position, f"no encoder {value!r}, expected one of {', '.join(ENCODERS)}")
    if name == "truncate" and not value:
        raise _error(template, position, "a text that is too long has to be cut, expected no 'truncate': False")


def _check_hard(template, text, position):
    if "[MASK]" in text:
        raise _error(template, position + text.find("[MASK]"), "[MASK] as plain words, expected the block {'mask'}")


def _error(template, position, wrong):
    expected = "" if "expected" in wrong else ", expected a template such as {'text': 'text'}这条新闻写的是{'mask'}"
    return UserError(f"--prompt {template!r}: at character {position + 1}: {wrong}{expected}")


def plain_encoder(tokenizer):
    """A function str -> list of token ids, without special tokens around them. tokenizer: PaddleNLP's."""
    return lambda words: tokenizer.convert_tokens_to_ids(tokenizer.tokenize(words))


def tokenize_words(words, tokenizer):
    """The token ids of each class's words: list (classes) of lists (words) of lists of int, and what is wrong with them.

    words: list of lists of str; tokenizer: PaddleNLP's. Returns (ids, problems), problems being triples (class id, word, what is
    wrong): unknown and special tokens, words that stand twice.
    """
    ids, problems, owners, encode = [], [], {}, plain_encoder(tokenizer)
    for index, own in enumerate(words):
        ids.append([encode(word) for word in own])
        for word, tokens in zip(own, ids[-1]):
            if not tokens or set(tokens).intersection(tokenizer.all_special_ids):
                problems.append((index, word, f"the vocabulary has no token for a part of the word {word!r}, or a special one"))
            elif tuple(tokens) in owners:
                problems.append((index, word, f"the word {word!r} stands for two labels or twice"))
            owners.setdefault(tuple(tokens), index)
    return ids, problems


def compile_template(parts, words, tokenizer, vocab_size):
    """Turn a template into tokens.

    parts: of `parse_template`; words: list of lists of str, the words of each class; tokenizer: PaddleNLP's, for the ids of the
    special tokens; vocab_size: rows of the model's word embeddings.
    Returns (Prompt, starts: for each soft token the id of the token that it begins as, or None: at random). UserError where the
    template's words have special tokens in them.
    """
    encode = plain_encoder(tokenizer)
    sides, types, starts, numbers = [[tokenizer.cls_token_id], []], [[0], []], [], {}
    side = num_masks = prefix_length = text_type = 0
    encoder, encoder_size = None, 0
    for part in parts:
        keyword, value = next(iter(part.items()))
        if keyword == "text":
            side, text_type = 1, part.get("token_type", 0)
            continue
        if keyword in ("soft", "prefix"):
            own = part.get("encoder", encoder), part.get("hidden_size", encoder_size)
            if encoder and own != (encoder, encoder_size):
                raise UserError(f"--prompt: the encoders {encoder!r} {encoder_size} and {own[0]!r} {own[1]} differ, expected one "
                                "for all 'soft' and 'prefix' of a template")
            encoder, encoder_size = own
        if keyword == "prefix":
            prefix_length += part.get("length") or (len(encode(value)) if value else 1)
            continue
        if keyword == "hard":
            ids = encode(value)
            if set(ids).intersection(tokenizer.all_special_ids) - {tokenizer.unk_token_id}:
                raise UserError(f"--prompt: the words {value!r} hold a special token, expected words, or the block {{'sep'}}")
            if tokenizer.unk_token_id in ids:
                get_logger().warning(f"--prompt: the vocabulary has no token for a part of the words {value!r}.")
        elif keyword == "sep":
            ids = [tokenizer.sep_token_id]
        elif keyword == "mask":
            ids = [tokenizer.mask_token_id] * part.get("length", 1)
            num_masks += len(ids)
        else:
            ids = _number_soft(part, value, encode, vocab_size, starts, numbers)
        sides[side] += ids
        types[side] += [part.get("token_type", 0)] * len(ids)
    before, after = sides[0], sides[1] + [tokenizer.sep_token_id]
    types = [types[0], text_type, types[1] + [0]]
    has_types = any(types[0]) or text_type or any(types[2])
    return Prompt(parts, words, before, after, tokenizer.mask_token_id, num_masks, len(starts), prefix_length, encoder,
                  encoder_size, types if has_types else None), starts


def _number_soft(part, value, encode, vocab_size, starts, numbers):
    """Token ids of a soft part; those of an earlier part with the same soft_id, where there is one."""
    number = part.get("soft_id")
    if number in numbers:
        return numbers[number]
    known = encode(value) if value else []
    length = part.get("length") or len(known) or 1
    ids = list(range(vocab_size + len(starts), vocab_size + len(starts) + length))
    starts += [known[index] if index < len(known) else None for index in range(length)]
    if number is not None:
        numbers[number] = ids
    return ids


def add_prompt(rust, prompt):
    """Let a tokenizers.Tokenizer put every text into the prompt: its cuts shorten the text alone. Returns the tokenizer."""
    from tokenizers.processors import TemplateProcessing

    pieces = [(f"[BEFORE{index}]", token) for index, token in enumerate(prompt.before)]
    pieces.append(("$A", None))
    pieces += [(f"[AFTER{index}]", token) for index, token in enumerate(prompt.after)]
    rust.post_processor = TemplateProcessing(single=[name for name, _ in pieces],
                                             special_tokens=[(name, token) for name, token in pieces if token is not None])
    return rust
