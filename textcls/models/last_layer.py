"""A last layer that computes only the positions that a model's head reads: [CLS] for classifiers, the masks for prompt models."""

import contextlib
import threading
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from paddle import Tensor
    from paddle.nn import Layer
    from paddlenlp.transformers import PretrainedModel


class Selection(threading.local):
    """The positions that the last layer of a model computes; each thread's own, since threads share the model.

    weights: float32 [batch, num_read, length], 1 at the position that is read and 0 elsewhere; None: [CLS] alone.
    """

    weights: "Optional[Tensor]" = None

    def __deepcopy__(self, memo: dict) -> "Selection":
        return Selection()


def compute_only_read(model: "PretrainedModel") -> Selection:
    """Let a model's last layer compute only the positions selected, so that its output is float32 [batch, num_read, hidden_size].

    Queries, feed-forward and norms are those of the positions, keys and values those of all tokens: the answer is the same.
    Returns the Selection, which begins as [CLS] alone.
    """
    layer = model.base_model.encoder.layers[-1]
    layer.selection = Selection()
    object.__setattr__(layer, "forward", types.MethodType(_encode, layer))  # past __setattr__, which PaddleNLP rewrites
    return layer.selection


def compute_all(model: "PretrainedModel") -> None:
    """Undo `compute_only_read`, for those who look at the states of all tokens."""
    vars(model.base_model.encoder.layers[-1]).pop("forward", None)


@contextlib.contextmanager
def only_cls(model: "PretrainedModel") -> Iterator[None]:
    """Let a model's last layer compute only [CLS] for a while, and then again what it has computed before."""
    layer = model.base_model.encoder.layers[-1]
    forward = vars(layer).get("forward", layer.forward)
    compute_only_read(model)
    try:
        yield
    finally:
        object.__setattr__(layer, "forward", forward)


def _encode(layer: "Layer", src: "Tensor", src_mask: "Optional[Tensor]" = None, cache: Any = None,
            output_attentions: bool = False) -> Any:
    """As the forward of PaddleNLP 2.8.1's encoder layers; src: float32 [batch, length, hidden_size]."""
    from textcls.models.paddle_setup import paddle

    weights = layer.selection.weights
    read = src[:, :1] if weights is None else paddle.matmul(weights, src)  # (batch, num_read, hidden_size)
    layer.self_attn.need_weights = output_attentions
    outputs = layer.self_attn(read, src, src, src_mask, cache)
    values, others = (outputs[0], outputs[1:]) if isinstance(outputs, tuple) else (outputs, ())
    values = layer.norm1(read + layer.dropout1(values))
    values = layer.norm2(values + layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(values))))))
    return (values, *reversed(others)) if others else values
