"""Opens an ONNX model with ONNX Runtime, as the predictor and the builder of the Triton repository run it."""

from typing import Union

import onnxruntime

from textcls.common.errors import UserError


def check_gpu_build(option: str = "--device") -> None:
    """Raise UserError where the installed onnxruntime knows no GPU. option: that has asked for one."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UserError(f"{option} gpu: this onnxruntime is a CPU build, expected {option} cpu, or onnxruntime-gpu in the place "
                        "of onnxruntime (deploy/predictor/README.md)")


def open_session(model: Union[str, bytes], name: str, device: str, device_id: int = 0) -> onnxruntime.InferenceSession:
    """Open an ONNX model. model: a path or the bytes of the model; name: what messages call it.

    Each run takes one thread: several batches at once are faster than one batch on several threads (deploy/predictor/README.md).
    UserError.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it keeps a plan for every shape of a batch: memory that grows, and no speed
    options.log_severity_level = 4  # errors come as exceptions
    providers: list = ["CPUExecutionProvider"]
    if device == "gpu":
        check_gpu_build()
        if hasattr(onnxruntime, "preload_dlls"):  # 1.21 and later: CUDA and cuDNN from pip's packages, where they are
            onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device_id}))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: ONNX Runtime cannot load it ({reason}), expected a sound ONNX model") from None
    if device == "gpu" and "CUDAExecutionProvider" not in session.get_providers():
        raise UserError(f"--device gpu, --device_id {device_id}: ONNX Runtime could not start CUDA, expected an NVIDIA driver, "
                        "the CUDA and cuDNN of this onnxruntime-gpu (deploy/predictor/README.md) and a GPU of that number; or "
                        "--device cpu")
    return session
