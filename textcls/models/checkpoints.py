"""Models and trained checkpoints: found, checked and loaded."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from textcls.common.confidence import check_threshold_of_model, read_threshold
from textcls.common.digests import file_id
from textcls.common.errors import UserError
from textcls.common.known import Centres, read_centres
from textcls.common.log import get_logger
from textcls.data.encoders import Encoder, read_long_text
from textcls.models.built_in import explain_download
from textcls.models.configs import (
    SentenceOptions,
    check_length,
    choose_length,
    config_path,
    named_labels,
    read_calibration,
    read_checkpoint_config,
    read_checkpoint_labels,
    read_config,
    read_prompt,
)
from textcls.models.families import FAMILIES, OTHER, Family, family_of, find_family, prepare
from textcls.models.huggingface import name_activations
from textcls.models.tokenizers import check_vocabulary, load_tokenizer, make_encoder, rust_tokenizer
from textcls.models.weights import (
    HUGGING_FACE_WEIGHTS,
    WEIGHTS,
    find_weights,
    fit_head,
    read_weights,
    set_weights,
    without_drawing,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from paddlenlp.transformers import PretrainedConfig, PretrainedModel, PretrainedTokenizer

KNOWN = f"a model of one of the types {', '.join(FAMILIES)}"  # for messages


def load_model(name_or_path: str, head: str = "SequenceClassification", strict: bool = False,
               ignore_mismatched_sizes: bool = False, sentence_options: Optional[SentenceOptions] = None,
               complete: bool = False, more_weights: Optional[dict[str, np.ndarray]] = None, **config_changes: Any
               ) -> "PretrainedModel":
    """Load a model in eval mode from a built-in name or a folder.

    name_or_path: a folder has config.json and either model_state.pdparams (PaddleNLP's form) or model.safetensors (Hugging
    Face's, of a BERT or ERNIE). Without either the model starts from random values, and the log says so.
    head: "SequenceClassification" (a prompt model where the folder holds one), "MaskedLM", or "SentenceEncoder". A
    pooler, classifier or projection that the folder lacks starts at random, which the log says, too; a masked LM's head has to
    be there. strict: nothing may be lacking nor be left over. sentence_options: of a "SentenceEncoder"; None: the folder's own.
    complete: nothing that is used may be lacking. more_weights: parameters that are in no file of their own, by name.
    ignore_mismatched_sizes: a classifier for another number of classes counts as lacking. config_changes: entries of the
    model's config to set (num_labels, id2label, ...). UserError where the model cannot be had.
    """
    from textcls.models.pickle_guard import guard_paddle_load

    from paddlenlp import transformers

    guard_paddle_load()
    name_activations()
    is_encoder = head == "SentenceEncoder"
    auto_model = transformers.AutoModel if is_encoder else getattr(transformers, f"AutoModelFor{head}")
    # a Hugging Face config brings use_cache=true, with which PaddleNLP's BERT returns a tuple instead of logits
    config_changes.update(use_cache=False, return_dict=False)
    if not os.path.isdir(name_or_path):
        return prepare(_load_built_in(auto_model, name_or_path, ignore_mismatched_sizes, config_changes, sentence_options))
    config = read_config(name_or_path)
    saved_labels = named_labels(config, name_or_path)
    family, is_prompt_model = find_family(config), head != "MaskedLM" and read_prompt(config, name_or_path) is not None
    if is_encoder and (is_prompt_model or family is OTHER):
        raise UserError(f"{name_or_path}: is a prompt model, or of a family that is not known, expected {KNOWN} without "
                        "a prompt (few-shot/train.py --save_plm writes the encoder of a prompt model)")
    path = find_weights(name_or_path)
    with _explain_building(name_or_path):
        if family is OTHER:
            return _load_other(auto_model, name_or_path, path, ignore_mismatched_sizes, config_changes)
        model_class = _find_class(family, "prompt" if is_prompt_model else head)
        config = forget_confidence(model_class.config_class.from_pretrained(name_or_path, **config_changes, dtype="float32"))
        if sentence_options is not None:
            config.sentence_encoder = sentence_options.entries()
        elif not is_encoder and getattr(config, "sentence_encoder", None):
            config.sentence_encoder = None  # from now on it is something else
        with without_drawing() if path else contextlib.nullcontext():
            model = model_class(config)
    if path:
        weights = {**read_weights(path, model), **(more_weights or {})}
        if not strict and head == "SequenceClassification" and "id2label" in config_changes:
            weights.update(fit_head(weights, model, saved_labels, list(config_changes["id2label"].values()), name_or_path))
        set_weights(model, weights, path, strict, ignore_mismatched_sizes, complete)
    elif strict or complete or head == "MaskedLM":
        raise UserError(f"{name_or_path}: holds no weights ({WEIGHTS} or {HUGGING_FACE_WEIGHTS}), so that it would answer at "
                        "random, expected " + ("a masked LM with its head (cls.*)" if head == "MaskedLM" else "a trained model"))
    else:
        get_logger().warning(f"{name_or_path} holds no weights ({WEIGHTS} or {HUGGING_FACE_WEIGHTS}): "
                             "the model starts from RANDOM weights.")
    return prepare(model)


def _find_class(family: Family, head: str) -> Any:
    """Find the class of the models of a family with this head. head: as of `load_model`, or "prompt"."""
    from textcls.models.prompt_model import prompt_class
    from textcls.models.sentence_model import sentence_class

    from paddlenlp import transformers

    bases = {"prompt": ("MaskedLM", prompt_class), "SentenceEncoder": ("SequenceClassification", sentence_class)}
    base, change = bases.get(head, (head, None))
    model_class = getattr(transformers, f"{family.classes}For{base}")
    return change(model_class) if change else model_class


def forget_confidence(config: "PretrainedConfig") -> "PretrainedConfig":
    """Return a model's config without what means nothing with other weights, so that no training passes it on. A Checkpoint has
    it from the file."""
    for name in ("calibration", "threshold", "known"):
        vars(config).pop(name, None)
    return config


def _load_built_in(auto_model: "type[PretrainedModel]", name: str, ignore_mismatched_sizes: bool, config_changes: dict[str, Any],
                   sentence_options: Optional[SentenceOptions]) -> "PretrainedModel":
    with explain_download(name):
        model = auto_model.from_pretrained(name, ignore_mismatched_sizes=ignore_mismatched_sizes, **config_changes)
    if sentence_options is not None:
        return _make_sentence_encoder(model, sentence_options)
    from paddlenlp.utils.env import MODEL_HOME

    path = os.path.join(MODEL_HOME, name, WEIGHTS)
    if not hasattr(model, "classifier") and os.path.isfile(path):
        set_weights(model, read_weights(path, model), path)  # once more, since PaddleNLP leaves a missing head random
    return model


def _make_sentence_encoder(base_model: "PretrainedModel", sentence_options: SentenceOptions) -> "PretrainedModel":
    """Make the encoder of texts with the weights of a model without a head."""
    from textcls.models.sentence_model import sentence_class

    from paddlenlp import transformers

    base_model.config.sentence_encoder = sentence_options.entries()
    model = sentence_class(getattr(transformers, f"{family_of(base_model).classes}ForSequenceClassification"))(base_model.config)
    model.base_model.set_state_dict(base_model.state_dict())
    return model


@contextlib.contextmanager
def _explain_building(folder: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, AttributeError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{folder}: the model cannot be built ({type(error).__name__}: {error}), expected the complete folder of "
                        f"{KNOWN}") from error


def _load_other(auto_model: "type[PretrainedModel]", folder: str, path: Optional[str], ignore_mismatched_sizes: bool,
                config_changes: dict[str, Any]) -> "PretrainedModel":
    """Load a model of a family that is not in FAMILIES, as PaddleNLP takes it: nobody has looked at what it needs."""
    if path != os.path.join(folder, WEIGHTS):
        raise UserError(f"{folder}: its model_type is none of {', '.join(FAMILIES)}, expected one of them, or a model in "
                        f"PaddleNLP's form ({WEIGHTS})")
    model_class = auto_model._get_model_class_from_config(folder, config_path(folder))
    model = model_class.from_pretrained(folder, ignore_mismatched_sizes=ignore_mismatched_sizes, **config_changes)
    forget_confidence(model.config)
    return prepare(model)


class Checkpoint(NamedTuple):
    """A trained classifier as `load_checkpoint` returns it."""

    model: "PretrainedModel"  # a sequence classifier in eval mode
    tokenizer: "PretrainedTokenizer"
    rust_tokenizer: Optional["Tokenizer"]  # the same in Rust, or None where there is no such form
    encode: Encoder
    labels: list[str]  # position = class id
    max_seq_length: int  # tokens, special tokens included
    pad_id: int
    encoder_id: Optional[str] = None  # of a model that gives vectors, in the place of labels
    temperature: float = 1.0  # what logits are divided by before the softmax
    fitted_on: str = ""  # `rows_id` of the rows that it was fitted on; "" without one
    threshold: Optional[dict[str, Any]] = None  # of --threshold auto, with what it was found for
    centres: Optional[Centres] = None  # by which unknown texts are told; None: the training kept none


def load_checkpoint(folder: str, label_path: Optional[str] = None, max_seq_length: Optional[int] = None) -> Checkpoint:
    """Load what train.py saved.

    label_path: a label.txt that has to agree with the checkpoint's labels (skipped where there is no such file).
    max_seq_length: tokens; None takes the checkpoint's own. Raises UserError.
    """
    config = read_checkpoint_config(folder, "train.py")
    if config.get("sentence_encoder") is not None:
        raise UserError(f"{folder}: a sentence encoder, which gives vectors, expected a classifier made by train.py; the "
                        "commands of retrieval_based/ take this one")
    labels, calibration = read_checkpoint_labels(folder, config, label_path), read_calibration(config, folder)
    threshold = read_threshold(config, os.path.join(folder, "config.json"))
    centres = read_centres(folder, config.get("known"))
    if threshold is not None:
        try:
            saved_threshold(folder, max_seq_length)
        except UserError:
            get_logger().warning(f"{folder}: its threshold was found with another model, temperature or length: it is not used.")
            threshold = None
    checkpoint = open_checkpoint(folder, config, max_seq_length, labels, num_labels=len(labels))
    return checkpoint._replace(temperature=calibration.get("temperature", 1.0), fitted_on=calibration.get("rows_id", ""),
                               threshold=threshold, centres=centres)


def saved_threshold(folder: str, max_seq_length: Optional[int] = None) -> float:
    """Return the threshold that a checkpoint holds, before it is loaded. UserError where it holds none, or that of another
    model."""
    config = read_checkpoint_config(folder, "train.py")
    path = os.path.join(folder, "config.json")
    entry = read_threshold(config, path)
    own = file_id(os.path.join(folder, WEIGHTS)) if entry is not None else ""
    return check_threshold_of_model(entry, path, read_calibration(config, folder).get("temperature", 1.0), own,
                                    choose_length(max_seq_length, config, folder))


def open_checkpoint(folder: str, config: dict[str, Any], max_seq_length: Optional[int], labels: list[str],
                    **model_options: Any) -> Checkpoint:
    """Load the model and the tokenizer of a folder that a training saved. config: the content of its config.json. UserError.

    max_seq_length: as of `load_checkpoint`; model_options: of `load_model`.
    """
    wanted = choose_length(max_seq_length, config, folder)
    if "max_seq_length" in config and wanted != config["max_seq_length"]:
        get_logger().warning(f"--max_seq_length {wanted} differs from the {config['max_seq_length']} of the training.")
    model = load_model(folder, strict=True, **model_options)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    length = check_length(wanted, model)
    saved = os.path.join(folder, "tokenizer.json") if "max_seq_length" in config else None  # else not train.py's
    prompt = read_prompt(config, folder)
    rust = rust_tokenizer(tokenizer, saved, prompt)
    encode = make_encoder(tokenizer, rust, length, prompt, read_long_text(config, os.path.join(folder, "config.json")))
    return Checkpoint(model, tokenizer, rust, encode, labels, length, tokenizer.pad_token_id)
