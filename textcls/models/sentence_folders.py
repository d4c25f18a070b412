"""How the model in a folder of sentence-transformers, or of Hugging Face alone, makes one vector of a text. Needs no Paddle."""

import os
from typing import Any, NamedTuple, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.data.files import load_json, read_json
from textcls.data.tokens import SHORTEST_LENGTH
from textcls.models.configs import SentenceOptions
from textcls.models.huggingface import read_safetensors
from textcls.models.torch_weights import read_torch
from textcls.models.weights import HUGGING_FACE_WEIGHTS

MODULES = "modules.json"
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")  # the modules that are known, in the order that they may have
# entries of older 1_Pooling/config.json, one for each mode -> the mode as newer ones name it in "pooling_mode"
OLD_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max",
             "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
             "pooling_mode_lasttoken": "lasttoken"}
ACTIVATIONS = {"torch.nn.modules.activation.Tanh": "tanh", "torch.nn.modules.linear.Identity": ""}  # of a Dense module


class SentenceFolder(NamedTuple):
    """How a folder says that its model makes one vector of a text."""

    model: str  # the folder of the model and its tokenizer: the folder itself, or one in it
    has_modules: bool  # whether modules.json says so; without one the pooling is a guess
    normalizes: bool  # whether it gives unit vectors of itself
    options: SentenceOptions
    projection: dict[str, np.ndarray]  # weights of the Dense module by their names in a SentenceEncoder; {}: there is none
    max_seq_length: Optional[int]  # tokens, special tokens included; None: as many as the model has positions
    lowers: bool  # texts are lower-cased, whatever the tokenizer does by itself


def read_sentence_folder(folder: str) -> SentenceFolder:
    """Read modules.json and what it names. UserError for modules, or options of modules, that are not known."""
    path = os.path.join(folder, MODULES)
    if not os.path.isfile(path):
        return SentenceFolder(folder, False, False, SentenceOptions("mean", 0, []), {}, *_read_reading(folder))
    folders = _read_modules(folder, path)
    pooling = _read_pooling(os.path.join(folders["Pooling"], "config.json"), "Dense" in folders)
    size, activation, projection = _read_dense(folders["Dense"]) if "Dense" in folders else (0, "", {})
    options = SentenceOptions(pooling, size, [], activation)
    return SentenceFolder(folders["Transformer"], True, "Normalize" in folders, options, projection,
                          *_read_reading(folders["Transformer"]))


def read_prompts(folder: str) -> dict[str, str]:
    """The prefixes that a folder of sentence-transformers names, without empty ones: {name: prefix}. UserError."""
    path = os.path.join(folder, "config_sentence_transformers.json")
    prompts = read_json(path).get("prompts") if os.path.isfile(path) else None
    return {name: text for name, text in prompts.items() if text and isinstance(text, str)} if isinstance(prompts, dict) else {}


def _read_modules(folder: str, path: str) -> dict[str, str]:
    """Find the folder of each module that the modules.json at path lists: {kind: folder}. UserError."""
    entries, _ = load_json(path, "a list of modules")
    if not isinstance(entries, list):
        raise UserError(f"{path}: a JSON {type(entries).__name__}, expected a list of modules")
    folders: dict[str, str] = {}
    for entry in entries:
        kind = str(entry.get("type")).rpartition(".")[2] if isinstance(entry, dict) else ""
        place = os.path.normpath(str(entry.get("path") or ".")) if kind else ""
        if kind == "Dropout":  # only of the training
            continue
        if kind not in KINDS or kind in folders or [known for known in KINDS if known in (*folders, kind)] != [*folders, kind]:
            raise UserError(f"{path}: the module {kind or entry} is not known here, or not in this place, expected "
                            "Transformer, Pooling, then Dense and Normalize or not, in this order and once each")
        if os.path.isabs(place) or place.startswith(".."):
            raise UserError(f"{path}: the path of {kind} is {place!r}, expected a folder beside this file")
        folders[kind] = os.path.join(folder, place) if place != "." else folder
    if not {"Transformer", "Pooling"}.issubset(folders):
        raise UserError(f"{path}: lists {', '.join(folders) or 'no module'}, expected a Transformer and a Pooling at least")
    return folders


