"""What the scripts share and needs Paddle: logger, device, safe checkpoint reading, models, inference.

Logits are float32 [num_texts, num_classes] in the order of the input.
"""

import contextlib
import functools
import logging
import os
import pickletools
import sys
import tempfile
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, NamedTuple

import numpy as np

from utils import (UserError, compare_labels, exit_on_sigterm, fast_tokenizer, is_main_rank, make_encoder, pad_batch, read_json,
                   read_labels, sorted_batches)

BUILT_IN_MODELS = (
    "ernie-3.0-xbase-zh", "ernie-3.0-base-zh", "ernie-3.0-medium-zh", "ernie-3.0-mini-zh", "ernie-3.0-micro-zh",
    "ernie-3.0-nano-zh", "ernie-1.0-large-zh-cw", "ernie-2.0-base-en", "ernie-2.0-large-en", "ernie-m-base",
    "ernie-m-large",
)
WEIGHTS = "model_state.pdparams"


# ---------------------------------------------------------------- logger and device


@functools.cache
def get_logger():
    """PaddleNLP's logger: `[time] [    INFO] - text` on standard error, coloured only on a terminal."""
    with quiet_import():
        from paddlenlp.utils.log import logger
    if threading.current_thread() is threading.main_thread():
        exit_on_sigterm()
    if not sys.stderr.isatty():
        logger.handler.setFormatter(logging.Formatter("[%(asctime)-15s] [%(levelname)8s] - %(message)s"))
    return logger


class _WithoutNoise:
    """Standard error without two warnings; a proxy, since log handlers made during an import keep the stream."""

    noise = ("WARNING: OMP_NUM_THREADS set to", "PLEASE USE OMP_NUM_THREADS WISELY")

    def __init__(self, stream):
        self.stream, self.dropped = stream, False

    def write(self, text):
        if not (text.startswith(self.noise) or (self.dropped and text == "\n")):
            self.stream.write(text)
        self.dropped = text.startswith(self.noise)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def quiet_import():
    """Hide the warnings that importing Paddle prints on every start.

    Paddle 2.6.2 warns about OMP_NUM_THREADS > 1 (meant for OpenBLAS builds; the PyPI wheels use MKL), setuptools about
    distutils. Neither says anything a user could act on.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(_WithoutNoise(sys.stderr)):
        warnings.simplefilter("ignore")
        yield


def select_device(device):
    """Select and return the Paddle device.

    device: "cpu", "gpu", "gpu:1", "xpu", "npu" or None (the GPU if Paddle sees one, else the CPU, saying so).
    Raises UserError where the device does not exist.
    """
    logger = get_logger()  # first: it imports Paddle without its warnings
    import paddle

    kind = (device or "").split(":")[0]
    if device is not None and kind not in ("cpu", "gpu", "xpu", "npu"):
        raise UserError(f"--device {device}: unknown device, expected cpu, gpu, gpu:N, xpu or npu")
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if device is None:
        kind = device = "gpu" if gpus else "cpu"
        if not gpus and is_main_rank():
            logger.info("No GPU seen by Paddle: using the CPU.")
    if kind == "gpu" and not gpus:
        build = "this Paddle is a CPU build" if not paddle.is_compiled_with_cuda() else "Paddle sees no GPU"
        raise UserError(f"--device {device}: {build}, expected --device cpu, or `pip install -r requirements.txt` on a "
                        "machine with an NVIDIA GPU and driver")
    try:
        paddle.set_device(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--device {device}: Paddle cannot use it ({error}), expected cpu or gpu") from None
    return device


# ---------------------------------------------------------------- checkpoints

# What Paddle's own pickles refer to: arrays, tensors (as tuples), ordered dicts and the state of its random generator.
PICKLE_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("_codecs", "encode"), ("builtins", "tuple"), ("__builtin__", "tuple"),
    ("collections", "OrderedDict"), ("paddle.base.libpaddle", "GeneratorState"),
}
PICKLE_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}


def check_pickle(path):
    """Raise UserError unless unpickling the file could only build what Paddle itself writes (see PICKLE_GLOBALS).

    Reads the opcodes without running them. An import whose name is not spelled out right before it is refused too.
    """
    expected = "a file that paddle.save wrote; do not load files from sources you do not trust"
    recent, memo, found = [], {}, None
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                name = opcode.name
                if name == "FRAME":
                    continue
                if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
                    memo[len(memo) if name == "MEMOIZE" else argument] = recent[-1] if recent else None
                    continue
                if name in ("INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"):
                    found = name
                elif name in ("GLOBAL", "STACK_GLOBAL"):
                    reference = argument.split(" ", 1) if name == "GLOBAL" else recent[-2:]
                    if tuple(reference) not in PICKLE_GLOBALS:
                        found = ".".join(str(part) for part in reference)
                if found:
                    raise UserError(f"{path}: refused, its pickle refers to {found!r}, expected {expected}")
                if name in PICKLE_STRINGS:
                    recent.append(argument)
                else:
                    recent.append(memo.get(argument) if name in ("BINGET", "LONG_BINGET", "GET") else None)
                del recent[:-2]
    except (ValueError, OSError, UnicodeDecodeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: damaged or not a Paddle file ({error}), expected {expected}") from None


@functools.cache
def guard_paddle_load():
    """Make every `paddle.load`, PaddleNLP's own calls included, check the pickle before it is read."""
    import paddle

    load = paddle.load

    @functools.wraps(load)
    def checked_load(path, **configs):
        check_pickle(path)
        return load(path, **configs)

    paddle.load = checked_load


