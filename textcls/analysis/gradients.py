"""Integrated gradients of a PaddleNLP classifier by its word embeddings, over many texts and steps at once."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from textcls.common.log import progress_bar
from textcls.data.tokens import pad_batch
from textcls.models.checkpoints import Checkpoint
from textcls.models.families import find_word_embeddings
from textcls.models.inference import map_batches

if TYPE_CHECKING:
    from paddle import Tensor
    from paddle.nn import Layer


@contextlib.contextmanager
def without_weight_gradients(model: "Layer") -> Iterator[None]:
    """Let a backward pass compute no gradients of the model's weights, only those that lead to its input.

    Layer norms are written out meanwhile: on a CPU, Paddle 2.6.2's own gives a wrong gradient of its input where its weight needs
    none (integrated gradients then missed the probability by 7 % however many steps), and a slow one in any case. That can go
    when `layer_norm` has the same gradient whether or not its weight's stop_gradient is True.
    """
    from paddle.nn import LayerNorm

    norms = [layer for layer in model.sublayers() if isinstance(layer, LayerNorm)]
    before = [(parameter, parameter.stop_gradient) for parameter in model.parameters()]
    try:
        for norm in norms:
            norm.forward = functools.partial(_normalize, norm)
        for parameter, _ in before:
            parameter.stop_gradient = True
        yield
    finally:
        for norm in norms:
            del norm.forward
        for parameter, stop_gradient in before:
            parameter.stop_gradient = stop_gradient


def _normalize(norm: "Layer", values: "Tensor") -> "Tensor":
    from textcls.models.paddle_setup import paddle

    centred = values - values.mean(axis=-1, keepdim=True)
    return centred * paddle.rsqrt((centred * centred).mean(axis=-1, keepdim=True) + norm._epsilon) * norm.weight + norm.bias


def integrated_gradients(checkpoint: Checkpoint, rows: Sequence[Sequence[int]], classes: np.ndarray, batch_size: int,
                         steps: int) -> list[np.ndarray]:
    """Integrate gradients (Sundararajan et al. 2017, arXiv:1703.01365) from word embeddings of zero, by the trapezoidal rule.

    rows: lists of token ids; classes: int64 [num_texts]; batch_size: how many pairs of a text and a step are run at once.
    Returns a list of float64 [num_tokens], in the order of rows; its sum is the probability of the class less that of the
    baseline, but for the error of the rule. Padding has no attribution and changes none.
    """
    from textcls.models.paddle_setup import paddle

    by_length = np.argsort([-len(row) for row in rows], kind="stable")
    texts, points = (pairs.ravel() for pairs in np.meshgrid(by_length, np.arange(steps + 1), indexing="ij"))
    shares = np.where((points == 0) | (points == steps), 0.5, 1) / steps  # of a point in the integral
    sums = [np.zeros(len(row)) for row in rows]
    path = threading.local()  # the embeddings of each thread's batch: they share the model

    def scale(layer: "Layer", inputs: tuple["Tensor", ...], output: "Tensor") -> "Tensor":
        path.whole = output.detach()
        path.scaled = path.whole * path.factors
        path.scaled.stop_gradient = False  # where the backward pass ends
        return path.scaled

    def run(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        path.factors = paddle.to_tensor((points[pairs] / steps).astype(np.float32)).reshape([-1, 1, 1])
        logits = checkpoint.model(paddle.to_tensor(pad_batch([rows[text] for text in texts[pairs]], checkpoint.pad_id)))
        chosen = paddle.nn.functional.one_hot(paddle.to_tensor(classes[texts[pairs]]), logits.shape[1])
        (paddle.nn.functional.softmax(logits / checkpoint.temperature, axis=1) * chosen).sum().backward()
        return pairs, (path.scaled.grad * path.whole).sum(axis=-1).numpy()  # (pairs, longest)

    pairs = np.arange(len(texts))
    batches = [pairs[start:start + batch_size] for start in range(0, len(pairs), batch_size)]
    hook = find_word_embeddings(checkpoint.model).register_forward_post_hook(scale)
    try:
        with without_weight_gradients(checkpoint.model), progress_bar(len(rows), "Interpreting") as progress:
            for batch, slopes in map_batches(run, batches):
                for text, share, slope in zip(texts[batch], shares[batch], slopes):
                    sums[text] += share * slope[:len(sums[text])]
                progress.update(int((points[batch] == steps).sum()))
    finally:
        hook.remove()
    return sums
