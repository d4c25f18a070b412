"""ONNX models that ONNX Runtime runs fast, compared with the model they were made of; for export_model.py and prune.py."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from textcls.common.errors import UserError
from textcls.data.tokens import model_inputs
from textcls.export.onnx_graph import OPSET, make_onnx
from textcls.models.families import FAMILIES

if TYPE_CHECKING:
    import onnx

    from paddlenlp.transformers import PretrainedModel

TOLERANCE = 1e-4  # largest difference of logits, or of unit vectors, that is only rounding


def export_onnx(model: "PretrainedModel", prefix: str, batches: Sequence[np.ndarray], expected: Mapping[str, Sequence[np.ndarray]]
                ) -> float:
    """Write prefix.onnx, run it by ONNX Runtime on the CPU and compare.

    model: in eval mode, exported as prefix.pdmodel and prefix.pdiparams; batches: list of int64 [batch, length], padded;
    expected: by the names of the outputs, as of `make_onnx`, what the model answers: float32 [batch, size] each. Returns the
    largest difference. Raises UserError where the model cannot be converted or differs by more than TOLERANCE; prefix.onnx must
    then not be used.
    """
    import onnx
    import onnxruntime

    if model.config.model_type in FAMILIES:
        content = make_onnx(model, list(expected))
    else:
        content = convert(prefix, next(iter(expected)), model.config.model_type)
    path = prefix + ".onnx"
    onnx.checker.check_model(content)
    onnx.save(content, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    difference = 0.0
    for batch, *wanted in zip(batches, *expected.values()):
        for found, answers in zip(session.run(list(expected), model_inputs(batch, names)), wanted):
            difference = max(difference, float(np.abs(found - answers).max()))
    if not difference <= TOLERANCE:
        raise UserError(f"the ONNX model differs from the graph by {difference:.2e}, expected at most {TOLERANCE:.0e}; "
                        "nothing was exported")
    return difference


# ---------------------------------------------------------------- models that are of no family of families.py


def convert(prefix: str, output: str, model_type: str) -> "onnx.ModelProto":
    """Let paddle2onnx make an ONNX model of prefix.pdmodel and prefix.pdiparams. UserError where it is not installed."""
    import onnx
    try:
        import paddle2onnx
    except ImportError:
        raise UserError(f"a model of type {model_type} needs paddle2onnx for ONNX, which only the packages of Paddle 2.6 have, "
                        f"expected one of {', '.join(FAMILIES)}, or Paddle 2.6") from None

    with quiet_stdout():
        content = paddle2onnx.export(prefix + ".pdmodel", prefix + ".pdiparams", None, opset_version=OPSET)
    if not content:
        raise UserError(f"{prefix}.pdmodel: paddle2onnx {paddle2onnx.__version__} cannot convert it, expected the graph of a "
                        "classifier that export_model.py wrote")
    model = onnx.load_model_from_string(content)
    hoist_constants(model.graph)
    fold_products(model.graph)
    rename_output(model.graph, output)
    return model


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Drop the progress that paddle2onnx writes to the process's standard output, which belongs to the results."""
    try:
        saved = os.dup(1)
    except OSError:  # closed: nothing to keep clean
        yield
        return
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def hoist_constants(graph: "onnx.GraphProto") -> None:
    """Turn the nodes `Constant`, as which paddle2onnx 1.2.11 writes all weights, into initializers.

    ONNX Runtime's quantizer only sees initializers. Can go when paddle2onnx writes them.
    """
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        graph.initializer.add().CopyFrom(node.attribute[0].t)
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)


def fold_products(graph: "onnx.GraphProto") -> None:
    """Multiply products of two initializers out, once and for all.

    paddle2onnx 1.2.11 zeroes the embedding's padding row by a product with a mask as large as the table: it would double
    the file (Nano: 122 MB instead of 72), lengthen every start, and hide the table from the quantizer.
    """
    from onnx import numpy_helper

    for node in [node for node in graph.node if node.op_type == "Mul"]:
        known = {tensor.name: tensor for tensor in graph.initializer}
        if all(name in known for name in node.input):
            first, second = (numpy_helper.to_array(known[name]) for name in node.input)
            graph.initializer.append(numpy_helper.from_array(first * second, node.output[0]))
            graph.node.remove(node)
            used = {name for other in graph.node for name in other.input}
            for name in set(node.input) - used:
                graph.initializer.remove(known[name])


def rename_output(graph: "onnx.GraphProto", name: str) -> None:
    """Give the graph's only output a name of its own; Paddle's is numbered differently in every model."""
    old = graph.output[0].name
    for node in graph.node:
        for index, output in enumerate(node.output):
            if output == old:
                node.output[index] = name
    graph.output[0].name = name
