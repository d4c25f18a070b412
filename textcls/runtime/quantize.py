"""The schemes in which an exported ONNX model can run: fp32 as it was exported, INT8 on a CPU, FP16 on a GPU.

Converting needs the package onnx, which nothing else of the predictor does. To add a scheme, write a function from the path of
an ONNX model to the bytes of the converted one, and give it an entry in SCHEMES: all that run an exported model then have its
option. Where converted models are kept, and how they are compared with fp32: textcls/runtime/converted.py.
"""

import argparse
import collections
import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

import numpy as np

from textcls.common.errors import UserError

if TYPE_CHECKING:
    import onnx

LARGEST_SIZE = 0.4  # share of the fp32 file, above which an INT8 file is remarked on
logger = logging.getLogger("predictor")


# ---------------------------------------------------------------- INT8


def to_int8(path: str) -> bytes:
    """Quantize the weights of an ONNX file to 8-bit integers; activations are quantized as they come (dynamically).

    Matrices: one scale per output column, and 7 of the 8 bits. With all 8, CPUs without VNNI overflow in the sum of two
    products, and the same file would give other labels there; the eighth bit gains nothing that could be measured.
    Word embeddings: see quantize_word_table. The pooler and the classifier, which cost next to nothing, stay in floats.
    Returns the quantized model. UserError where its matrices cannot be quantized.
    """
    model = load(path)
    from onnx import TensorProto, load_model_from_string
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger.info("Quantizing the model to INT8 ...")
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
                         extra_options={"DefaultTensorType": TensorProto.FLOAT})
        with open(output, "rb") as file:
            content = file.read()
    counts = collections.Counter(node.op_type for node in load_model_from_string(content).graph.node)
    if not products or counts["MatMulInteger"] < len(products) - 2:
        raise UserError(f"{path}: {counts['MatMulInteger']} of {len(products)} matrix products could be quantized, expected "
                        f"{len(products) - 2}; is it a model that export_model.py --onnx or prune.py wrote?")
    share = len(content) / os.path.getsize(path)
    logger.info(f"INT8: {counts['MatMulInteger']} of {len(products)} matrix products in integers, {share:.2f} of the size of "
                "fp32")
    if share > LARGEST_SIZE:
        logger.warning(f"INT8 has more than {LARGEST_SIZE} of the size of fp32: most of this model is not matrices.")
    return content


def quantize_word_table(graph: "onnx.GraphProto") -> None:
    """Store the word embeddings as int8 with one scale per row, in place.

    ONNX Runtime's quantizer takes one scale for a whole table, which costs more agreement with fp32 than all matrices
    together. Gather(table) becomes Cast(Gather(int8 table)) * Gather(scales). Tables of positions and the like are small
    and stay in floats.
    """
    from onnx import TensorProto, helper, numpy_helper

    tables = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids"]:
        name, output = node.input[0], node.output[0]
        table = numpy_helper.to_array(tables[name])
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / 127
        new: dict[str, np.ndarray] = {f"{name}_int8": np.round(table / scales).astype(np.int8), f"{name}_scales": scales}
        graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in new.items())
        steps = [helper.make_node("Gather", [key, "input_ids"], [f"gathered_{key}"], f"gathered_{key}") for key in new]
        steps.append(helper.make_node("Cast", steps[0].output, [f"{name}_float"], to=TensorProto.FLOAT))
        steps.append(helper.make_node("Mul", [f"{name}_float", steps[1].output[0]], [output]))
        place = list(graph.node).index(node)
        graph.node.remove(node)
        for step in reversed(steps):
            graph.node.insert(place, step)
        graph.initializer.remove(tables[name])


@contextlib.contextmanager
def quiet_quantizer() -> Iterator[None]:
    """Drop the quantizer's line per node in the root logger, and its advice to do what the export has done."""
    root = logging.getLogger()
    root.addFilter(_nothing)
    try:
        yield
    finally:
        root.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


# ---------------------------------------------------------------- FP16


def to_fp16(path: str) -> bytes:
    """Convert the weights and the arithmetic of an ONNX file to 16-bit floats; inputs and output keep their types. UserError."""
    model = load(path)
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=True).SerializeToString()


# ---------------------------------------------------------------- the schemes


