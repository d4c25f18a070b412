"""Opens a model in one of the schemes of textcls/runtime/quantize.py: converted once, kept beside it, compared with fp32."""

import contextlib
import glob
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

import numpy as np

from textcls.common.digests import sha256
from textcls.common.errors import UserError
from textcls.common.outputs import complete_file
from textcls.runtime.onnx_session import open_session
from textcls.runtime.quantize import SCHEMES, with_metadata

if TYPE_CHECKING:
    import onnxruntime

# of a list of str: what fp32 and the converted model answer, float32 [num_texts, output_size] each
AnswerBoth = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
logger = logging.getLogger("predictor")


class Comparison(NamedTuple):
    """How a converted model is compared with fp32, and when it is refused."""

    texts_id: Optional[str]  # stands for the texts, so that nothing is compared twice on the same ones; None: there are none
    compare: Callable[[AnswerBoth], dict[str, str]]  # what it returns is kept in the model
    check: Callable[[dict[str, str]], None]  # UserError where that costs too much; it is empty where nothing was ever compared


def short_hash(path: str) -> str:
    """Return the first 12 hexadecimal digits of a file's SHA-256. UserError."""
    return sha256(path)[:12]


def converted_path(onnx_path: str, dtype: str) -> str:
    """Return the path of a converted model: beside the exported one; its name changes with that one and with the scheme."""
    return f"{_stem(onnx_path, dtype)}v{SCHEMES[dtype].version}-{short_hash(onnx_path)}.onnx"


def _stem(onnx_path: str, dtype: str) -> str:
    return f"{onnx_path[:-len('.onnx')]}.{dtype}-"


def open_model(onnx_path: str, dtype: str, device: str, device_id: int, comparison: Comparison,
               answer_both: Callable[["onnxruntime.InferenceSession", list[str]], tuple[np.ndarray, np.ndarray]]
               ) -> tuple["onnxruntime.InferenceSession", Union[str, bytes]]:
    """Open an exported model in the scheme dtype, a name of SCHEMES.

    comparison: for a scheme that is compared. answer_both: function of a session and texts, see AnswerBoth. Returns the
    session and what it runs: a path, or bytes where the converted model could not be kept. UserError.
    """
    scheme = SCHEMES[dtype]
    if scheme.convert is None:
        return open_session(onnx_path, onnx_path, device, device_id), onnx_path
    path = converted_path(onnx_path, dtype)
    session, model = open_kept(path, device, device_id), None
    if session is None:
        if device == "gpu":
            open_session(onnx_path, onnx_path, device, device_id)  # refused before the work
        model = scheme.convert(onnx_path)
        session = open_session(model, path, device, device_id)
    figures = session.get_modelmeta().custom_metadata_map  # of an earlier comparison
    if scheme.is_compared and comparison.texts_id and figures.get("calibration") != comparison.texts_id:
        figures = {"calibration": comparison.texts_id, **comparison.compare(lambda texts: answer_both(session, texts))}
        try:
            model = with_metadata(model or path, figures)
        except UserError as error:  # the package onnx is missing: the model was converted elsewhere
            logger.warning(f"The comparison is not kept: {error}")
    if model is not None:
        keep_model(onnx_path, dtype, path, model)
    if scheme.is_compared:
        comparison.check(figures)
    return session, path if model is None or os.path.isfile(path) else model


def open_kept(path: str, device: str, device_id: int) -> Optional["onnxruntime.InferenceSession"]:
    """Open a converted model that was kept; None where there is none, or one that cannot be read. UserError."""
    if not os.path.isfile(path):
        return None
    try:
        return open_session(path, path, device, device_id)
    except UserError as error:
        if device == "gpu":  # which may be what is wrong
            raise
        logger.warning(f"{error}: converting again.")
        return None


def keep_model(onnx_path: str, dtype: str, path: str, model: bytes) -> None:
    """Write a converted model, if its folder can be written, and remove those of older models and schemes."""
    try:
        with complete_file(path, "wb") as file:
            file.write(model)
    except (UserError, OSError) as error:
        logger.warning(f"warning: the converted model is not kept, every start will convert again: {error}")
        return
    for other in glob.glob(f"{glob.escape(_stem(onnx_path, dtype))}*.onnx"):
        if other != path:
            with contextlib.suppress(OSError):
                os.remove(other)
