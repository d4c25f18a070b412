"""Prompts: the template language, the words that stand for labels, and how both become tokens. Needs no Paddle.

A template puts a text beside words of its own and a mask whose filling tells the label: {'text': 'text'}这条新闻写的是{'mask'}
Its tokens are the same for every text, so that a tokenizer.json can hold them: see `add_prompt`.
"""

import re
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from textcls.common.errors import UserError
from textcls.common.log import get_logger

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from paddlenlp.transformers import PretrainedTokenizer

KEYWORDS = ("text", "hard", "mask", "soft", "prefix", "sep")
ATTRIBUTES: dict[str, tuple[tuple[str, ...], type]] = {  # name -> (the keywords it belongs to, the types of its values)
    "length": (("mask", "soft", "prefix"), int), "encoder": (("soft", "prefix"), str),
    "hidden_size": (("soft", "prefix"), int), "soft_id": (("soft",), int), "token_type": (("text", "hard", "soft", "mask"), int),
    "truncate": (("text",), bool), "add_space": (("text", "hard"), bool)}
ENCODERS = ("lstm", "mlp")
RANGES = {"length": (1, 512), "hidden_size": (1, 8192), "soft_id": (0, 999_999_999), "token_type": (0, 1)}
TOKENS = re.compile(r"""\s*(?:(?P<string>'[^'\\]*'|"[^"\\]*")|(?P<number>\d{1,9})|(?P<word>\w+)|(?P<mark>[:,}]))""")
CONSTANTS = {"True": True, "False": False, "None": None}
Part = dict[str, Any]  # of a template: a keyword and its value, then the attributes with theirs


class Prompt(NamedTuple):
    """A template as tokens; config.json of a prompt model keeps it as a JSON object of the same names."""

    template: list[Part]  # as `parse_template` returns it
    words: list[list[str]]  # the words of each class
    before: list[int]  # token ids before the text, [CLS] among them; vocab_size + i is the soft token i
    after: list[int]  # token ids after the text, [SEP] among them
    mask_id: int
    num_masks: int
    num_soft: int = 0  # rows of trained embeddings, after those of the vocabulary
    prefix_length: int = 0  # trained keys and values before each layer's own
    encoder: Optional[str] = None  # lstm or mlp: what the soft tokens go through before they are used
    encoder_size: int = 0  # its hidden size
    types: Optional[list] = None  # token types: list of those before, that of the text, list of those after; None: all 0


def parse_template(template: Optional[str], mask_length: int = 1) -> list[Part]:
    """Parse a template. Returns its parts, each with its keyword first, {'hard': '...'} for plain text.

    A string without blocks is a hard part between the text and a mask of mask_length tokens; None is one soft token before them.
    Nothing is ever evaluated: a block holds keywords, strings, numbers, True, False and None. UserError, with the position, for
    anything else.
    """
    mask: Part = {"mask": None} if mask_length == 1 else {"mask": None, "length": mask_length}
    if template is None:
        return [{"soft": None}, {"text": "text_a"}, mask]
    if "{" not in template and "}" not in template:
        if not template.strip():
            raise UserError("--prompt: is empty, expected a template")
        _check_hard(template, template, 0)
        return [{"text": "text_a"}, {"hard": template}, mask]
    parts: list[Part] = []
    position = 0
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


def _parse_block(template: str, start: int) -> tuple[Part, int]:
    """Parse the block that begins at start. Returns (its dict, the position behind it)."""
    position, part = start + 1, Part()
    while True:
        name, kind, begin, position = _next_token(template, position)
        if kind != "string":
            raise _error(template, begin, f"{name!r} is not a name in quotes")
        value: Any = None
        mark, kind, place, position = _next_token(template, position)
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


def _next_token(template: str, position: int) -> tuple[str, str, int, int]:
    """Return the token at a position of a block: (its text, its kind, the position where it begins, the position behind it)."""
    token = TOKENS.match(template, position)
    if token is None:
        rest = template[position:].lstrip()
        raise _error(template, len(template) - len(rest), f"{rest[0]!r} has no meaning in a block" if rest else
                     "the block has no }")
    kind = str(token.lastgroup)
    return token[kind][1:-1] if kind == "string" else token[kind], kind, token.start(kind), token.end()


