"""The one place that imports Paddle and PaddleNLP: with the process prepared, without noise, and fast.

    from textcls.models.paddle_setup import paddle     # before anything of paddlenlp is imported

Importing this module changes the environment variables of the process (see `_prepare_process`) and puts a light package
in the place of `paddlenlp` (see `_import_paddlenlp`). Modules that may be imported without Paddle do so inside functions.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import signal
import sys
import threading
import warnings
from collections.abc import Collection, Iterator
from typing import Any, TextIO

from textcls.common.errors import interruptible
from textcls.common.log import make_formatter
from textcls.common.outputs import STAGING
from textcls.models.unused_packages import leave_out

# of glibc's mallopt: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD (bytes), M_ARENA_MAX
MALLOC_OPTIONS = {-3: 2**26, -1: 2**31 - 1, -8: 1}


def _prepare_process() -> None:
    """Set what Paddle (2.6.2, 3.3.1) needs before its first import; values that the user has set are left alone.

    - zlib: libpaddle.so exports its own zlib symbols; where Python's zlib is a shared extension, decompression then
      crashes (segfault in inflateReset2). Loading the system library first cures it. Linux only.
    - OMP_NUM_THREADS: Paddle sets 1 unless it is set. All usable cores, shared out between the ranks of this machine.
    - MKL_DEBUG_CPU_TYPE: the bundled MKL takes its slowest path on AMD CPUs; 5 selects AVX2, 7 AVX-512.
    - malloc: Paddle asks glibc anew for each result of an operator, and glibc gives large ones back to the system at once, which
      fills them with zeros the next time (measured: a sum of two tensors of 6 MB 1.65 ms, not 0.07). Blocks of up to 64 MB are
      kept instead, and shared by all threads. Linux with glibc only.
    - KMP_BLOCKTIME: threads that wait for the next matrix product keep a core busy for 200 ms; 1 ms leaves it to other threads.
    - GLOG_minloglevel: Paddle's C++ side says which executor runs at every export; its warnings and errors stay.
    The first three can go when Paddle no longer bundles zlib and MKL 2019.
    """
    if "paddle" in sys.modules:
        return  # too late to change anything
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            ctypes.CDLL("libz.so.1", mode=ctypes.RTLD_GLOBAL)
        with contextlib.suppress(OSError, AttributeError):
            for option, value in MALLOC_OPTIONS.items():
                ctypes.CDLL(None).mallopt(option, value)
    os.environ.setdefault("GLOG_minloglevel", "1")
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    ranks = int(os.environ.get("PADDLE_LOCAL_SIZE", 1))
    if "OMP_NUM_THREADS" not in (_launcher_environ() if "PADDLE_LOCAL_SIZE" in os.environ else os.environ):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // ranks))
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            cpu = cpuinfo.read(4096)
        if "AuthenticAMD" in cpu and "avx2" in cpu:
            os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if "avx512bw" in cpu else "5")


def _launcher_environ() -> Collection[str]:
    """Names in the environment that `paddle.distributed.launch` was started with: its own import of Paddle sets OMP_NUM_THREADS=1
    for the ranks, which must not be mistaken for the user's choice."""
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as environ:
            return {entry.split(b"=", 1)[0].decode("utf-8", "replace") for entry in environ.read().split(b"\0")}
    except OSError:
        return os.environ


class _WithoutNoise:
    """Standard error without two warnings; a proxy, since log handlers made during an import keep the stream."""

    noise = ("WARNING: OMP_NUM_THREADS set to", "PLEASE USE OMP_NUM_THREADS WISELY")

    def __init__(self, stream: TextIO):
        self.stream, self.dropped = stream, False

    def write(self, text: str) -> None:
        if not (text.startswith(self.noise) or (self.dropped and text == "\n")):
            self.stream.write(text)
        self.dropped = text.startswith(self.noise)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Hide the warnings that importing Paddle and its packages prints on every start.

    Paddle 2.6.2 warns about OMP_NUM_THREADS > 1 (meant for OpenBLAS builds; the PyPI wheels use MKL), setuptools about
    distutils. Neither says anything a user could act on.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(_WithoutNoise(sys.stderr)):  # type: ignore[type-var]
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Put the process's own answers to SIGTERM and SIGHUP back, which Paddle takes over when it is imported."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _import_paddlenlp() -> None:
    """Import PaddleNLP without the parts that nothing here uses; leave it out where it is not installed.

    The `paddlenlp/__init__.py` of 2.8.1 imports everything (taskflow, datasets, servers ...): 3 s of CPU time more at
    every start. A package of the same name without contents takes its place, whose submodules are imported when they are
    asked for. `paddlenlp.data` goes first, since the others import each other in a circle; `paddlenlp.prompt` has to go
    before `paddlenlp.trainer`. Can go when PaddleNLP imports its parts when they are asked for.
    """
    spec = importlib.util.find_spec("paddlenlp")
    if spec is None or "paddlenlp" in sys.modules:
        return
    package = sys.modules["paddlenlp"] = importlib.util.module_from_spec(spec)
    package.__version__ = importlib.metadata.version("paddlenlp")  # type: ignore[attr-defined]
    import paddlenlp.data
    import paddlenlp.version  # noqa: F401  which the Trainer logs
    from paddlenlp.utils.log import logger

    paddle.disable_signal_handler()  # as paddlenlp/__init__.py does
    logger.handler.setFormatter(make_formatter())
    logger.set_level("WARNING")  # until --verbose asks for more
    # folders that are there for a moment only, and what --do_eval alone means
    noise = (f"{os.sep}{STAGING}", "evaluation_strategy reset to")
    logger.logger.addFilter(lambda record: not any(part in record.getMessage() for part in noise))


_prepare_process()
# Paddle asks OpenCV for images, and PaddleNLP's tokenizer of GLM asks SciPy for a function: 60 MB and 0.3 s that nothing here
# needs. Can go when neither is in sys.modules after these imports.
with interruptible(), _kept_signals(), quiet_import(), leave_out("cv2", "scipy", "scipy.linalg"):
    import paddle

    _import_paddlenlp()
PADDLE_3 = not paddle.__version__.startswith("2.")
