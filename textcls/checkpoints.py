"""Models, tokenizers and trained checkpoints: found, checked and loaded."""

import contextlib
import os
import tempfile
import types
from typing import Any, Callable, NamedTuple

import numpy as np

from utils import compare_labels, read_json, read_labels
from textcls.errors import UserError
from textcls.log import get_logger
from textcls.wordpiece import make_encoder, rust_tokenizer

BUILT_IN_MODELS = (
    "ernie-3.0-xbase-zh", "ernie-3.0-base-zh", "ernie-3.0-medium-zh", "ernie-3.0-mini-zh", "ernie-3.0-micro-zh",
    "ernie-3.0-nano-zh", "ernie-1.0-large-zh-cw", "ernie-2.0-base-en", "ernie-2.0-large-en", "ernie-m-base",
    "ernie-m-large",
)
WEIGHTS = "model_state.pdparams"
MAX_SEQ_LENGTH = 128  # tokens, where neither an option nor a checkpoint says how many


def config_path(folder):
    """The folder's config.json, or the older model_config.json; None without either."""
    for name in ("config.json", "model_config.json"):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    return None


def load_tokenizer(name_or_path):
    """Load PaddleNLP's tokenizer of a folder or a built-in model."""
    from textcls.paddle_setup import paddle  # noqa: F401  first
    from paddlenlp import transformers

    if not os.path.isdir(name_or_path):
        with _explain_download(name_or_path):
            return _without_paths(transformers.AutoTokenizer.from_pretrained(name_or_path))
    path = config_path(name_or_path)
    if path is None:
        raise UserError(f"{name_or_path}: no config.json in this folder, expected a model folder (config.json, vocab.txt)")
    content = read_json(path)
    family = content.get("model_type") or (content.get("architectures") or [content.get("init_class") or ""])[0]
    family = str(family).lower().replace("_", "")
    names = {"erniem": "ErnieMTokenizer", "ernie": "ErnieTokenizer", "bert": "BertTokenizer"}
    name = next((name for prefix, name in names.items() if family.startswith(prefix)), "AutoTokenizer")
    try:
        return _without_paths(getattr(transformers, name).from_pretrained(name_or_path))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError, RuntimeError) as error:
        raise UserError(f"{name_or_path}: its tokenizer cannot be read ({type(error).__name__}: {error}), expected vocab.txt, "
                        "with the special tokens in it (and sentencepiece.bpe.model for ERNIE-M)") from None


def _without_paths(tokenizer):
    """Forget the path that PaddleNLP would save in tokenizer_config.json: it tells where this machine keeps models."""
    tokenizer.init_kwargs.pop("special_tokens_map_file", None)
    return tokenizer


