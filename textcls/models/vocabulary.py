"""A smaller model of a model folder: only some of its layers, only some tokens of its vocabulary."""

import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from textcls.common.errors import UserError
from textcls.data.files import read_json
from textcls.models.weights import WEIGHTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from paddlenlp.transformers import PretrainedTokenizer

LAYER = re.compile(r"(.*\.encoder\.layers\.)(\d+)(\..*)")  # of the name of a parameter
TABLE = ".embeddings.word_embeddings.weight"
COMMON = re.compile("[\u4e00-\u9fff]")  # Chinese characters, of which a Chinese vocabulary holds tens of thousands
LAYER_CHOICES = ("even", "first")


def choose_layers(num_layers: int, num_kept: int, choice: str) -> list[int]:
    """Choose the layers that are kept. choice: "first": those nearest to the text; "even": spread from the first to the last."""
    if choice == "first" or num_kept == 1:
        return list(range(num_kept))
    return [round(position) for position in np.linspace(0, num_layers - 1, num_kept).tolist()]


def choose_tokens(tokenizer: "PretrainedTokenizer", rust: "Tokenizer", texts: Collection[str], num_common: int) -> list[int]:
    """Choose the tokens that a model for texts like these needs.

    These are those that occur in them, each of their characters, the num_common Chinese characters that come first in the
    vocabulary (an ERNIE's begins with the most frequent ones), ASCII characters, and the special tokens.
    rust: its twin. Returns their ids, rising. UserError where the tokenizer has tokens that are not in its vocabulary.
    """
    vocab = tokenizer.get_vocab()
    if tokenizer.added_tokens_encoder:
        raise UserError(f"the tokenizer has added tokens ({min(tokenizer.added_tokens_encoder)!r}), expected one that has all "
                        "of its tokens in vocab.txt")
    characters = sorted({character for text in texts for character in text})
    kept = set(tokenizer.all_special_ids)
    for part in (list(texts), characters):
        for encoding in rust.encode_batch_fast(part):
            kept.update(encoding.ids)
    ascii_characters = list(map(chr, range(33, 127)))
    for character in characters + ascii_characters:
        kept.update(vocab[token] for token in (character, f"##{character}") if token in vocab)
    common = sorted(index for token, index in vocab.items() if COMMON.fullmatch(token))
    return sorted(kept.union(common[:num_common]))


def cut_layers(folder: str, layers: Sequence[int]) -> None:
    """Leave of the model in a folder the layers with these numbers, in this order."""
    place_of = {layer: place for place, layer in enumerate(layers)}
    weights = {}
    for name, value in _load(folder).items():
        found = LAYER.fullmatch(name)
        if found is None:
            weights[name] = value
        elif int(found[2]) in place_of:
            weights[f"{found[1]}{place_of[int(found[2])]}{found[3]}"] = value
    _save(folder, weights, num_hidden_layers=len(layers))


def cut_vocabulary(folder: str, tokenizer: "PretrainedTokenizer", kept: Sequence[int]) -> None:
    """Leave of the vocabulary of the model in a folder these tokens, and of its table of embeddings their rows.

    tokenizer: of the folder, which has to be loaded again; kept: ids of `choose_tokens`.
    """
    token_of = {index: token for token, index in tokenizer.get_vocab().items()}
    place_of = {index: place for place, index in enumerate(kept)}
    weights = {name: value[list(kept)] if name.endswith(TABLE) else value for name, value in _load(folder).items()}
    config = read_json(os.path.join(folder, "config.json"))
    ids = {name: place_of[value] for name, value in config.items() if name.endswith("_token_id") and value in place_of}
    _save(folder, weights, vocab_size=len(kept), **ids)
    _write_lines(os.path.join(folder, "vocab.txt"), (token_of[index] for index in kept))


def count_parameters(folder: str) -> int:
    """Count the weights of the model in a folder."""
    return sum(value.size for value in _load(folder).values())


def _load(folder: str) -> dict[str, np.ndarray]:
    from textcls.models.paddle_setup import paddle

    state = paddle.load(os.path.join(folder, WEIGHTS), return_numpy=True)
    return {name: value for name, value in state.items() if isinstance(value, np.ndarray)}


def _save(folder: str, weights: dict[str, np.ndarray], **changes: int) -> None:
    from textcls.models.paddle_setup import paddle

    path = os.path.join(folder, "config.json")
    config = {**read_json(path), **changes}
    paddle.save(weights, os.path.join(folder, WEIGHTS))
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, ensure_ascii=False)


def _write_lines(path: str, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
