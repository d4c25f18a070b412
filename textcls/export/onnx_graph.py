"""The ONNX graph of a model of families.FAMILIES, written from its layers: a classifier, a prompt model or a sentence encoder.

Nothing is traced or converted, so that it works with every version of Paddle, the weights keep their names, and the last
layer only computes the tokens that are used. export_onnx compares what it answers with the model itself.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from textcls.common.errors import UserError
from textcls.models.families import family_of
from textcls.models.huggingface import TANH_GELUS
from textcls.models.paddle_setup import paddle

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedModel

Constant = Union[int, float, Sequence[int], np.ndarray]
OPSET = 13  # as the Triton images of Paddle's time can run it (ONNX Runtime 1.9 and later)
MASKED = -1e4  # added to the attention of padding, as PaddleNLP does


class Graph:
    """Nodes and weights of an ONNX graph as they are added; values are known by name (str)."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def add(self, kind: str, *inputs: Union[str, Constant], **attributes: Any) -> str:
        """Add a node with one output; an input that is no name becomes a constant. Returns the output's name.

        attributes: those of the operator `kind`.
        """
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], output, **attributes))
        return output

    def constant(self, value: Constant) -> str:
        """Add a constant of Python numbers: int64 or float32. Equal ones are kept once."""
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        name = f"constant_{array.dtype.name}_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.ravel().tolist()))}"
        return self.weight(name, array)

    def weight(self, name: str, values: Union[np.ndarray, paddle.Tensor]) -> str:
        """Add a weight: a numpy array, or a Paddle parameter."""
        self.weights.setdefault(name, values if isinstance(values, np.ndarray) else values.numpy())
        return name


def make_onnx(model: "PretrainedModel", outputs: Sequence[str]) -> ModelProto:
    """Write the ONNX graph of a model of FAMILIES in eval mode. outputs: name of the answers, float32 [batch, size], and of a
    classifier without a prompt perhaps that of what its last layer is given, float32 [batch, hidden_size].

    The inputs are those of the family, int64 [batch, length] each. UserError where the model has a part that is not known here.
    """
    graph, config = Graph(), model.config
    is_token = graph.add("Cast", graph.add("Not", graph.add("Equal", "input_ids", config.pad_token_id)), to=TensorProto.FLOAT)
    prompt, pooling = getattr(model, "prompt", None), getattr(model, "pooling", "pooler")
    if prompt is not None:
        result = prompt_logits(graph, model, is_token)
    elif pooling == "mean":
        weights = graph.add("Unsqueeze", is_token, [2])
        total = graph.add("ReduceSum", graph.add("Mul", encode(graph, model, is_token), weights), [1], keepdims=0)
        result = graph.add("Div", total, graph.add("ReduceSum", weights, [1], keepdims=0))
    else:
        first = encode(graph, model, is_token, lambda hidden: graph.add("Slice", hidden, [0], [1], [1]))
        result = graph.add("Squeeze", first, [1])
        if pooling == "pooler":
            result = linear(graph, result, model.base_model.pooler.dense, "pooler")
            result = graph.add("Tanh", result) if getattr(config, "pool_act", "tanh") == "tanh" else result
    if getattr(model, "embedding_size", None) is not None:
        result = result if model.projection is None else linear(graph, result, model.projection, "projection")
        result = unit_length(graph, graph.add("Tanh", result) if model.activation == "tanh" else result)
    elif prompt is None:
        for name in outputs[1:]:
            graph.nodes[-1].output[0] = result = name
        result = linear(graph, result, model.classifier, "classifier")
    graph.nodes[-1].output[0] = outputs[0]
    names = family_of(model).input_names
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in names]
    answers = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
               for name, size in zip(outputs, ("size", "hidden_size"))]
    tensors = [numpy_helper.from_array(array, name) for name, array in graph.weights.items()]
    content = helper.make_graph(graph.nodes, type(model).__name__, inputs, answers, tensors)
    return helper.make_model(content, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=7)


# ---------------------------------------------------------------- parts of models (hidden: float32 [batch, length, hidden_size])


def linear(graph: Graph, hidden: str, layer: paddle.nn.Linear, name: str) -> str:
    product = graph.add("MatMul", hidden, graph.weight(f"{name}.weight", layer.weight))
    return graph.add("Add", product, graph.weight(f"{name}.bias", layer.bias))


def layer_norm(graph: Graph, hidden: str, layer: paddle.nn.LayerNorm, name: str) -> str:
    """Add a layer norm in the form that ONNX Runtime recognizes and runs as one operator; opset 13 has none of that name."""
    centred = graph.add("Sub", hidden, graph.add("ReduceMean", hidden, axes=[-1]))
    variance = graph.add("ReduceMean", graph.add("Pow", centred, 2.0), axes=[-1])
    deviation = graph.add("Sqrt", graph.add("Add", variance, float(layer._epsilon)))
    scaled = graph.add("Mul", graph.add("Div", centred, deviation), graph.weight(f"{name}.weight", layer.weight))
    return graph.add("Add", scaled, graph.weight(f"{name}.bias", layer.bias))