def load_model(name_or_path, head="SequenceClassification", **config_changes):
    """Load a model in eval mode from a built-in name, a PaddleNLP folder or a Hugging Face BERT folder.

    A folder without weights gives a model with random weights, and the log says so. head: "SequenceClassification" or
    "MaskedLM". config_changes: entries of the model's config to set (num_labels, id2label, ...). UserError where the model
    cannot be had.
    """
    from textcls.pickle_guard import guard_paddle_load
    from paddlenlp import transformers

    guard_paddle_load()
    auto_model = getattr(transformers, f"AutoModelFor{head}")
    # a Hugging Face config brings use_cache=true, with which PaddleNLP's BERT returns a tuple instead of logits
    config_changes.update(use_cache=False, return_dict=False)
    if not os.path.isdir(name_or_path):
        with _explain_download(name_or_path):
            model = auto_model.from_pretrained(name_or_path, **config_changes)
        return _prepared(model)
    path = config_path(name_or_path)
    if path is None:
        raise UserError(f"{name_or_path}: no config.json in this folder, expected a model folder (config.json, vocab.txt "
                        f"and, for trained models, {WEIGHTS} or model.safetensors)")
    if "width_mult" in read_json(path):  # a damaged file is reported by its name
        raise UserError(f"{name_or_path}: a pruned model, which can only be deployed, expected the whole one it was made from")
    files = set(os.listdir(name_or_path))
    shards = sorted(name for name in files if name.endswith((".safetensors.index.json", ".bin.index.json")))
    if shards and WEIGHTS not in files:
        raise UserError(f"{name_or_path}: its weights are in several files ({shards[0]}), expected one model.safetensors "
                        "(transformers: model.save_pretrained(folder, max_shard_size=\"100GB\"))")
    try:
        model_class = auto_model._get_model_class_from_config(name_or_path, path)
        if WEIGHTS in files or "model_state.pdparams.index.json" in files:
            return _prepared(model_class.from_pretrained(name_or_path, **config_changes))
        if "model.safetensors" in files:
            check_safetensors(os.path.join(name_or_path, "model.safetensors"))
            # PaddleNLP writes the converted weights beside the original: give it links in a folder that may be written
            with tempfile.TemporaryDirectory() as links:
                for name in ("config.json", "model.safetensors"):
                    os.symlink(os.path.abspath(os.path.join(name_or_path, name)), os.path.join(links, name))
                return _prepared(model_class.from_pretrained(links, convert_from_torch=True, **config_changes))
        if "pytorch_model.bin" in files:
            raise UserError(f"{name_or_path}: pytorch_model.bin is a pickle and is not read, expected model.safetensors "
                            "(transformers: model.save_pretrained(folder, safe_serialization=True))")
        get_logger().warning(f"{name_or_path} holds no weights ({WEIGHTS} or model.safetensors): "
                             "the model starts from RANDOM weights.")
        return _prepared(model_class(model_class.config_class.from_pretrained(name_or_path, **config_changes)))
    except (KeyError, AttributeError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{name_or_path}: the model cannot be built ({type(error).__name__}: {error}), expected the "
                        "complete folder of an ERNIE, ERNIE-M or BERT model") from error


def check_safetensors(path):
    """UserError for a damaged file: PaddleNLP would try other formats on it and fail without a word."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}), expected the weights as transformers saves them") from None


@contextlib.contextmanager
def _explain_download(name):
    known = f"one of {', '.join(BUILT_IN_MODELS)}, or a folder with config.json and vocab.txt"
    if os.sep in name and name not in BUILT_IN_MODELS:
        raise UserError(f"{name}: no such folder, expected {known}")
    try:
        yield
    except (OSError, RuntimeError) as error:  # what PaddleNLP's downloader raises
        if name not in BUILT_IN_MODELS:
            raise UserError(f"{name}: neither a folder nor a model that could be downloaded, expected {known}") from None
        from paddlenlp.utils.env import MODEL_HOME

        raise UserError(
            f"{name}: its files could not be downloaded ({error})\nWithout a connection: on a machine that has one, run "
            f"the same command once and copy its folder {os.path.join(MODEL_HOME, name)} to the same place here, or pass "
            "a model folder (config.json, vocab.txt, model_state.pdparams) with --model_name_or_path.") from None


def _prepared(model):
    if type(model).__name__.startswith("ErnieM"):
        # past Layer.__setattr__, where PaddleNLP would rewrite it
        object.__setattr__(model, "forward", types.MethodType(_ernie_m_forward, model))
    model.eval()
    return model


def _ernie_m_forward(self, input_ids, attention_mask=None, **inputs):
    """ERNIE-M's forward with the mask of its padding.

    PaddleNLP 2.8.1's own default masks id 0, which is [CLS], and attends to the padding (id 1), so that logits depend on
    the batch a text is in. Can go when ErnieMModel compares with pad_token_id.
    """
    if attention_mask is None:
        attention_mask = (input_ids != self.config.pad_token_id).astype("float32")
    return type(self).forward(self, input_ids, attention_mask=attention_mask, **inputs)


class Checkpoint(NamedTuple):
    """A trained classifier as `load_checkpoint` returns it."""

    model: Any  # PaddleNLP sequence classifier in eval mode
    tokenizer: Any  # PaddleNLP tokenizer
    rust_tokenizer: Any  # the same as a tokenizers.Tokenizer, or None where there is no such form
    encode: Callable  # list of str -> list of lists of token ids
    labels: list[str]  # position = class id
    max_seq_length: int  # tokens, special tokens included
    pad_id: int


def load_checkpoint(folder, label_path=None, max_seq_length=None):
    """Load what train.py saved.

    label_path: a label.txt that has to agree with the checkpoint's labels (skipped where there is no such file).
    max_seq_length: tokens; None takes the checkpoint's own. Raises UserError.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder, expected a checkpoint made by train.py")
    path = config_path(folder)
    if path is None or not os.path.isfile(os.path.join(folder, WEIGHTS)):
        missing = WEIGHTS if path else "config.json"
        raise UserError(f"{folder}: {missing} is missing, expected a complete checkpoint made by train.py")
    config = read_json(path)
    labels = _checkpoint_labels(folder, config, label_path)
    trained_length = config.get("max_seq_length", MAX_SEQ_LENGTH)
    if not isinstance(trained_length, int):
        raise UserError(f"{path}: max_seq_length is {trained_length!r}, expected a number of tokens")
    if max_seq_length is not None and max_seq_length != trained_length:
        get_logger().warning(f"--max_seq_length {max_seq_length} differs from the {trained_length} of the training.")
    model = load_model(folder, num_labels=len(labels))
    check_weights(model, os.path.join(folder, WEIGHTS))
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    length = check_length(trained_length if max_seq_length is None else max_seq_length, model)
    saved = os.path.join(folder, "tokenizer.json") if "max_seq_length" in config else None  # else not train.py's
    rust = rust_tokenizer(tokenizer, length, saved)
    encode = make_encoder(tokenizer, rust, length)
    return Checkpoint(model, tokenizer, rust, encode, labels, length, tokenizer.pad_token_id)