# ---------------------------------------------------------------- models and tokenizers


def config_path(folder):
    """The folder's config.json, or the older model_config.json; None without either."""
    for name in ("config.json", "model_config.json"):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    return None


def load_tokenizer(name_or_path):
    """Load PaddleNLP's tokenizer of a folder or a built-in model."""
    with quiet_import():
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
    guard_paddle_load()
    with quiet_import():
        from paddlenlp import transformers
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
    fast: Any  # the same as a tokenizers.Tokenizer, or None where there is no such form
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
    trained_length = config.get("max_seq_length", 128)
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
    fast = fast_tokenizer(tokenizer, length, saved)
    encode = make_encoder(tokenizer, fast, length)
    return Checkpoint(model, tokenizer, fast, encode, labels, length, tokenizer.pad_token_id)


def check_weights(model, path):
    """UserError if the weights file is not just the model's: PaddleNLP would leave what it lacks random, and skip the rest."""
    import paddle

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


def check_length(max_seq_length, model):
    """Return max_seq_length if the model has that many positions; UserError otherwise."""
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    positions -= 2 if type(model).__name__.startswith("ErnieM") else 0  # ERNIE-M counts positions from 2
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


# ---------------------------------------------------------------- inference


def predict_logits(checkpoint, tokens, batch_size, progress=None, after_batch=None):
    """Run the classifier over TokenizedTexts; returns logits float32 [num_texts, num_classes] in input order.

    Batches are formed by length. On a CPU each thread runs batches of its own: Paddle's GELU, softmax and layer norm
    use one thread only, whatever OMP_NUM_THREADS says. progress: a tqdm bar to advance by the texts done, or None.
    after_batch: called with the indices (int64 [batch]) of the texts that the calling thread has just run, or None.
    """
    import paddle
    from threadpoolctl import threadpool_limits

    device = paddle.get_device()
    logits = np.empty((len(tokens), len(checkpoint.labels)), dtype=np.float32)

    def prepare_thread():
        paddle.set_device(device)
        threadpool_limits(1, user_api="openmp")  # of this thread; the other threads keep theirs

    def run(indices):
        rows = [tokens[index]["input_ids"] for index in indices]
        with paddle.no_grad():
            logits[indices] = checkpoint.model(paddle.to_tensor(pad_batch(rows, checkpoint.pad_id))).numpy()
        if after_batch is not None:
            after_batch(indices)
        if progress is not None:
            progress.update(len(indices))

    batches = sorted_batches(tokens.lengths, batch_size)
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", 1))) if device == "cpu" else 1
    if threads == 1:
        for batch in batches:
            run(batch)
    else:
        with ThreadPoolExecutor(threads, initializer=prepare_thread) as pool:
            list(pool.map(run, batches))
    if not np.isfinite(logits).all():
        raise UserError("the model's answers are not numbers, expected a model whose training did not diverge")
    return logits


def predict_features(checkpoint, tokens, batch_size, progress=None):
    """Run the classifier over TokenizedTexts and keep what its last layer, `classifier`, is given.

    Returns (features float32 [num_texts, hidden_size], logits float32 [num_texts, num_classes]) in input order; logits are
    features @ classifier.weight + classifier.bias. batch_size, progress: as of `predict_logits`.
    """
    classifier = checkpoint.model.classifier
    features = np.empty((len(tokens), classifier.weight.shape[0]), dtype=np.float32)
    own = threading.local()  # each thread's last batch: they share the model

    def keep(layer, inputs):
        own.batch = inputs[0]

    def store(indices):
        features[indices] = own.batch.numpy()

    hook = classifier.register_forward_pre_hook(keep)
    try:
        logits = predict_logits(checkpoint, tokens, batch_size, progress, after_batch=store)
    finally:
        hook.remove()
    return features, logits