def _read_pooling(path: str, has_dense: bool) -> str:
    """Take the pooling, "mean" or "cls", from the config.json of a Pooling module. has_dense: a Dense follows. UserError."""
    config = read_json(path)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for name, mode in OLD_MODES.items() if config.get(name)] or "mean"
    modes = list(modes) if isinstance(modes, (list, tuple)) else [modes]
    if modes == ["mean_sqrt_len_tokens"] and not has_dense:
        modes = ["mean"]  # it is the mean times a number, and the vectors are made 1 long
    if modes not in (["mean"], ["cls"]):
        raise UserError(f"{path}: the pooling is {' with '.join(map(str, modes))}, which is not known here, expected mean or cls "
                        "alone")
    if config.get("include_prompt") is False:
        raise UserError(f"{path}: include_prompt is false, a pooling without the tokens of a prefix, which is not known here, "
                        "expected a pooling of all tokens")
    return modes[0]


def _read_dense(folder: str) -> tuple[int, str, dict[str, np.ndarray]]:
    """Read a Dense module: (length of its vectors, activation, weights as of SentenceFolder). UserError."""
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    sizes: list[Any] = [config.get(name) for name in ("in_features", "out_features")]
    if activation not in ACTIVATIONS or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise UserError(f"{path}: the Dense module has the activation {activation}, or is not of whole texts, which is not known "
                        f"here, expected one of {', '.join(ACTIVATIONS)}")
    if not all(type(size) is int and 0 < size <= 1 << 16 for size in sizes):
        raise UserError(f"{path}: in_features and out_features are {sizes}, expected two whole numbers")
    weights_path = os.path.join(folder, HUGGING_FACE_WEIGHTS)
    if os.path.isfile(weights_path):
        weights = read_safetensors(weights_path)
    else:
        weights_path = os.path.join(folder, "pytorch_model.bin")
        weights = read_torch(weights_path)
    matrix = weights.get("linear.weight")
    bias = weights.get("linear.bias", np.zeros(sizes[1], np.float32))  # a layer without one adds nothing
    if matrix is None or matrix.shape != (sizes[1], sizes[0]) or bias.shape != (sizes[1],):
        raise UserError(f"{weights_path}: holds no linear.weight and linear.bias from {sizes[0]} to {sizes[1]} numbers, expected "
                        f"those that {path} says")
    return sizes[1], ACTIVATIONS[activation], {"projection.weight": matrix.T, "projection.bias": bias}


def _read_reading(folder: str) -> tuple[Optional[int], bool]:
    """max_seq_length and lowers of a SentenceFolder. folder: of the Transformer module. UserError."""
    configs: dict[str, dict[str, Any]] = {}
    for name in ("sentence_bert_config.json", "tokenizer_config.json"):
        path = os.path.join(folder, name)
        configs[name] = read_json(path) if os.path.isfile(path) else {}
    ours, tokenizer = configs.values()
    task = ours.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise UserError(f"{folder}: sentence_bert_config.json says transformer_task {task}, expected an encoder of texts "
                        "(feature-extraction)")
    length = ours.get("max_seq_length") or tokenizer.get("model_max_length")
    if not isinstance(length, (int, float)) or length > 1 << 20:  # transformers writes 1e30 where it does not know
        return None, bool(ours.get("do_lower_case"))
    if type(length) is not int or length < SHORTEST_LENGTH:
        raise UserError(f"{folder}: the longest text has {length} tokens by sentence_bert_config.json or tokenizer_config.json, "
                        f"expected a whole number, {SHORTEST_LENGTH} or more")
    return length, bool(ours.get("do_lower_case"))
