"""INT8 and FP16 forms of an exported ONNX model; the only part of the predictor that needs the package onnx.

Models are returned as bytes, ready to be written or run.
"""

import collections
import contextlib
import logging
import os
import tempfile

import numpy as np

from textcls.common.errors import UserError

try:
    import onnx
    from onnx import helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic
except ImportError as error:
    raise UserError(f"converting a model needs the package {error.name}, expected `pip install -r "
                    "deploy/predictor/requirements.txt`") from None


def load(path):
    """Read an ONNX file; UserError where it is none."""
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's DecodeError, whose module differs between its versions
        raise UserError(f"{path}: cannot be read ({error}), expected a sound ONNX model") from None


def to_int8(path):
    """Quantize the weights of an ONNX file to 8-bit integers; activations are quantized as they come (dynamically).

    Matrices: one scale per output column, and 7 of the 8 bits. With all 8, CPUs without VNNI overflow in the sum of two
    products, and the same file would give other labels there; the eighth bit gains nothing that could be measured.
    Word embeddings: see quantize_word_table. The pooler and the classifier, which cost next to nothing, stay in floats.
    Returns (bytes, counts of "MatMulInteger" and of "all" products with weights). UserError.
    """
    model = load(path)
    if not model.opset_import:
        raise UserError(f"{path}: holds no model, expected a sound ONNX model")
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    for index, node in enumerate(products):
        node.name = f"product_{index}"  # the quantizer goes by names
    quantize_word_table(model.graph)
    with tempfile.TemporaryDirectory() as folder, quiet_quantizer():
        output = os.path.join(folder, "int8.onnx")
        quantize_dynamic(model, output, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True,
                         op_types_to_quantize=["MatMul"], nodes_to_exclude=[node.name for node in products[-2:]],
                         extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
        content = read_bytes(output)
    counts = collections.Counter(node.op_type for node in onnx.load_model_from_string(content).graph.node)
    if not products or counts["MatMulInteger"] < len(products) - 2:
        raise UserError(f"{path}: {counts['MatMulInteger']} of {len(products)} matrix products could be quantized, expected "
                        f"{len(products) - 2}; is it a model that export_model.py --onnx or prune.py wrote?")
    return content, {"MatMulInteger": counts["MatMulInteger"], "all": len(products)}


def quantize_word_table(graph):
    """Store the word embeddings as int8 with one scale per row, in place.

    ONNX Runtime's quantizer takes one scale for a whole table, which costs more agreement with fp32 than all matrices
    together. Gather(table) becomes Cast(Gather(int8 table)) * Gather(scales). Tables of positions and the like are small
    and stay in floats.
    """
    tables = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids"]:
        name, output = node.input[0], node.output[0]
        table = numpy_helper.to_array(tables[name])
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / 127
        new = {f"{name}_int8": np.round(table / scales).astype(np.int8), f"{name}_scales": scales}
        graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in new.items())
        steps = [helper.make_node("Gather", [key, "input_ids"], [f"gathered_{key}"], f"gathered_{key}") for key in new]
        steps.append(helper.make_node("Cast", steps[0].output, [f"{name}_float"], to=onnx.TensorProto.FLOAT))
        steps.append(helper.make_node("Mul", [f"{name}_float", steps[1].output[0]], [output]))
        place = list(graph.node).index(node)
        graph.node.remove(node)
        for step in reversed(steps):
            graph.node.insert(place, step)
        graph.initializer.remove(tables[name])


@contextlib.contextmanager
def quiet_quantizer():
    """The quantizer writes a line per node to the root logger, and advice to do what the export has done."""
    root = logging.getLogger()
    root.addFilter(_nothing)
    try:
        yield
    finally:
        root.removeFilter(_nothing)


def _nothing(record):
    return False


def to_fp16(path):
    """Convert the weights and the arithmetic of an ONNX file to 16-bit floats; inputs and output keep their types."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(load(path), keep_io_types=True).SerializeToString()


def with_metadata(model, entries):
    """Write entries (dict of str) into the metadata of a model (a path or bytes); returns its bytes."""
    model = onnx.load_model_from_string(model if isinstance(model, bytes) else read_bytes(model))
    helper.set_model_props(model, entries)
    return model.SerializeToString()


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()
