"""Models, tokenizers and trained checkpoints: found, checked and loaded."""

import contextlib
import hashlib
import json
import os
import sys
from typing import Any, Callable, NamedTuple, Optional

from tokenizers import Tokenizer

from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.data.files import read_json
from textcls.data.prompts import add_prompt
from textcls.models.configs import (
    choose_length,
    config_path,
    read_checkpoint_config,
    read_checkpoint_labels,
    read_config,
    read_prompt,
    read_sentence_options,
    shortest_length,
)
from textcls.models.families import FAMILIES, OTHER, count_positions, family_of, find_family, prepare
from textcls.models.huggingface import name_activations
from textcls.models.weights import HUGGING_FACE_WEIGHTS, WEIGHTS, find_weights, read_weights, set_weights, without_drawing
from textcls.runtime.exported import sha256

BUILT_IN_MODELS = (
    "ernie-3.0-xbase-zh", "ernie-3.0-base-zh", "ernie-3.0-medium-zh", "ernie-3.0-mini-zh", "ernie-3.0-micro-zh",
    "ernie-3.0-nano-zh", "ernie-1.0-large-zh-cw", "ernie-2.0-base-en", "ernie-2.0-large-en", "ernie-m-base",
    "ernie-m-large",
)
RETRIEVAL_MODELS = ("rocketqa-zh-dureader-query-encoder", "rocketqa-zh-base-query-encoder", "rocketqa-zh-medium-query-encoder",
                    "rocketqa-zh-mini-query-encoder", "rocketqa-zh-micro-query-encoder", "rocketqa-zh-nano-query-encoder")


def load_tokenizer(name_or_path):
    """Load PaddleNLP's tokenizer of a folder or a built-in model."""
    from textcls.models.paddle_setup import paddle  # noqa: F401  first

    from paddlenlp import transformers

    if not os.path.isdir(name_or_path):
        with _explain_download(name_or_path):
            return _without_paths(transformers.AutoTokenizer.from_pretrained(name_or_path))
    path = config_path(name_or_path)
    if path is None:
        raise UserError(f"{name_or_path}: no config.json in this folder, expected a model folder (config.json, vocab.txt)")
    tokenizer_class = getattr(transformers, find_family(read_json(path)).tokenizer)
    try:
        return _without_paths(tokenizer_class.from_pretrained(name_or_path))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError, RuntimeError) as error:
        raise UserError(f"{name_or_path}: its tokenizer cannot be read ({type(error).__name__}: {error}), expected vocab.txt, "
                        "with the special tokens in it (and sentencepiece.bpe.model for ERNIE-M)") from None


def _without_paths(tokenizer):
    """Forget the path that PaddleNLP would save in tokenizer_config.json: it tells where this machine keeps models."""
    tokenizer.init_kwargs.pop("special_tokens_map_file", None)
    return tokenizer


