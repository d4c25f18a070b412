"""The weights of a model folder: found, read and given to a model, each parameter or nothing."""

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.models.families import family_of
from textcls.models.huggingface import read_huggingface

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedModel

WEIGHTS, HUGGING_FACE_WEIGHTS = "model_state.pdparams", "model.safetensors"
MOST_NAMES = 8  # parameters named in a line of the log
HEADS = ("classifier.", "projection.")  # what a pretrained model lacks, or has in another size


def find_weights(folder: str) -> Optional[str]:
    """Find the folder's weights; None without any. UserError where they are in a form that is not read."""
    files = sorted(os.listdir(folder))
    for name in (WEIGHTS, HUGGING_FACE_WEIGHTS):
        if name in files:
            return os.path.join(folder, name)
    shards = [name for name in files if name.endswith((".safetensors.index.json", ".bin.index.json", ".pdparams.index.json"))]
    if shards:
        raise UserError(f"{folder}: its weights are in several files ({shards[0]}), expected one model.safetensors "
                        "(transformers: model.save_pretrained(folder, max_shard_size=\"100GB\"))")
    if "pytorch_model.bin" in files:
        raise UserError(f"{folder}: pytorch_model.bin is a pickle and is not read, expected model.safetensors "
                        "(transformers: model.save_pretrained(folder, safe_serialization=True))")
    return None


def read_weights(path: str, model: "PretrainedModel") -> dict[str, np.ndarray]:
    """Read the weights in a file, under the names of PaddleNLP's model. UserError."""
    from textcls.models.paddle_setup import paddle

    if path.endswith(WEIGHTS):
        state = paddle.load(path, return_numpy=True)
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise UserError(f"{path}: holds no weights with names, expected the state_dict of a model, as train.py saves it")
        return {name: value for name, value in state.items()
                if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number)}
    family = family_of(model)
    if family.huggingface_names is None:
        raise UserError(f"{path}: of a family whose weights are only read in PaddleNLP's form, expected {WEIGHTS}")
    return read_huggingface(path, family.huggingface_names, model)


def set_weights(model: "PretrainedModel", weights: dict[str, np.ndarray], path: str, strict: bool = False,
                ignore_mismatched_sizes: bool = False, complete: bool = False) -> None:
    """Give a model its weights, and say which of its parameters start at random and which weights are not used.

    The names may lack the model's prefix ("bert."), as a BertModel is saved. strict, ignore_mismatched_sizes,
    complete: as of `load_model`. UserError where the weights, or their shapes, are not the model's.
    """
    state, prefix = model.state_dict(), f"{model.base_model_prefix}."
    if not any(name.startswith(prefix) for name in weights):
        weights = {prefix + name if prefix + name in state else name: value for name, value in weights.items()}
    given = set()  # parameters, by identity: tied ones have several names
    for name, parameter in state.items():
        if name not in weights or id(parameter) in given:
            continue
        if not np.issubdtype(weights[name].dtype, np.floating):
            raise UserError(f"{path}: {name} holds {weights[name].dtype}, expected floating-point numbers")
        if list(weights[name].shape) == parameter.shape:
            parameter.set_value(np.ascontiguousarray(weights[name], np.float32))
            given.add(id(parameter))
        elif not (ignore_mismatched_sizes and name.startswith(HEADS)):
            raise UserError(f"{path}: the shape of {name} is {list(weights[name].shape)} and by the model's config.json "
                            f"{parameter.shape}, expected weights and config.json of one model")
    new = [name for name, parameter in state.items() if id(parameter) not in given]
    unused = [name for name in weights if name not in state]
    lacking = [name for name in new if name not in weights]
    uses_pooler = hasattr(model, "classifier") or getattr(model, "pooling", None) == "pooler"
    used = [name for name in new if uses_pooler or ".pooler." not in name]  # a masked LM does not use it
    needed = [name for name in lacking if strict or (complete and name in used)
              or not (name.startswith(HEADS) or ".pooler." in name)]
    _refuse(path, needed, unused if strict else (), model)
    layers = dict(model.named_sublayers())
    for layer in {name.rpartition(".")[0]: None for name in new}:
        model._init_weights(layers[layer])
    if used:
        get_logger().warning(f"{path} has nothing for {_list(used)}: they start from RANDOM weights.")
    if unused:
        get_logger().info(f"{path}: not used are {_list(unused)}.")


def fit_head(weights: dict[str, np.ndarray], model: "PretrainedModel", saved_labels: list[str], labels: list[str],
             folder: str) -> dict[str, np.ndarray]:
    """Make a classifier's last layer for other labels: those that it knows keep their rows, new ones start at random.

    weights: of the folder; saved_labels, labels: what its last layer has rows for, and what it shall have. Returns the entries of
    weights to replace; {} where the labels are the same, or none of them is known.
    """
    from textcls.models.paddle_setup import paddle

    names = ("classifier.weight", "classifier.bias")
    place_of = {label: place for place, label in enumerate(saved_labels)}
    known = [place for place, label in enumerate(labels) if label in place_of]
    if labels == saved_labels or not known or any(
            name not in weights or weights[name].shape[-1] != len(saved_labels) for name in names):
        return {}
    sources = [place_of[labels[place]] for place in known]
    drawn = paddle.randn([weights[names[0]].shape[0], len(labels)]).numpy() * model.config.initializer_range
    bias = np.zeros(len(labels), np.float32)
    drawn[:, known], bias[known] = weights[names[0]][:, sources], weights[names[1]][sources]
    new, gone = [label for label in labels if label not in place_of], [label for label in saved_labels if label not in labels]
    said = "".join(f"; {what}: {', '.join(own[:MOST_NAMES])}{' ...' if len(own) > MOST_NAMES else ''}"
                   for what, own in (("new", new), ("no longer there", gone)) if own)
    get_logger().info(f"{folder} knows {len(known)} of the {len(labels)} labels, and goes on with what it has learnt of "
                      f"them{said}")
    return dict(zip(names, (drawn, bias)))


def check_weights(model: "PretrainedModel", path: str) -> None:
    """Raise UserError if the weights file is not just the model's."""
    saved, own = read_weights(path, model), model.state_dict()
    _refuse(path, set(own).difference(saved), set(saved).difference(own), model)


def _refuse(path: str, lacking: Collection[str], unused: Collection[str], model: "PretrainedModel") -> None:
    kind = ("classifier made by train.py" if hasattr(model, "classifier") else "masked LM with its head (cls.*)"
            if hasattr(model, "cls") else "sentence encoder with all that its pooling needs")
    for names, what in ((lacking, "lacks"), (unused, "has besides the model's own")):
        if names:
            raise UserError(f"{path}: {what} {len(names)} parameters, {min(names)} among them, expected the weights of a "
                            f"{kind}, and the config.json that belongs to them")


def _list(names: Collection[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(sorted(names)[:MOST_NAMES]) + more


@contextlib.contextmanager
def without_drawing() -> Iterator[None]:
    """Build layers with zeros in the block: drawing random values, only to replace them, takes most of the time of loading."""
    from paddle.nn.initializer import Constant, Initializer
    from paddlenlp.transformers.model_utils import no_init_weights

    initialize, zeros = Initializer.__call__, Constant(0.0)
    Initializer.__call__ = lambda self, *args: initialize(self if isinstance(self, Constant) else zeros, *args)
    try:
        with no_init_weights():
            yield
    finally:
        Initializer.__call__ = initialize
