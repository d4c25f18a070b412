"""Imports PaddleNLP's Trainer, lightly: to be imported before anything of paddlenlp.trainer or paddlenlp.prompt."""

import contextlib
import sys
from collections.abc import Iterator

from textcls.common.errors import interruptible
from textcls.models import paddle_setup  # noqa: F401  before anything of paddlenlp
from textcls.models.unused_packages import leave_out

UNUSED = ("datasets", "paddlenlp.datasets", "paddlenlp.metrics", "paddlenlp.metrics.squad", "matplotlib", "matplotlib.pyplot",
          "matplotlib.backends", "matplotlib.backends.backend_pdf", "scipy", "scipy.linalg", "scipy.stats")


@contextlib.contextmanager
def _without_unused() -> Iterator[None]:
    """Import PaddleNLP's trainers without the packages that nothing here asks them for: 150 MB of memory and half a second.

    Hugging Face's datasets (with pandas and pyarrow) are asked whether the training data are theirs, PaddleNLP's are its own
    benchmarks, its metrics (with scikit-learn) those of other tasks, matplotlib draws what PaddleSlim analyses, SciPy searches
    its settings. Can go when `import paddlenlp.trainer` leaves none of them in sys.modules.
    """
    import paddlenlp.utils.import_utils

    if "datasets" not in sys.modules:
        paddlenlp.utils.import_utils.is_datasets_available = lambda: False
    with leave_out(*UNUSED):
        yield


with interruptible(), _without_unused():
    import paddlenlp.prompt  # noqa: F401  before its trainer: they import each other
    import paddlenlp.trainer  # noqa: F401
