"""PaddleNLP's tokenizers of model folders, and their Rust twins, which are as exact, faster, and put texts into prompts."""

import os
import sys
from typing import TYPE_CHECKING, Callable, Optional

from tokenizers import Tokenizer

from textcls.common.errors import UserError
from textcls.data.prompts import Prompt, add_prompt
from textcls.models.built_in import explain_download
from textcls.models.configs import read_config
from textcls.models.families import FAMILIES, find_family

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedModel, PretrainedTokenizer

Encode = Callable[[list[str]], list[list[int]]]  # texts -> their token ids, special tokens included


def load_tokenizer(name_or_path: str) -> "PretrainedTokenizer":
    """Load PaddleNLP's tokenizer of a folder or a built-in model. UserError."""
    from textcls.models.paddle_setup import paddle  # noqa: F401  first

    from paddlenlp import transformers

    if not os.path.isdir(name_or_path):
        with explain_download(name_or_path):
            return _without_paths(transformers.AutoTokenizer.from_pretrained(name_or_path))
    tokenizer_class = getattr(transformers, find_family(read_config(name_or_path)).tokenizer)
    try:
        return _without_paths(tokenizer_class.from_pretrained(name_or_path))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError, RuntimeError) as error:
        raise UserError(f"{name_or_path}: its tokenizer cannot be read ({type(error).__name__}: {error}), expected vocab.txt, "
                        "with the special tokens in it (and sentencepiece.bpe.model for ERNIE-M)") from None


def _without_paths(tokenizer: "PretrainedTokenizer") -> "PretrainedTokenizer":
    """Forget the path that PaddleNLP would save in tokenizer_config.json: it tells where this machine keeps models."""
    tokenizer.init_kwargs.pop("special_tokens_map_file", None)
    return tokenizer


def rust_tokenizer(tokenizer: "PretrainedTokenizer", max_seq_length: int, saved: Optional[str] = None,
                   prompt: Optional[Prompt] = None) -> Optional[Tokenizer]:
    """Build the Rust twin of a PaddleNLP tokenizer, which cuts at max_seq_length; None where its family has none.

    saved: a tokenizer.json that this function's result was saved as; it spares the two seconds of building. prompt: what to put
    every text into. UserError where there is a prompt and no Rust twin.
    """
    build = next((family.build_rust_tokenizer for family in FAMILIES.values() if family.tokenizer == type(tokenizer).__name__),
                 None)
    if build is None:
        if prompt is not None:
            raise UserError(f"prompts need the tokenizer of an ERNIE or BERT, expected no {type(tokenizer).__name__}")
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
            rust = build(tokenizer, () if prompt is None else (tokenizer.mask_token,))
        except ValueError as error:
            if prompt is not None:
                raise UserError(f"no prompt can be put into this tokenizer ({error}), expected a usual ERNIE or BERT") from None
            print(f"warning: tokenizing with PaddleNLP's slower tokenizer: {error}", file=sys.stderr)
            return None
    if prompt is not None:
        add_prompt(rust, prompt)
    rust.enable_truncation(max_seq_length)
    return rust


def make_encoder(tokenizer: "PretrainedTokenizer", rust: Optional[Tokenizer], max_seq_length: int) -> Encode:
    """Return the function that gives the token ids of texts, cut to max_seq_length.

    rust: as `rust_tokenizer` returns it; with None PaddleNLP's own tokenizer does the work.
    """
    if rust is not None:
        return lambda texts: [encoding.ids for encoding in rust.encode_batch_fast(texts)]
    return lambda texts: [tokenizer(text, max_length=max_seq_length, truncation=True)["input_ids"] for text in texts]


def check_vocabulary(tokenizer: "PretrainedTokenizer", model: "PretrainedModel", folder: str) -> None:
    """Raise UserError if the tokenizer can give ids that the model has no embedding for."""
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"{folder}: its vocabulary has {len(tokenizer)} tokens where config.json says vocab_size "
                        f"{model.config.vocab_size}, expected the vocabulary of this model")
