"""Weights in Hugging Face's form (model.safetensors of transformers) under the names and in the form of PaddleNLP's models.

PaddleNLP 2.8.1 has a conversion of its own, for BERT only; it leaves masked-LM heads and layer norms by their old names random
and writes the result beside the original.
"""

import json
import struct
from typing import TYPE_CHECKING, Optional

import numpy as np

from textcls.common.errors import UserError

if TYPE_CHECKING:
    from paddle import Tensor
    from paddlenlp.transformers import PretrainedModel

# Parts of a parameter's name in transformers' BERT and ERNIE -> in PaddleNLP's, replaced in this order.
BERT_NAMES = {
    "LayerNorm.gamma": "LayerNorm.weight",  # as TensorFlow called them, and transformers before version 3
    "LayerNorm.beta": "LayerNorm.bias",
    "embeddings.LayerNorm.": "embeddings.layer_norm.",
    "encoder.layer.": "encoder.layers.",
    ".attention.self.query.": ".self_attn.q_proj.",
    ".attention.self.key.": ".self_attn.k_proj.",
    ".attention.self.value.": ".self_attn.v_proj.",
    ".attention.output.dense.": ".self_attn.out_proj.",
    ".attention.output.LayerNorm.": ".norm1.",
    ".intermediate.dense.": ".linear1.",
    ".output.dense.": ".linear2.",
    ".output.LayerNorm.": ".norm2.",
    "cls.predictions.transform.dense.": "cls.predictions.transform.",
    "cls.predictions.transform.LayerNorm.": "cls.predictions.layer_norm.",
    "cls.predictions.bias": "cls.predictions.decoder.bias",
}
# transformers' names of the GELU that is computed with tanh; Paddle has it as gelu(approximate=True) only
TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def read_huggingface(path: str, names: dict[str, str], model: "PretrainedModel") -> dict[str, np.ndarray]:
    """Read a model.safetensors for a PaddleNLP model.

    names: {part of a name there: part of the name in PaddleNLP}. Matrices of linear layers are transposed: [out, in] there,
    [in, out] in Paddle. Returns {PaddleNLP's name: float32 array}. UserError for a damaged file.
    """
    from textcls.models.paddle_setup import paddle

    prefix = f"{model.base_model_prefix}."  # may be missing in the file
    matrices = {f"{name}.weight".removeprefix(prefix) for name, layer in model.named_sublayers()
                if isinstance(layer, paddle.nn.Linear)}
    weights = {}
    for name, value in read_safetensors(path).items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        weights[name] = value.T if name.removeprefix(prefix) in matrices else value
    return weights


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Read all floating-point tensors of a safetensors file: {name: float32 array}. UserError for a damaged file.

    The file: length of the header (8 bytes), header (JSON: type, shape and place of each tensor), the tensors' bytes. The
    package safetensors checks it; it cannot give bfloat16 to NumPy, which has no such type, so the bytes are read here.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}), expected the weights as transformers saves them") from None
    content = np.memmap(path, np.uint8, mode="r")
    start = 8 + struct.unpack("<Q", content[:8].tobytes())[0]
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        value = _to_float32(content[start + first:start + last], entry["dtype"])
        if value is not None:
            tensors[name] = value.reshape(entry["shape"])
    return tensors


def _to_float32(content: np.ndarray, dtype: str) -> Optional[np.ndarray]:
    """Turn the bytes of a tensor into float32 [size]; None for integers, such as the buffer of position ids."""
    if dtype == "BF16":  # the upper half of a float32
        return (content.view("<u2").astype(np.uint32) << 16).view(np.float32)
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    return content.view(kinds[dtype]).astype(np.float32) if dtype in kinds else None


def name_activations() -> None:
    """Let Paddle know transformers' names of the GELU computed with tanh, for models whose hidden_act is one of them."""
    from textcls.models.paddle_setup import paddle

    def gelu(x: "Tensor", name: Optional[str] = None) -> "Tensor":
        return paddle.nn.functional.gelu(x, approximate=True)

    for name in TANH_GELUS:
        setattr(paddle.nn.functional, name, gelu)