def check_weights(model, path):
    """UserError if the weights file is not just the model's: PaddleNLP would leave what it lacks random, and skip the rest."""
    from textcls.paddle_setup import paddle

    saved = {name for name, value in paddle.load(path, return_numpy=True).items() if isinstance(value, np.ndarray)}
    own = set(model.state_dict())
    for names, what in ((own - saved, "lacks"), (saved - own, "has besides the model's own")):
        if names:
            raise UserError(f"{path}: {what} {len(names)} parameters, {min(names)} among them, expected the weights of a "
                            "classifier made by train.py, and the config.json that belongs to them")


def check_vocabulary(tokenizer, model, folder):
    """UserError if the tokenizer can give ids that the model has no embedding for."""
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"{folder}: its vocabulary has {len(tokenizer)} tokens where config.json says vocab_size "
                        f"{model.config.vocab_size}, expected the vocabulary of this model")


def count_positions(model):
    """How many tokens a model can take at most, special tokens included."""
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    return positions - 2 if type(model).__name__.startswith("ErnieM") else positions  # ERNIE-M counts positions from 2


def check_length(max_seq_length, model):
    """Return max_seq_length if the model has that many positions; UserError otherwise."""
    positions = count_positions(model)
    if not 3 <= max_seq_length <= positions:
        raise UserError(f"--max_seq_length {max_seq_length}: out of range, expected 3 to {positions} for this model")
    return max_seq_length


def _checkpoint_labels(folder, config, label_path):
    own_path = os.path.join(folder, "label.txt")
    if isinstance(config.get("id2label"), dict):
        if not all(str(index).isdecimal() for index in config["id2label"]):
            raise UserError(f"{folder}: the keys of id2label in its config.json are not class ids, expected 0, 1, 2, ...")
        id2label = {int(index): label for index, label in config["id2label"].items()}
        labels = [id2label.get(index) for index in range(len(id2label))]
        if not all(isinstance(label, str) for label in labels):
            raise UserError(f"{folder}: id2label in its config.json does not name every class, expected {{\"0\": label, ...}}")
    elif os.path.isfile(own_path) or (label_path and os.path.isfile(label_path)):
        labels = read_labels(own_path if os.path.isfile(own_path) else label_path)
        get_logger().warning(f"{folder}: its config names no labels; taking them from label.txt.")
    else:
        raise UserError(f"{folder}: neither id2label in its config.json nor a label.txt, expected one of them")
    for path in (own_path, label_path):
        if path and os.path.isfile(path):
            compare_labels(labels, read_labels(path), path, folder)
    return labels
