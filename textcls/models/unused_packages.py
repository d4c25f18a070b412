"""Packages that others import for nothing that is used here."""

import contextlib
import sys
import types
from collections.abc import Iterator


class _Unused(types.ModuleType):
    """What stands for a package, and for all that is in it, while it is left out."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> "_Unused":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unused(name)

    def __call__(self, *given: object, **options: object) -> None:
        pass


@contextlib.contextmanager
def leave_out(*names: str) -> Iterator[None]:
    """Let imports in the block get nothing but stand-ins of these packages and modules, unless they are imported already.
    Afterwards they can be imported as ever."""
    left_out = [name for name in names if name not in sys.modules]
    sys.modules.update((name, _Unused(name)) for name in left_out)
    try:
        yield
    finally:
        for name in left_out:
            del sys.modules[name]
