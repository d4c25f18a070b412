"""The device that a script runs on."""

from typing import Optional

from textcls.common.errors import UserError, is_main_rank
from textcls.common.log import get_logger


def select_device(device: Optional[str]) -> str:
    """Select and return the Paddle device.

    device: "cpu", "gpu", "gpu:1", "xpu", "npu" or None (the GPU if Paddle sees one, else the CPU, saying so).
    Raises UserError where the device does not exist.
    """
    from textcls.models.paddle_setup import paddle

    kind = (device or "").split(":")[0]
    if device is not None and kind not in ("cpu", "gpu", "xpu", "npu"):
        raise UserError(f"--device {device}: unknown device, expected cpu, gpu, gpu:N, xpu or npu")
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if device is None:
        kind = device = "gpu" if gpus else "cpu"
        if not gpus and is_main_rank():
            get_logger().info("No GPU seen by Paddle: using the CPU.")
    if kind == "gpu" and not gpus:
        build = "this Paddle is a CPU build" if not paddle.is_compiled_with_cuda() else "Paddle sees no GPU"
        raise UserError(f"--device {device}: {build}, expected --device cpu, or the GPU set of packages (README.md, "
                        "sections 2.2 and 2.3) on a machine with an NVIDIA GPU and driver")
    try:
        paddle.set_device(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--device {device}: Paddle cannot use it ({error}), expected cpu or gpu") from None
    # Paddle 2.6.2's views (transposed, sliced) are slow to copy on a CPU: the gradient of a transposition took 25 times as long
    paddle.set_flags({"FLAGS_use_stride_kernel": kind != "cpu"})
    return device