def _check_entry(template: str, position: int, name: str, value: Any, part: Part) -> None:
    """Raise UserError where an entry does not belong into the block, whose earlier entries are part."""
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
    keywords, kind = ATTRIBUTES.get(name, ((), str))
    if keyword not in keywords or name in part:
        known = [key for key, (names, _) in ATTRIBUTES.items() if keyword in names]
        raise _error(template, position, f"{name!r} is no attribute of {keyword!r} (or stands twice), expected "
                     f"{', '.join(known) or 'none'}")
    least, most = RANGES.get(name, (0, 0))
    if type(value) is not kind or (kind is int and value not in range(least, most + 1)):
        wanted = f"a number, {least} to {most}" if kind is int else f"a {kind.__name__}"
        raise _error(template, position, f"the value of {name!r} is {value!r}, expected {wanted}")
    if name == "encoder" and value not in ENCODERS:
        raise _error(template, position, f"no encoder {value!r}, expected one of {', '.join(ENCODERS)}")
    if name == "truncate" and not value:
        raise _error(template, position, "a text that is too long has to be cut, expected no 'truncate': False")


def _check_hard(template: str, text: str, position: int) -> None:
    if "[MASK]" in text:
        raise _error(template, position + text.find("[MASK]"), "[MASK] as plain words, expected the block {'mask'}")


def _error(template: str, position: int, wrong: str) -> UserError:
    expected = "" if "expected" in wrong else ", expected a template such as {'text': 'text'}这条新闻写的是{'mask'}"
    return UserError(f"--prompt {template!r}: at character {position + 1}: {wrong}{expected}")


def plain_encoder(tokenizer: "PretrainedTokenizer") -> Callable[[str], list[int]]:
    """Return a function that gives the token ids of words, without special tokens around them."""
    return lambda words: tokenizer.convert_tokens_to_ids(tokenizer.tokenize(words))


def tokenize_words(words: list[list[str]], tokenizer: "PretrainedTokenizer"
                   ) -> tuple[list[list[list[int]]], list[tuple[int, str, str]]]:
    """Tokenize the words of each class, and say what is wrong with them.

    Returns (ids, problems): the token ids of each word of each class; (class id, word, what is wrong) for unknown and special
    tokens and words that stand twice.
    """
    ids: list[list[list[int]]] = []
    problems: list[tuple[int, str, str]] = []
    owners: dict[tuple[int, ...], int] = {}
    encode = plain_encoder(tokenizer)
    for index, own in enumerate(words):
        ids.append([encode(word) for word in own])
        for word, tokens in zip(own, ids[-1]):
            if not tokens or set(tokens).intersection(tokenizer.all_special_ids):
                problems.append((index, word, f"the vocabulary has no token for a part of the word {word!r}, or a special one"))
            elif tuple(tokens) in owners:
                problems.append((index, word, f"the word {word!r} stands for two labels or twice"))
            owners.setdefault(tuple(tokens), index)
    return ids, problems


def compile_template(parts: list[Part], words: list[list[str]], tokenizer: "PretrainedTokenizer", vocab_size: int
                     ) -> tuple[Prompt, list[Optional[int]]]:
    """Turn a template into tokens.

    parts: of `parse_template`; words: those of each class; vocab_size: rows of the model's word embeddings.
    Returns (Prompt, starts: for each soft token the id of the token that it begins as, or None: at random). UserError where the
    template's words have special tokens in them.
    """
    encode = plain_encoder(tokenizer)
    sides: tuple[list[int], list[int]] = ([tokenizer.cls_token_id], [])
    types: tuple[list[int], list[int]] = ([0], [])
    starts: list[Optional[int]] = []
    numbers: dict[int, list[int]] = {}  # soft_id -> its tokens
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
        sides[side].extend(ids)
        types[side].extend([part.get("token_type", 0)] * len(ids))
    sides[1].append(tokenizer.sep_token_id)
    types[1].append(0)
    has_types = any(types[0]) or text_type or any(types[1])
    return Prompt(parts, words, *sides, tokenizer.mask_token_id, num_masks, len(starts), prefix_length, encoder, encoder_size,
                  [types[0], text_type, types[1]] if has_types else None), starts


def _number_soft(part: Part, value: Optional[str], encode: Callable[[str], list[int]], vocab_size: int,
                 starts: list[Optional[int]], numbers: dict[int, list[int]]) -> list[int]:
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


def add_prompt(rust: "Tokenizer", prompt: Prompt) -> "Tokenizer":
    """Let a tokenizer put every text into the prompt: its cuts shorten the text alone. Returns the tokenizer."""
    from tokenizers.processors import TemplateProcessing

    before = [(f"[BEFORE{index}]", token) for index, token in enumerate(prompt.before)]
    after = [(f"[AFTER{index}]", token) for index, token in enumerate(prompt.after)]
    rust.post_processor = TemplateProcessing(single=[name for name, _ in before] + ["$A"] + [name for name, _ in after],
                                             special_tokens=before + after)
    return rust
