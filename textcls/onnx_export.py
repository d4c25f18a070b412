"""From an exported Paddle graph to an ONNX model that ONNX Runtime runs fast; for export_model.py and prune.py.

Needs paddle2onnx, onnx and onnxruntime, no running Paddle.
"""

import contextlib
import os

import numpy as np

from utils import model_inputs
from textcls.errors import UserError

OPSET = 13  # as the Triton images of Paddle's time can run it (ONNX Runtime 1.9 and later)
TOLERANCE = 1e-4  # largest difference of logits, or of unit vectors, that is only rounding


def export_onnx(prefix, batches, expected, output="logits"):
    """Convert prefix.pdmodel and prefix.pdiparams, write prefix.onnx, run it by ONNX Runtime on the CPU and compare.

    batches: list of int64 [batch, length], padded; expected: their logits or vectors, list of float32 [batch,
    size]. The inputs keep their names; output: the output's. Returns the largest difference. Raises UserError where the
    graph cannot be converted or differs by more than TOLERANCE; prefix.onnx must then not be used.
    """
    import onnx
    import onnxruntime

    model = convert(prefix)
    hoist_constants(model.graph)
    fold_products(model.graph)
    shorten_last_layer(model.graph)
    rename_output(model.graph, output)
    path = prefix + ".onnx"
    onnx.checker.check_model(model)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    difference = 0.0
    for batch, logits in zip(batches, expected):
        difference = max(difference, float(np.abs(session.run(None, model_inputs(batch, names))[0] - logits).max()))
    if not difference <= TOLERANCE:
        raise UserError(f"the ONNX model differs from the graph by {difference:.2e}, expected at most {TOLERANCE:.0e}; "
                        "nothing was exported")
    return difference


def convert(prefix):
    """Return the onnx.ModelProto that paddle2onnx makes of prefix.pdmodel and prefix.pdiparams."""
    import onnx
    import paddle2onnx

    with quiet_stdout():
        content = paddle2onnx.export(prefix + ".pdmodel", prefix + ".pdiparams", None, opset_version=OPSET)
    if not content:
        raise UserError(f"{prefix}.pdmodel: paddle2onnx {paddle2onnx.__version__} cannot convert it, expected the graph of a "
                        "classifier that export_model.py wrote")
    return onnx.load_model_from_string(content)


@contextlib.contextmanager
def quiet_stdout():
    """paddle2onnx writes its progress to the process's standard output, which belongs to the results."""
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


# ---------------------------------------------------------------- graph rewrites (graph: onnx.GraphProto, in place)


def hoist_constants(graph):
    """Turn the nodes `Constant`, as which paddle2onnx 1.2.11 writes all weights, into initializers.

    ONNX Runtime's quantizer only sees initializers. Can go when paddle2onnx writes them.
    """
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        graph.initializer.add().CopyFrom(node.attribute[0].t)
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)


def fold_products(graph):
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


def shorten_last_layer(graph):
    """Let the last encoder layer compute its output for the first token only; returns whether the graph allowed it.

    The classifier reads nothing but [CLS], but the exported last layer works out every token. Its keys and values need
    them all; its queries, output projection, feed-forward part and layer norms do not. The result stays the same: they
    treat each token on its own. Where the graph is not what is expected here, it is left as it is.
    """
    import onnx
    from onnx import helper, numpy_helper

    known = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    users = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def before(node, *kinds):
        """The node reached by going from node through the first inputs that are not initializers; None off the path."""
        for kind in kinds:
            node = next((producers[name] for name in node.input if name in producers), None) if node else None
            node = node if node is not None and node.op_type == kind else None
        return node

    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    scores = before(softmaxes[-1], "Add", "MatMul") if softmaxes else None
    query = before(scores, "Mul", "Transpose", "Reshape", "Add", "MatMul")
    if query is None:
        return False
    hidden = query.input[0]  # float32 [batch, length, hidden_size]: what the last layer reads
    if sorted(node.op_type for node in users[hidden]) != ["Add", "MatMul", "MatMul", "MatMul"]:
        return False  # expected: queries, keys, values and the residual connection
    below, order = {hidden}, list(graph.node)
    for node in order:  # everything that depends on `hidden`, in the graph's order
        if below.intersection(node.input):
            below.update(node.output)
    slices = [node for node in order if node.op_type == "Slice" and node.input[0] in below]
    if len(slices) != 1 or [numpy_helper.to_array(known[name]).tolist() if name in known else None
                            for name in slices[0].input[1:4]] != [[0], [1], [1]]:
        return False  # expected: after the layer only position 0 is read
    if any(node.op_type == "Shape" and node.input[0] in below for node in order):
        return False  # a length measured inside the layer would no longer be the text's
    first = [onnx.numpy_helper.from_array(np.array([value]), f"first_token_{name}")
             for name, value in (("start", 0), ("end", 1), ("axis", 1))]
    graph.initializer.extend(first)
    node = helper.make_node("Slice", [hidden, *(tensor.name for tensor in first)], ["first_token"], "first_token")
    graph.node.insert(order.index(producers[hidden]) + 1, node)
    for user in users[hidden]:
        if user is query or user.op_type == "Add":
            for index, name in enumerate(user.input):
                if name == hidden:
                    user.input[index] = "first_token"
    return True


def rename_output(graph, name):
    """Give the graph's only output a name of its own; Paddle's is numbered differently in every model."""
    old = graph.output[0].name
    for node in graph.node:
        for index, output in enumerate(node.output):
            if output == old:
                node.output[index] = name
    graph.output[0].name = name
