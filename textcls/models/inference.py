"""Run a trained classifier over many texts: logits, probabilities, features."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import Progress, progress_bar
from textcls.common.probabilities import softmax
from textcls.data.tokens import TokenizedTexts, run_by_length

if TYPE_CHECKING:
    from textcls.models.checkpoints import Checkpoint

    import paddle


def count_cores() -> int:
    """Return how many cores this process uses: OMP_NUM_THREADS, which paddle_setup sets to all where the user has not."""
    return max(1, int(os.environ.get("OMP_NUM_THREADS", 1)))


def open_pool(num_threads: int) -> ThreadPoolExecutor:
    """Open a pool of threads that run Paddle on its device; on a CPU they share its cores out between their matrix products."""
    from threadpoolctl import threadpool_limits

    from textcls.models.paddle_setup import paddle

    device, cores = paddle.get_device(), max(1, count_cores() // num_threads)

    def prepare_thread() -> None:
        paddle.set_device(device)
        threadpool_limits(cores, user_api="openmp")  # of this thread; the other threads keep theirs

    return ThreadPoolExecutor(num_threads, initializer=prepare_thread)


def map_batches(run: Callable, batches: Iterable) -> Iterator:
    """Yield run(batch) of each batch, in order. On a CPU each thread runs batches of its own: Paddle's GELU, softmax and
    layer norm use one thread only, whatever OMP_NUM_THREADS says."""
    from textcls.models.paddle_setup import paddle

    threads = count_cores() if paddle.get_device() == "cpu" else 1
    if threads == 1:
        yield from map(run, batches)
    else:
        with open_pool(threads) as pool:
            yield from pool.map(run, batches)


def predict_logits(checkpoint: "Checkpoint", tokens: TokenizedTexts, batch_size: int,
                   progress: Optional[Progress] = None) -> np.ndarray:
    """Run the classifier over tokenized texts; returns logits float32 [num_texts, num_classes] in input order, or of a sentence
    encoder its vectors [num_texts, embedding_size]. progress: to advance by the texts done, or None. UserError.
    """
    size = getattr(checkpoint.model, "embedding_size", len(checkpoint.labels))
    return _run_model(checkpoint.model, checkpoint.pad_id, tokens, batch_size, size, progress)


def _run_model(model: Callable[["paddle.Tensor"], "paddle.Tensor"], pad_id: int, tokens: TokenizedTexts, batch_size: int,
               size: int, progress: Optional[Progress]) -> np.ndarray:
    from textcls.models.paddle_setup import paddle

    def run(batch: np.ndarray) -> np.ndarray:
        with paddle.no_grad():
            return model(paddle.to_tensor(batch)).numpy()

    answers = run_by_length(run, tokens, batch_size, pad_id, size, map_batches=map_batches, progress=progress)
    if not np.isfinite(answers).all():
        raise UserError("the model's answers are not numbers, expected a model whose training did not diverge")
    return answers


def predict_probs(checkpoint: "Checkpoint", tokens: TokenizedTexts, batch_size: int, description: Optional[str] = None,
                  progress: Optional[Progress] = None) -> np.ndarray:
    """Run the classifier over tokenized texts; returns probabilities float32 [num_texts, num_classes], rows sum to 1, by the
    checkpoint's temperature.

    description: what a progress bar of this run is called, or None; progress: an open bar to advance instead, or None.
    """
    if description is None:
        return softmax(predict_logits(checkpoint, tokens, batch_size, progress), checkpoint.temperature)
    with progress_bar(tokens.num_texts, description) as progress:
        return softmax(predict_logits(checkpoint, tokens, batch_size, progress), checkpoint.temperature)


def predict_features(checkpoint: "Checkpoint", tokens: TokenizedTexts, batch_size: int,
                     progress: Optional[Progress] = None) -> tuple[np.ndarray, np.ndarray]:
    """Run the classifier over tokenized texts and keep what its last layer, `classifier`, is given.

    Returns (features float32 [num_texts, hidden_size], logits float32 [num_texts, num_classes]) in input order; logits are
    features @ classifier.weight + classifier.bias. batch_size, progress: as of `predict_logits`.
    """
    from textcls.models.paddle_setup import paddle

    classifier, last = checkpoint.model.classifier, threading.local()  # each thread's last batch: they share the model
    hidden_size, num_classes = classifier.weight.shape

    def keep(layer: "paddle.nn.Layer", inputs: tuple["paddle.Tensor", ...]) -> None:
        last.features = inputs[0]

    def run(batch: "paddle.Tensor") -> "paddle.Tensor":
        logits = checkpoint.model(batch)
        return paddle.concat([last.features, logits], axis=1)

    hook = classifier.register_forward_pre_hook(keep)
    try:
        answers = _run_model(run, checkpoint.pad_id, tokens, batch_size, hidden_size + num_classes, progress)
    finally:
        hook.remove()
    return answers[:, :hidden_size], answers[:, hidden_size:]