def rust_tokenizer(tokenizer, max_seq_length, saved=None, prompt=None):
    """The Rust twin of a PaddleNLP tokenizer, cutting at max_seq_length; None where its family has none.

    saved: a tokenizer.json that this function's result was saved as; it spares the two seconds of building. prompt: a Prompt
    to put every text into, or None. UserError where there is a prompt and no Rust twin.
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


def make_encoder(tokenizer, rust, max_seq_length):
    """Return a function: list of str -> list of lists of token ids, special tokens included, cut to max_seq_length.

    rust: as `rust_tokenizer` returns it; with None PaddleNLP's own tokenizer does the work.
    """
    if rust is not None:
        return lambda texts: [encoding.ids for encoding in rust.encode_batch_fast(texts)]
    return lambda texts: [tokenizer(text, max_length=max_seq_length, truncation=True)["input_ids"] for text in texts]


def load_model(name_or_path, head="SequenceClassification", strict=False, ignore_mismatched_sizes=False, sentence_options=None,
               **config_changes):
    """Load a model in eval mode from a built-in name or a folder.

    name_or_path: a folder has config.json and either model_state.pdparams (PaddleNLP's form) or model.safetensors (Hugging
    Face's, of a BERT or ERNIE). Without either the model starts from random values, and the log says so.
    head: "SequenceClassification" (a prompt model where the folder holds one), "MaskedLM", or "SentenceEncoder". A
    pooler, classifier or projection that the folder lacks starts at random, which the log says, too; a masked LM's head has to
    be there. strict: nothing may be lacking nor be left over. sentence_options: SentenceOptions of a "SentenceEncoder"; None:
    the folder's own.
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
    family, is_prompt_model = find_family(config), head != "MaskedLM" and read_prompt(config, name_or_path) is not None
    if is_encoder and (is_prompt_model or family is OTHER):
        raise UserError(f"{name_or_path}: is a prompt model, or of a family that is not known, expected an ERNIE, ERNIE-M or "
                        "BERT without a prompt (few-shot/train.py --save_plm writes the encoder of a prompt model)")
    path = find_weights(name_or_path)
    with _explain_building(name_or_path):
        if family is OTHER:
            return _load_other(auto_model, name_or_path, path, ignore_mismatched_sizes, config_changes)
        base = "MaskedLM" if is_prompt_model else "SequenceClassification" if is_encoder else head
        model_class = getattr(transformers, f"{family.classes}For{base}")
        if is_prompt_model:
            from textcls.models.prompt_model import prompt_class

            model_class = prompt_class(model_class)
        elif is_encoder:
            from textcls.models.sentence_model import sentence_class

            model_class = sentence_class(model_class)
        config = model_class.config_class.from_pretrained(name_or_path, **config_changes, dtype="float32")
        if sentence_options is not None:
            config.sentence_encoder = sentence_options._asdict()
        elif not is_encoder and getattr(config, "sentence_encoder", None):
            config.sentence_encoder = None  # from now on it is something else
        with without_drawing() if path else contextlib.nullcontext():
            model = model_class(config)
    if path:
        set_weights(model, read_weights(path, model), path, strict, ignore_mismatched_sizes)
    elif strict or head == "MaskedLM":
        raise UserError(f"{name_or_path}: holds no weights ({WEIGHTS} or {HUGGING_FACE_WEIGHTS}), so that it would answer at "
                        "random, expected " + ("a masked LM with its head (cls.*)" if head == "MaskedLM" else "a trained model"))
    else:
        get_logger().warning(f"{name_or_path} holds no weights ({WEIGHTS} or {HUGGING_FACE_WEIGHTS}): "
                             "the model starts from RANDOM weights.")
    return prepare(model)


def _load_built_in(auto_model, name, ignore_mismatched_sizes, config_changes, sentence_options):
    with _explain_download(name):
        model = auto_model.from_pretrained(name, ignore_mismatched_sizes=ignore_mismatched_sizes, **config_changes)
    if sentence_options is not None:
        return _make_sentence_encoder(model, sentence_options)
    from paddlenlp.utils.env import MODEL_HOME

    path = os.path.join(MODEL_HOME, name, WEIGHTS)
    if not hasattr(model, "classifier") and os.path.isfile(path):
        set_weights(model, read_weights(path, model), path)  # once more, since PaddleNLP leaves a missing head random
    return model


def _make_sentence_encoder(base_model, sentence_options):
    """The encoder of texts with the weights of a model without a head."""
    from textcls.models.sentence_model import sentence_class

    from paddlenlp import transformers

    base_model.config.sentence_encoder = sentence_options._asdict()
    model = sentence_class(getattr(transformers, f"{family_of(base_model).classes}ForSequenceClassification"))(base_model.config)
    model.base_model.set_state_dict(base_model.state_dict())
    return model


@contextlib.contextmanager
def _explain_building(folder):
    try:
        yield
    except (KeyError, AttributeError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{folder}: the model cannot be built ({type(error).__name__}: {error}), expected the "
                        "complete folder of an ERNIE, ERNIE-M or BERT model") from error


def _load_other(auto_model, folder, path, ignore_mismatched_sizes, config_changes):
    """A model of a family that is not in FAMILIES, as PaddleNLP takes it: nobody has looked at what it needs."""
    if path != os.path.join(folder, WEIGHTS):
        raise UserError(f"{folder}: its model_type is none of {', '.join(FAMILIES)}, expected one of them, or a model in "
                        f"PaddleNLP's form ({WEIGHTS})")
    model_class = auto_model._get_model_class_from_config(folder, config_path(folder))
    return prepare(model_class.from_pretrained(folder, ignore_mismatched_sizes=ignore_mismatched_sizes, **config_changes))


@contextlib.contextmanager
def _explain_download(name):
    known = f"one of {', '.join(BUILT_IN_MODELS)}, or a folder with config.json and vocab.txt"
    names = BUILT_IN_MODELS + RETRIEVAL_MODELS
    if os.sep in name and name not in names:
        raise UserError(f"{name}: no such folder, expected {known}")
    try:
        yield
    except (OSError, RuntimeError) as error:  # what PaddleNLP's downloader raises
        if name not in names:
            raise UserError(f"{name}: neither a folder nor a model that could be downloaded, expected {known}") from None
        from paddlenlp.utils.env import MODEL_HOME

        raise UserError(
            f"{name}: its files could not be downloaded ({error})\nWithout a connection: on a machine that has one, run "
            f"the same command once and copy its folder {os.path.join(MODEL_HOME, name)} to the same place here, or pass "
            "a model folder (config.json, vocab.txt, model_state.pdparams) with --model_name_or_path.") from None


class Checkpoint(NamedTuple):
    """A trained classifier as `load_checkpoint` returns it."""

    model: Any  # PaddleNLP sequence classifier in eval mode
    tokenizer: Any  # PaddleNLP tokenizer
    rust_tokenizer: Any  # the same as a tokenizers.Tokenizer, or None where there is no such form
    encode: Callable  # list of str -> list of lists of token ids
    labels: list[str]  # position = class id
    max_seq_length: int  # tokens, special tokens included
    pad_id: int
    num_before: int = 1  # tokens before those of the text: [CLS], or a prompt's
    num_after: int = 1  # tokens after them: [SEP], or a prompt's
    encoder_id: Optional[str] = None  # of a model that gives vectors, in the place of labels


def load_checkpoint(folder, label_path=None, max_seq_length=None):
    """Load what train.py saved.

    label_path: a label.txt that has to agree with the checkpoint's labels (skipped where there is no such file).
    max_seq_length: tokens; None takes the checkpoint's own. Raises UserError.
    """
    config = read_checkpoint_config(folder, "train.py")
    if config.get("sentence_encoder") is not None:
        raise UserError(f"{folder}: a sentence encoder, which gives vectors, expected a classifier made by train.py; the "
                        "commands of retrieval_based/ take this one")
    labels = read_checkpoint_labels(folder, config, label_path)
    return _open_checkpoint(folder, config, max_seq_length, labels, num_labels=len(labels))


def load_sentence_encoder(folder, max_seq_length=None):
    """Load what retrieval_based/train.py saved: a Checkpoint without labels, whose model gives unit vectors.

    max_seq_length: as of `load_checkpoint`. Raises UserError.
    """
    config = read_checkpoint_config(folder, "retrieval_based/train.py")
    options = read_sentence_options(config, folder)
    if options is None:
        raise UserError(f"{folder}: no sentence encoder, expected a checkpoint made by retrieval_based/train.py (a classifier's "
                        "answers: predict.py)")
    content = json.dumps([options._asdict(), config["max_seq_length"]], sort_keys=True)
    encoder_id = hashlib.sha256((sha256(os.path.join(folder, WEIGHTS)) + content).encode()).hexdigest()[:16]
    return _open_checkpoint(folder, config, max_seq_length, [], head="SentenceEncoder")._replace(encoder_id=encoder_id)


def _open_checkpoint(folder, config, max_seq_length, labels, **model_options):
    wanted = choose_length(max_seq_length, config, folder)
    if "max_seq_length" in config and wanted != config["max_seq_length"]:
        get_logger().warning(f"--max_seq_length {wanted} differs from the {config['max_seq_length']} of the training.")
    model = load_model(folder, strict=True, **model_options)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    length = check_length(wanted, model)
    saved = os.path.join(folder, "tokenizer.json") if "max_seq_length" in config else None  # else not train.py's
    prompt = read_prompt(config, folder)
    rust = rust_tokenizer(tokenizer, length, saved, prompt)
    encode = make_encoder(tokenizer, rust, length)
    sides = (1, 1) if prompt is None else (len(prompt.before), len(prompt.after))
    return Checkpoint(model, tokenizer, rust, encode, labels, length, tokenizer.pad_token_id, *sides)


def check_vocabulary(tokenizer, model, folder):
    """UserError if the tokenizer can give ids that the model has no embedding for."""
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"{folder}: its vocabulary has {len(tokenizer)} tokens where config.json says vocab_size "
                        f"{model.config.vocab_size}, expected the vocabulary of this model")


def check_length(max_seq_length, model):
    """Return max_seq_length if the model has that many positions; UserError otherwise."""
    least, most = shortest_length(model), count_positions(model)
    if not least <= max_seq_length <= most:
        raise UserError(f"--max_seq_length {max_seq_length}: out of range, expected {least} to {most} for this model")
    return max_seq_length
