"""No pickle is read that could run code: checkpoints of Paddle are pickles."""

import functools
import pickletools
from typing import Any, Optional

from textcls.common.errors import UserError
from textcls.models.paddle_setup import paddle

# What Paddle's own pickles refer to: arrays, tensors (as tuples), ordered dicts and the state of its random generator.
PICKLE_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),  # NumPy 2's names
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("builtins", "tuple"), ("__builtin__", "tuple"),
    ("collections", "OrderedDict"), ("paddle.base.libpaddle", "GeneratorState"),
}
EXPECTED = "a file that paddle.save wrote; do not load files from sources you do not trust"
PICKLE_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}


def check_pickle(path: str) -> None:
    """Raise UserError unless unpickling the file could only build what Paddle itself writes (see PICKLE_GLOBALS).

    Reads the opcodes without running them. An import whose name is not spelled out right before it is refused too.
    """
    found: Optional[str] = None
    recent: list[Optional[str]] = []
    memo: dict[object, Optional[str]] = {}
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                name = opcode.name
                if name == "FRAME":
                    continue
                if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
                    memo[len(memo) if name == "MEMOIZE" else argument] = recent[-1] if recent else None
                    continue
                if name in ("INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"):
                    found = name
                elif name in ("GLOBAL", "STACK_GLOBAL"):
                    reference = str(argument).split(" ", 1) if name == "GLOBAL" else recent[-2:]
                    if tuple(reference) not in PICKLE_GLOBALS:
                        found = ".".join(str(part) for part in reference)
                if found:
                    raise UserError(f"{path}: refused, its pickle refers to {found!r}, expected {EXPECTED}")
                if name in PICKLE_STRINGS:
                    recent.append(argument)
                else:
                    recent.append(memo.get(argument) if name in ("BINGET", "LONG_BINGET", "GET") else None)
                del recent[:-2]
    except (ValueError, OSError, UnicodeDecodeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: damaged or not a Paddle file ({error}), expected {EXPECTED}") from None


@functools.cache
def guard_paddle_load() -> None:
    """Make every `paddle.load`, PaddleNLP's own calls included, check the pickle before it is read."""
    load = paddle.load

    @functools.wraps(load)
    def checked_load(path: str, **configs: Any) -> Any:
        check_pickle(path)
        try:
            return load(path, **configs)
        except (TypeError, ValueError, AttributeError, LookupError, EOFError) as error:  # what Paddle stumbles over
            raise UserError(f"{path}: damaged or not a Paddle file ({error}), expected {EXPECTED}") from None

    paddle.load = checked_load
