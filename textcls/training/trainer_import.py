"""Imports PaddleNLP's Trainer, lightly: to be imported before anything of paddlenlp.trainer or paddlenlp.prompt."""

import contextlib
import sys
import types
from collections.abc import Iterator

from textcls.common.errors import interruptible
from textcls.models import paddle_setup  # noqa: F401  before anything of paddlenlp

UNUSED = ("datasets", "paddlenlp.datasets", "paddlenlp.metrics", "paddlenlp.metrics.squad", "matplotlib", "matplotlib.pyplot",
          "matplotlib.backends", "matplotlib.backends.backend_pdf")


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
def _without_unused() -> Iterator[None]:
    """Import PaddleNLP's trainers without the packages that nothing here asks them for: 150 MB of memory and half a second.

    Hugging Face's datasets (with pandas and pyarrow) are asked whether the training data are theirs, PaddleNLP's are its own
    benchmarks, its metrics (with scikit-learn) those of other tasks, matplotlib draws what PaddleSlim analyses. Outside they can
    be imported as ever. Can go when `import paddlenlp.trainer` leaves none of them in sys.modules.
    """
    import paddlenlp.utils.import_utils

    left_out = [name for name in UNUSED if name not in sys.modules]
    if "datasets" in left_out:
        paddlenlp.utils.import_utils.is_datasets_available = lambda: False
    sys.modules.update((name, _Unused(name)) for name in left_out)
    try:
        yield
    finally:
        for name in left_out:
            del sys.modules[name]


with interruptible(), _without_unused():
    import paddlenlp.prompt  # noqa: F401  before its trainer: they import each other
    import paddlenlp.trainer  # noqa: F401
