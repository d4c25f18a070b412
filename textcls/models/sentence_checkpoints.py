"""Sentence encoders loaded: what retrieval_based/train.py saved, and pretrained ones as they are."""

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Optional

from tokenizers.normalizers import Lowercase, Sequence

from textcls.common.digests import content_id, sha256
from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.data.files import read_json
from textcls.models.built_in import BUILT_IN_MODELS, RETRIEVAL_MODELS
from textcls.models.checkpoints import KNOWN, Checkpoint, load_model, open_checkpoint
from textcls.models.configs import (
    SentenceOptions,
    check_length,
    config_path,
    read_checkpoint_config,
    read_config,
    read_prompt,
    read_sentence_options,
)
from textcls.models.families import OTHER, count_positions, find_family
from textcls.models.sentence_folders import MODULES, SentenceFolder, read_prompts, read_sentence_folder
from textcls.models.tokenizers import check_vocabulary, load_tokenizer, make_encoder, rust_tokenizer
from textcls.models.weights import WEIGHTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from paddlenlp.transformers import PretrainedModel, PretrainedTokenizer

EXPECTED = ("a checkpoint of retrieval_based/train.py, an export of its export_model.py, a folder of Hugging Face or "
            "sentence-transformers, or the name of a built-in model")


def load_sentence_encoder(path: str, max_seq_length: Optional[int] = None, pooling: Optional[str] = None) -> Checkpoint:
    """Load a sentence encoder: a Checkpoint without labels, whose model gives unit vectors.

    path: what retrieval_based/train.py saved, a folder of Hugging Face or sentence-transformers, or a built-in name.
    max_seq_length: as of `load_checkpoint`. pooling: of a pretrained model that does not say its own; None: mean. UserError.
    """
    if not os.path.isdir(path) and path not in BUILT_IN_MODELS + RETRIEVAL_MODELS:
        raise UserError(f"{path}: no such folder, expected {EXPECTED}")
    found = config_path(path) if os.path.isdir(path) else None
    config = read_json(found) if found else {}
    options = read_sentence_options(config, path)
    if options is None:
        return _load_as_it_is(path, config, max_seq_length, pooling)
    read_checkpoint_config(path, "retrieval_based/train.py")
    _check_pooling(path, pooling, options.pooling)
    content = json.dumps([options.entries(), *(config[name] for name in ("max_seq_length", "long_text") if name in config)],
                         sort_keys=True)
    encoder_id = content_id((sha256(os.path.join(path, WEIGHTS)) + content).encode())
    return open_checkpoint(path, config, max_seq_length, [], head="SentenceEncoder")._replace(encoder_id=encoder_id)


def _check_pooling(path: str, pooling: Optional[str], own: str) -> None:
    if pooling not in (None, own):
        raise UserError(f"--pooling {pooling}: the encoder of {path} has its own, {own}, expected that, or a run without it")


def _load_as_it_is(path: str, config: dict[str, Any], max_seq_length: Optional[int], pooling: Optional[str]) -> Checkpoint:
    """Load a pretrained model, without a training. config: the content of the config.json in the folder path, or {}."""
    source = _find_source(path, config, pooling)
    model = load_model(source.model, head="SentenceEncoder", complete=True, sentence_options=source.options,
                       more_weights=source.projection)
    tokenizer = load_tokenizer(source.model)
    check_vocabulary(tokenizer, model, source.model)
    positions = count_positions(model)
    length = min(source.max_seq_length or positions, positions)
    wanted = check_length(max_seq_length or length, model)
    if wanted != length:
        get_logger().warning(f"--max_seq_length {wanted} differs from the {length} of the encoder.")
    rust = rust_tokenizer(tokenizer)
    if source.lowers:
        lower_texts(tokenizer, rust, path)
    return Checkpoint(model, tokenizer, rust, make_encoder(tokenizer, rust, wanted), [], wanted, tokenizer.pad_token_id,
                      encoder_id_of(model, length, source.lowers))


def _find_source(path: str, config: dict[str, Any], pooling: Optional[str]) -> SentenceFolder:
    """Find out how a pretrained model makes vectors, and say what is a guess. UserError for what cannot be an encoder."""
    if not os.path.isdir(path):
        options = SentenceOptions(pooling or ("cls" if path in RETRIEVAL_MODELS else "mean"), 0, [])
        get_logger().info(f"{path} as it is: pooling {options.pooling} (--pooling chooses another)")
        return SentenceFolder(path, False, False, options, {}, None, False)
    source = read_sentence_folder(path)
    if source.has_modules:
        _check_pooling(path, pooling, source.options.pooling)
    config = read_config(source.model)
    names = config.get("architectures")
    if any(str(name).endswith("Classification") for name in names or []) or read_prompt(config, path) is not None:
        raise UserError(f"{path}: no sentence encoder, expected {EXPECTED} (a classifier's answers: predict.py)")
    if find_family(config) is OTHER:
        raise UserError(f"{path}: its model is of the type {config.get('model_type')}, which is not known here, expected {KNOWN}")
    options = source.options if source.has_modules else source.options._replace(pooling=pooling or "mean")
    said = MODULES if source.has_modules else f"there is no {MODULES}; --pooling chooses another"
    get_logger().info(f"{path} as it is: pooling {options.pooling} ({said})"
                      + (f", a linear layer to {options.output_emb_size} numbers" if options.output_emb_size else "")
                      + ("" if source.normalizes else "; its vectors are given unit length, which changes no cosine"))
    if prompts := read_prompts(path):
        get_logger().info(f"{path} names prefixes, none of which is put before texts of itself (--query_prefix, --text_prefix): "
                          + ", ".join(f"{name} {text!r}" for name, text in prompts.items()))
    return source._replace(options=options)


def lower_texts(tokenizer: "PretrainedTokenizer", rust: "Optional[Tokenizer]", path: str) -> None:
    """Let a tokenizer lower-case texts first, as do_lower_case in a sentence_bert_config.json has it. UserError."""
    if getattr(tokenizer, "do_lower_case", False):
        return  # it does so by itself
    if rust is None:
        raise UserError(f"{path}: do_lower_case in its sentence_bert_config.json is not known for this tokenizer, expected a "
                        "usual ERNIE or BERT")
    rust.normalizer = Sequence([Lowercase(), rust.normalizer])


def encoder_id_of(model: "PretrainedModel", max_seq_length: int, lowers: bool) -> str:
    """The identity of an encoder that was not trained here: of its weights, whatever their file, and of how texts are read."""
    options = model.config.sentence_encoder
    digest = hashlib.sha256(json.dumps([options, max_seq_length, lowers], sort_keys=True).encode())
    for name, parameter in sorted(model.state_dict().items()):
        if options["pooling"] == "pooler" or ".pooler." not in name:  # else it is no part of the result, and may be random
            digest.update(name.encode())
            digest.update(parameter.numpy().tobytes())
    return digest.hexdigest()[:16]