def activation(graph: Graph, hidden: str, name: str) -> str:
    """Add the activation that config.hidden_act names. GELUs are in the forms that ONNX Runtime recognizes."""
    if name == "relu":
        return graph.add("Relu", hidden)
    if name == "gelu":
        gate = graph.add("Erf", graph.add("Div", hidden, float(np.sqrt(2))))
        return graph.add("Mul", graph.add("Mul", hidden, graph.add("Add", gate, 1.0)), 0.5)
    if name in TANH_GELUS:
        cube = graph.add("Mul", graph.add("Pow", hidden, 3.0), 0.044715)
        gate = graph.add("Tanh", graph.add("Mul", graph.add("Add", hidden, cube), float(np.sqrt(2 / np.pi))))
        return graph.add("Mul", graph.add("Mul", hidden, 0.5), graph.add("Add", gate, 1.0))
    raise UserError(f"no ONNX graph can be written of a model with the activation {name}, expected one of gelu, relu, "
                    f"{', '.join(TANH_GELUS)}")


def unit_length(graph: Graph, vectors: str) -> str:
    squares = graph.add("ReduceSum", graph.add("Mul", vectors, vectors), [-1])
    return graph.add("Div", vectors, graph.add("Sqrt", graph.add("Add", squares, 1e-12)))


def embed(graph: Graph, model: "PretrainedModel") -> str:
    """Add the embeddings of all tokens."""
    embeddings, family, prompt = model.base_model.embeddings, family_of(model), getattr(model, "prompt", None)
    hidden = graph.add("Gather", word_table(graph, embeddings.word_embeddings), "input_ids")
    length = graph.add("Slice", graph.add("Shape", "input_ids"), [1], [2])
    end = graph.add("Add", length, [family.first_position])
    positions = graph.weight("position_embeddings.weight", embeddings.position_embeddings.weight)
    hidden = graph.add("Add", hidden, graph.add("Slice", positions, [family.first_position], end, [0]))
    if "token_type_ids" in family.input_names and getattr(embeddings, "type_vocab_size", 1) > 0:
        types = "token_type_ids"
        if prompt is not None and prompt.types is not None:
            types = graph.add("Add", types, prompt_types(graph, model, length))
        table = graph.weight("token_type_embeddings.weight", embeddings.token_type_embeddings.weight)
        hidden = graph.add("Add", hidden, graph.add("Gather", table, types))
    if getattr(embeddings, "use_task_id", False):
        row = embeddings.task_type_embeddings.weight.numpy()[embeddings.task_id]
        hidden = graph.add("Add", hidden, graph.weight("task_type_embedding", row))
    return layer_norm(graph, hidden, embeddings.layer_norm, "embeddings.layer_norm")


def word_table(graph: Graph, layer: paddle.nn.Layer) -> str:
    """Add the table of the word embeddings; those of a prompt's soft tokens, ready to use, follow the vocabulary's."""
    soft = getattr(layer, "soft", None)
    table = (layer if soft is None else layer.table).weight.numpy()
    padding = getattr(layer if soft is None else layer.table, "_padding_idx", None)
    if padding is not None and padding >= 0:
        table[padding] = 0  # as Paddle answers it
    if soft is not None:
        with paddle.no_grad():
            table = np.concatenate([table, layer.encoder(soft.unsqueeze(0)).squeeze(0).numpy()])
    return graph.weight("word_embeddings.weight", table)


def encode(graph: Graph, model: "PretrainedModel", is_token: str,
           select: Callable[[str], str] = lambda hidden: hidden) -> str:
    """Add all layers; returns the last one's states of the tokens that `select` takes from the layer before."""
    mask = graph.add("Unsqueeze", graph.add("Mul", graph.add("Sub", 1.0, is_token), MASKED), [1, 2])  # (batch, 1, 1, length)
    hidden, layers = embed(graph, model), list(model.base_model.encoder.layers)
    caches: list[Optional[list[np.ndarray]]] = [None] * len(layers)
    if getattr(model, "prefix", None) is not None:
        mask = graph.add("Pad", mask, [0, 0, 0, model.prompt.prefix_length, 0, 0, 0, 0])
        with paddle.no_grad():
            caches = [[part.numpy() for part in cache] for cache in model.prefix(1)]
    for number, layer in enumerate(layers):
        name, used = f"layers.{number}", select(hidden) if number == len(layers) - 1 else hidden
        attended = attention(graph, hidden, used, layer.self_attn, mask, caches[number], name)
        used = layer_norm(graph, graph.add("Add", used, attended), layer.norm1, f"{name}.norm1")
        inner = activation(graph, linear(graph, used, layer.linear1, f"{name}.linear1"), model.config.hidden_act)
        inner = linear(graph, inner, layer.linear2, f"{name}.linear2")
        hidden = layer_norm(graph, graph.add("Add", used, inner), layer.norm2, f"{name}.norm2")
    return hidden


