"""Run a trained classifier over many texts: logits, probabilities, features."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.known import add_nearness, split_known
from textcls.common.log import Progress, progress_bar
from textcls.common.probabilities import softmax
from textcls.data.tokens import TokenizedTexts, run_by_length

if TYPE_CHECKING:
    from textcls.models.checkpoints import Checkpoint

    import paddle
    from paddlenlp.transformers import PretrainedModel


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
    return _run_model(lambda batch: checkpoint.model(batch).numpy(), checkpoint.pad_id, tokens, batch_size, size, progress)


def _run_model(answer: Callable[["paddle.Tensor"], np.ndarray], pad_id: int, tokens: TokenizedTexts, batch_size: int,
               size: int, progress: Optional[Progress]) -> np.ndarray:
    from textcls.models.paddle_setup import paddle

    def run(batch: np.ndarray) -> np.ndarray:
        with paddle.no_grad():
            return answer(paddle.to_tensor(batch))

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
    hidden_size, num_classes = checkpoint.model.classifier.weight.shape
    with keeping_features(checkpoint.model) as run:
        answers = _run_model(lambda batch: np.column_stack(run(batch)), checkpoint.pad_id, tokens, batch_size,
                             hidden_size + num_classes, progress)
    return answers[:, :hidden_size], answers[:, hidden_size:]


@contextlib.contextmanager
def keeping_features(model: "PretrainedModel") -> Iterator[Callable[["paddle.Tensor"], tuple[np.ndarray, np.ndarray]]]:
    """Give a function of a batch, int64 [batch, length], that runs a classifier: (features float32 [batch, hidden_size], which
    its last layer is given, logits float32 [batch, num_classes]). It may be called in several threads."""
    last = threading.local()  # each thread's last batch: they share the model

    def keep(layer: "paddle.nn.Layer", inputs: tuple["paddle.Tensor", ...]) -> None:
        last.features = inputs[0]

    def run(batch: "paddle.Tensor") -> tuple[np.ndarray, np.ndarray]:
        logits = model(batch).numpy()
        return last.features.numpy(), logits

    hook = model.classifier.register_forward_pre_hook(keep)
    try:
        yield run
    finally:
        hook.remove()


def predict_known(checkpoint: "Checkpoint", tokens: TokenizedTexts, batch_size: int, progress: Optional[Progress] = None
                  ) -> tuple[np.ndarray, Optional[np.ndarray]]:
    """Run the classifier over tokenized texts and tell how known they are.

    Returns (logits float32 [num_texts, num_classes], the probability that each text is of a label at all, float64 [num_texts],
    None where the checkpoint holds no Centres) in input order. batch_size, progress: as of `predict_logits`.
    """
    centres = checkpoint.centres
    if centres is None:
        return predict_logits(checkpoint, tokens, batch_size, progress), None
    with keeping_features(checkpoint.model) as run:
        def answer(batch: "paddle.Tensor") -> np.ndarray:
            features, logits = run(batch)
            return add_nearness(logits, features, centres)

        answers = _run_model(answer, checkpoint.pad_id, tokens, batch_size, len(checkpoint.labels) + 1, progress)
    return split_known(answers, centres)