class Scheme(NamedTuple):
    """How the numbers of a model are kept while it runs."""

    option: str = ""  # that chooses it on the command line
    help: str = ""  # of that option
    device: Optional[str] = None  # the only one that it is for; None: any
    reason: str = ""  # why no other
    convert: Optional[Callable[[str], bytes]] = None  # from the path of an fp32 model; None: it runs as it is
    version: int = 0  # to be raised whenever `convert` makes something else of a model: what was kept is then made anew
    is_compared: bool = False  # with fp32, before it is used


SCHEMES = {
    "fp32": Scheme(),
    "int8": Scheme("--use_quantize", "INT8 weights (CPU)", "cpu",
                   "INT8 is for the CPU, expected --device cpu, or --use_fp16 on a GPU", to_int8, 1, is_compared=True),
    "fp16": Scheme("--use_fp16", "16-bit floats (GPU)", "gpu",
                   "a CPU is not faster with it, expected --device gpu, or --use_quantize on a CPU", to_fp16, 1),
}


def add_scheme_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the schemes, of which one may be given: `dtype` of the parsed arguments is the name in SCHEMES."""
    group = parser.add_mutually_exclusive_group()
    for dtype, scheme in SCHEMES.items():
        if scheme.option:
            group.add_argument(scheme.option, dest="dtype", action="store_const", const=dtype, default="fp32", help=scheme.help)


def add_device_options(parser: argparse.ArgumentParser, with_calibration_file: bool = True) -> None:
    """Add the options of the scripts that run an exported ONNX model on a chosen device, or prepare it to be run."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--device_id", type=int, default=0, help="number of the GPU")
    add_scheme_options(parser)
    if with_calibration_file:
        parser.add_argument("--calibration_file", help=f"labelled texts on which {compared_options()} is compared with fp32")
    parser.add_argument("--allow_accuracy_drop", action="store_true",
                        help=f"take {compared_options()} even where it costs more than 0.5 points of accuracy on labelled texts")


def compared_options() -> str:
    """The options of the schemes that are compared with fp32, for messages."""
    return " or ".join(scheme.option for scheme in SCHEMES.values() if scheme.is_compared)


def check_calibration(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the parser's error where options of a comparison are given, and a scheme that is not compared."""
    if (args.calibration_file or args.allow_accuracy_drop) and not SCHEMES[args.dtype].is_compared:
        parser.error(f"--calibration_file, --allow_accuracy_drop: {args.dtype} is not compared with fp32, expected "
                     f"{compared_options()} with them")


def refuse_calibration(args: argparse.Namespace) -> None:
    """Raise UserError where the options of an accuracy are given and args.export_dir is a sentence encoder."""
    if args.calibration_file or args.allow_accuracy_drop:
        raise UserError(f"--calibration_file, --allow_accuracy_drop: {args.export_dir} is a sentence encoder, which has no "
                        f"accuracy, expected {SCHEMES[args.dtype].option} alone")


def check_device(device: str, dtype: str) -> None:
    """Raise UserError where a device or a scheme is unknown, or where the scheme is not for the device."""
    if device not in ("cpu", "gpu"):
        raise UserError(f"--device {device}: unknown device, expected cpu or gpu")
    if dtype not in SCHEMES:
        raise UserError(f"dtype {dtype!r}: unknown, expected one of {', '.join(SCHEMES)}")
    if SCHEMES[dtype].device not in (None, device):
        raise UserError(f"{SCHEMES[dtype].option}: {SCHEMES[dtype].reason}")


# ---------------------------------------------------------------- ONNX files


def load(model: Union[str, bytes]) -> "onnx.ModelProto":
    """Read an ONNX model, a path or bytes. UserError where it is none, or the package onnx is missing."""
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"converting a model needs the package {error.name}, expected `pip install -r "
                        "deploy/predictor/requirements.txt`") from None
    if isinstance(model, bytes):
        return onnx.load_model_from_string(model)
    try:
        return onnx.load(model)
    except Exception as error:  # protobuf's DecodeError, whose module differs between its versions
        raise UserError(f"{model}: cannot be read ({error}), expected a sound ONNX model") from None


def with_metadata(model: Union[str, bytes], entries: dict[str, str]) -> bytes:
    """Write entries into the metadata of a model, a path or bytes; returns the bytes of the result. UserError."""
    content = load(model)
    from onnx import helper

    helper.set_model_props(content, entries)
    return content.SerializeToString()
