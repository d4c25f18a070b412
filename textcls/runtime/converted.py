"""The INT8 and FP16 forms of an exported ONNX model: made once, kept beside it, INT8 compared with fp32.

What converts is textcls/runtime/onnx_conversion.py, which needs the package onnx; a form that is there is used without it.
"""

import logging
import os

from textcls.common.errors import UserError
from textcls.common.outputs import complete_file
from textcls.runtime.exported import sha256
from textcls.runtime.onnx_session import open_session

LARGEST_SIZE = 0.4  # share of the fp32 file, above which an INT8 file is remarked on
logger = logging.getLogger("predictor")


def short_hash(path):
    """The first 12 hexadecimal digits of a file's SHA-256."""
    return sha256(path)[:12]


def converted_path(onnx_path, kind):
    """Where the converted form of a model is kept: beside it, under a name that changes with its content."""
    return f"{onnx_path[:-len('.onnx')]}.{kind}-{short_hash(onnx_path)}.onnx"


def keep_model(path, model):
    """Write a converted model, if its folder can be written. model: bytes."""
    try:
        with complete_file(path, "wb") as file:
            file.write(model)
    except (UserError, OSError) as error:
        logger.warning(f"warning: the converted model is not kept, every start will convert again: {error}")


def open_fp16(onnx_path, device_id):
    """Open the FP16 form on a GPU. Returns (onnxruntime.InferenceSession, its path, or its bytes where it could not be kept).

    UserError.
    """
    path = converted_path(onnx_path, "fp16")
    model = path
    if not os.path.isfile(path):
        from textcls.runtime.onnx_conversion import to_fp16

        open_session(onnx_path, onnx_path, "gpu", device_id)  # refused before the work
        model = to_fp16(onnx_path)
        keep_model(path, model)
    return open_session(model, path, "gpu", device_id), path if os.path.isfile(path) else model


def open_int8(onnx_path, calibration, compare, check):
    """Open the INT8 form, converted where it is not there; compared with fp32 where that was not done on these texts yet.

    calibration: stands for the texts to compare on, or None. compare: function of the session that returns a dict of str, which
    is kept in the model. check: function of such a dict, empty where nothing was ever compared, that raises UserError where INT8
    costs too much. Returns (onnxruntime.InferenceSession, its path, or its bytes where it could not be kept). UserError.
    """
    path = converted_path(onnx_path, "int8")
    session, model = open_kept(path), None
    if session is None:
        model = convert_to_int8(onnx_path)
        session = open_session(model, path, "cpu")
    figures = session.get_modelmeta().custom_metadata_map  # of an earlier comparison
    if calibration and figures.get("calibration") != calibration:
        figures = {"calibration": calibration, **compare(session)}
        model = with_figures(model or path, figures)
    if model is not None:
        keep_model(path, model)
    check(figures)
    return session, path if os.path.isfile(path) else model


def open_kept(path):
    """The session of an INT8 model that was kept; None where there is none, or one that cannot be read."""
    if not os.path.isfile(path):
        return None
    try:
        return open_session(path, path, "cpu")
    except UserError as error:
        logger.warning(f"{error}: converting again.")
        return None


def convert_to_int8(onnx_path):
    """Quantize a model and say what came of it. Returns bytes."""
    from textcls.runtime.onnx_conversion import to_int8

    logger.info("Quantizing the model to INT8 ...")
    model, counts = to_int8(onnx_path)
    share = len(model) / os.path.getsize(onnx_path)
    logger.info(f"INT8: {counts['MatMulInteger']} of {counts['all']} matrix products in integers, {share:.2f} of the size of "
                "fp32")
    if share > LARGEST_SIZE:
        logger.warning(f"INT8 has more than {LARGEST_SIZE} of the size of fp32: most of this model is not matrices.")
    return model


def with_figures(model, figures):
    """The model (a path or bytes) as bytes, with figures in its metadata; None where the package onnx is missing."""
    try:
        from textcls.runtime.onnx_conversion import with_metadata
    except UserError as error:  # a model that was converted elsewhere
        logger.warning(f"The comparison is not kept: {error}")
        return None
    return with_metadata(model, figures)
