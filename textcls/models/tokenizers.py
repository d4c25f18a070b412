"""PaddleNLP's tokenizers of model folders, and their Rust twins, which are as exact, faster, and put texts into prompts."""

import os
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING, Optional

from tokenizers import Tokenizer

from textcls.common.errors import UserError
from textcls.common.long_texts import CUT, LongText
from textcls.data.encoders import Encoder, rust_encoder
from textcls.data.files import read_json
from textcls.data.prompts import Prompt, add_prompt
from textcls.models.built_in import explain_download
from textcls.models.configs import read_config
from textcls.models.families import FAMILIES, find_family

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedModel, PretrainedTokenizer


def load_tokenizer(name_or_path: str) -> "PretrainedTokenizer":
    """Load PaddleNLP's tokenizer of a folder or a built-in model. UserError."""
    from textcls.models.paddle_setup import paddle  # noqa: F401  first

    from paddlenlp import transformers

    if not os.path.isdir(name_or_path):
        with explain_download(name_or_path):
            return _without_paths(transformers.AutoTokenizer.from_pretrained(name_or_path))
    family = find_family(read_config(name_or_path))
    tokenizer_class = getattr(transformers, family.tokenizer)
    try:
        if family.build_rust_tokenizer and not os.path.isfile(os.path.join(name_or_path, "vocab.txt")):
            return _load_without_vocabulary(tokenizer_class, name_or_path)
        return _without_paths(tokenizer_class.from_pretrained(name_or_path))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError, RuntimeError) as error:
        raise UserError(f"{name_or_path}: its tokenizer cannot be read ({type(error).__name__}: {error}), expected vocab.txt, "
                        "with the special tokens in it (and sentencepiece.bpe.model for ERNIE-M)") from None


def _load_without_vocabulary(tokenizer_class: "type[PretrainedTokenizer]", folder: str) -> "PretrainedTokenizer":
    """Load the tokenizer of a folder whose vocabulary is in tokenizer.json only, as transformers 5 saves a BERT."""
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        return _without_paths(tokenizer_class.from_pretrained(folder))  # raises
    model = read_json(path)["model"]
    if model["type"] != "WordPiece":
        raise ValueError(f"the model in tokenizer.json is a {model['type']}, not a WordPiece")
    vocab = model["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("the numbers of the tokens in tokenizer.json have gaps")
    copy = tempfile.TemporaryDirectory()  # lives as long as the tokenizer, which copies the file when it is saved
    with open(os.path.join(copy.name, "vocab.txt"), "w", encoding="utf-8") as file:
        file.writelines(token + "\n" for token in tokens)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if os.path.isfile(os.path.join(folder, name)):
            shutil.copy(os.path.join(folder, name), copy.name)
    tokenizer = _without_paths(tokenizer_class.from_pretrained(copy.name))
    tokenizer.vocabulary_folder = copy
    return tokenizer


def _without_paths(tokenizer: "PretrainedTokenizer") -> "PretrainedTokenizer":
    """Forget the path that PaddleNLP would save in tokenizer_config.json: it tells where this machine keeps models."""
    tokenizer.init_kwargs.pop("special_tokens_map_file", None)
    return tokenizer


def rust_tokenizer(tokenizer: "PretrainedTokenizer", saved: Optional[str] = None, prompt: Optional[Prompt] = None
                   ) -> Optional[Tokenizer]:
    """Build the Rust twin of a PaddleNLP tokenizer, which cuts nothing; None where its family has none.

    saved: a file of `save_rust_tokenizer`; it spares the two seconds of building. prompt: what to put every text into. UserError
    where there is a prompt and no Rust twin.
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
    rust.no_truncation()
    return rust


def save_rust_tokenizer(rust: Tokenizer, path: str, max_seq_length: int) -> None:
    """Save a tokenizer in a form that cuts texts, as programs of others would expect."""
    rust.enable_truncation(max_seq_length)
    rust.save(path)
    rust.no_truncation()


def make_encoder(tokenizer: "PretrainedTokenizer", rust: Optional[Tokenizer], max_seq_length: int,
                 prompt: Optional[Prompt] = None, long_text: LongText = CUT) -> Encoder:
    """Return what gives the token ids of texts.

    rust: as `rust_tokenizer` returns it, with the same prompt; with None PaddleNLP's own tokenizer does the work. UserError.
    """
    sides = (1, 1) if prompt is None else (len(prompt.before), len(prompt.after))
    if rust is not None:
        return Encoder(rust_encoder(rust), *sides, max_seq_length, long_text)
    return Encoder(lambda texts: [tokenizer(text)["input_ids"] for text in texts], *sides, max_seq_length, long_text)


def check_vocabulary(tokenizer: "PretrainedTokenizer", model: "PretrainedModel", folder: str) -> None:
    """Raise UserError if the tokenizer can give ids that the model has no embedding for."""
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"{folder}: its vocabulary has {len(tokenizer)} tokens where config.json says vocab_size "
                        f"{model.config.vocab_size}, expected the vocabulary of this model")