def attention(graph: Graph, hidden: str, used: str, layer: paddle.nn.MultiHeadAttention, mask: str,
              cache: Optional[Sequence[np.ndarray]], name: str) -> str:
    """Add what the tokens `used` take from all tokens. cache: (keys, values), float32 [1, heads, tokens, size], or None."""
    heads, size = layer.num_heads, layer.head_dim

    def split(values: str, part: str, order: list[int]) -> str:
        values = linear(graph, values, getattr(layer, f"{part}_proj"), f"{name}.{part}_proj")
        return graph.add("Transpose", graph.add("Reshape", values, [0, 0, heads, size]), perm=order)

    queries = graph.add("Mul", split(used, "q", [0, 2, 1, 3]), size ** -0.5)
    keys, values = split(hidden, "k", [0, 2, 3, 1]), split(hidden, "v", [0, 2, 1, 3])
    if cache is not None:
        count = graph.add("Slice", graph.add("Shape", "input_ids"), [0], [1])
        shape = graph.add("Concat", count, [1, 1, 1], axis=0)
        first = [graph.weight(f"{name}.prefix_{part}", array) for part, array in
                 (("keys", np.ascontiguousarray(cache[0].transpose(0, 1, 3, 2))), ("values", cache[1]))]
        first = [graph.add("Expand", part, shape) for part in first]
        keys, values = graph.add("Concat", first[0], keys, axis=3), graph.add("Concat", first[1], values, axis=2)
    weights = graph.add("Softmax", graph.add("Add", graph.add("MatMul", queries, keys), mask), axis=-1)
    context = graph.add("Transpose", graph.add("MatMul", weights, values), perm=[0, 2, 1, 3])
    return linear(graph, graph.add("Reshape", context, [0, 0, heads * size]), layer.out_proj, f"{name}.out_proj")


# ---------------------------------------------------------------- prompt models, as in prompt_model.py


def prompt_logits(graph: Graph, model: "PretrainedModel", is_token: str) -> str:
    """Add the logits of a PromptClassifier; the last layer computes the masks only."""
    is_mask = graph.add("Cast", graph.add("Equal", "input_ids", model.prompt.mask_id), to=TensorProto.INT64)
    is_mask = graph.add("Unsqueeze", is_mask, [1])  # (batch, 1, length)
    if model.prompt.num_masks > 1:
        numbers = np.arange(1, model.prompt.num_masks + 1).reshape(1, -1, 1)
        is_number = graph.add("Equal", graph.add("CumSum", is_mask, 2), numbers)  # (batch, masks, length)
        is_mask = graph.add("Mul", is_mask, graph.add("Cast", is_number, to=TensorProto.INT64))
    chosen = graph.add("Cast", is_mask, to=TensorProto.FLOAT)
    states = encode(graph, model, is_token, lambda hidden: graph.add("MatMul", chosen, hidden))  # (batch, masks, hidden_size)
    head = model.cls.predictions
    states = activation(graph, linear(graph, states, head.transform, "transform"), model.config.hidden_act)
    states = layer_norm(graph, states, head.layer_norm, "transform.layer_norm")
    return linear(graph, graph.add("Reshape", states, [0, -1]), model.classifier, "classifier")


def prompt_types(graph: Graph, model: "PretrainedModel", length: str) -> str:
    """Add the token types of a prompt's own: int64 [batch, length]. length: int64 [1], of input_ids."""
    before, text, after = model.prompt.types
    is_padding = graph.add("Equal", "input_ids", model.config.pad_token_id)
    positions = graph.add("Unsqueeze", graph.add("Range", 0, graph.add("Squeeze", length, [0]), 1), [0])  # (1, length)
    tokens = graph.add("Cast", graph.add("Not", is_padding), to=TensorProto.INT64)
    to_end = graph.add("Sub", graph.add("ReduceSum", tokens, [1]), positions)  # 1 at the last token
    types = graph.add("Add", graph.add("Mul", tokens, 0), text)
    for index, kind in enumerate(before):
        types = graph.add("Where", graph.add("Equal", positions, index), kind, types)
    for index, kind in enumerate(after):
        types = graph.add("Where", graph.add("Equal", to_end, len(after) - index), kind, types)
    return graph.add("Where", is_padding, 0, types)
