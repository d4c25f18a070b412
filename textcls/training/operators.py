"""Operators of Paddle that a training on a CPU runs faster: linear layers, dropout, clipping."""

import contextlib
import copy
import functools
import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Optional

import numpy as np

from textcls.models.paddle_setup import paddle

RANDOM_BLOCK = 16  # random numbers of 16 bits that one step of Philox gives
LEVELS = 1 << 16


class LinearProduct(paddle.autograd.PyLayer):
    """A linear layer whose bias has its gradient by a product: Paddle's own sum takes a quarter as long as all products."""

    @staticmethod
    def forward(ctx: Any, values: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
        """values: float32 [..., inputs], weight: float32 [inputs, outputs], bias: float32 [outputs] -> float32 [..., outputs]"""
        ctx.save_for_backward(values, weight)
        ctx.needs = [not tensor.stop_gradient for tensor in (values, weight, bias)]
        return paddle.matmul(values, weight).add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[Optional[paddle.Tensor], ...]:
        values, weight = ctx.saved_tensor()
        rows = gradient.reshape([-1, gradient.shape[-1]])
        return (paddle.matmul(gradient, weight, transpose_y=True) if ctx.needs[0] else None,
                paddle.matmul(values.reshape([-1, values.shape[-1]]), rows, transpose_x=True) if ctx.needs[1] else None,
                paddle.matmul(paddle.ones([1, rows.shape[0]]), rows).flatten() if ctx.needs[2] else None)


class Dropout(paddle.autograd.PyLayer):
    """Dropout by DRAWS that keeps for its gradient what it has kept, a byte a value, and not its input."""

    @staticmethod
    def forward(ctx: Any, values: paddle.Tensor, share: float) -> paddle.Tensor:
        """values: float32 of any shape; share: of them to keep, 0 to 1, which are then divided by it."""
        ctx.kept, ctx.share = DRAWS.keep(values.shape, share), share
        return values * paddle.to_tensor(np.multiply(ctx.kept, np.float32(1 / share)))

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        return gradient * paddle.to_tensor(np.multiply(ctx.kept, np.float32(1 / ctx.share)))


class Draws(threading.local):
    """The random numbers of a step's dropout; each thread's own.

    A number depends on the key, on which call of the step asks, and on the row of the batch: not on how the rows are shared out
    between threads. So a step drops out the same however many threads there are, and when it is run again.
    """

    key: Optional[tuple[int, int]] = None  # two numbers of 64 bits: of the training, of the step; None: Paddle draws
    first_row, calls = 0, 0

    def begin(self, key: tuple[int, int], first_row: int) -> None:
        """Let this thread draw the numbers of the rows from first_row on, of the batch that key stands for."""
        self.key, self.first_row, self.calls = key, first_row, 0

    def end(self) -> None:
        """Let Paddle draw again."""
        self.key = None

    def keep(self, shape: list[int], share: float) -> np.ndarray:
        """Draw which values to keep: bool of this shape, True for this share of them (0 to 1)."""
        size = int(np.prod(shape[1:]))
        blocks = -(-size // RANDOM_BLOCK)
        generator = np.random.Generator(np.random.Philox(key=self.key, counter=[self.first_row * blocks, self.calls, 0, 0]))
        self.calls += 1
        words = generator.integers(0, np.iinfo(np.uint64).max, shape[0] * blocks * RANDOM_BLOCK // 4, np.uint64, endpoint=True)
        numbers = words.view(np.uint16).reshape(shape[0], -1)[:, :size]
        return (numbers < round(share * LEVELS)).reshape(shape)


DRAWS = Draws()


class ClipWhereNeeded(paddle.nn.ClipGradByGlobalNorm):
    """Clipping that touches the gradients only where their norm is over the limit, and then in their place.

    Paddle multiplies each by 1.0 otherwise, into a new tensor. For trainings on a CPU: to look at the norm would halt a GPU.
    pool: the threads that share the gradients out.
    """

    def __init__(self, clip_norm: float, pool: ThreadPoolExecutor):
        super().__init__(clip_norm)
        self.pool = pool

    def _dygraph_clip(self, params_grads: list[tuple]) -> list[tuple]:
        gradients = [gradient for _, gradient in params_grads if gradient is not None]
        norm = math.sqrt(sum(self.pool.map(square, gradients)))
        if norm > self.clip_norm:
            list(self.pool.map(functools.partial(shrink, factor=self.clip_norm / norm), gradients))
        return params_grads


def square(gradient: paddle.Tensor) -> float:
    """Return the sum of a gradient's squares."""
    return paddle._C_ops.squared_l2_norm(gradient).item()


@paddle.no_grad()
def shrink(gradient: paddle.Tensor, factor: float) -> None:
    """Multiply a gradient in its place."""
    gradient.scale_(factor)


class AdamWInThreads(paddle.optimizer.AdamW):
    """AdamW whose parameters are shared out between the threads of `pool`, a class attribute: Paddle's own uses one thread."""

    pool: ThreadPoolExecutor

    def _append_optimize_op(self, block: Any, param_and_grad: Any) -> None:
        if isinstance(param_and_grad, dict):  # of a group with options of its own, which go into the optimizer's attributes
            param_and_grad = self._update_param_group(param_and_grad)
        run = functools.partial(super(AdamWInThreads, copy.copy(self))._append_optimize_op, block, param_and_grad)
        self.steps.append(self.pool.submit(run))

    def _create_optimization_pass(self, *given: Any, **options: Any) -> Any:
        self.steps: list[Future] = []
        result = super()._create_optimization_pass(*given, **options)
        for step in self.steps:
            step.result()
        return result


@contextlib.contextmanager
def fast_operators(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Put the faster operators in the place of Paddle's, by whose names its layers and the library call them, for a while.

    pool: of `open_pool`, for the optimizer.
    """
    linear, dropout = paddle.nn.functional.linear, paddle.nn.functional.dropout

    def linear_product(x: paddle.Tensor, weight: paddle.Tensor, bias: Optional[paddle.Tensor] = None,
                       **options: Any) -> paddle.Tensor:
        if bias is None or weight.stop_gradient and bias.stop_gradient:
            return linear(x, weight, bias=bias, **options)
        return LinearProduct.apply(x, weight, bias)

    def drop(x: paddle.Tensor, p: float = 0.5, axis: Optional[int] = None, training: bool = True,
             mode: str = "upscale_in_train", **options: Any) -> paddle.Tensor:
        if DRAWS.key is None or not training or not p or axis is not None or mode != "upscale_in_train":
            return dropout(x, p=p, axis=axis, training=training, mode=mode, **options)
        return Dropout.apply(x, 1 - p)

    with contextlib.ExitStack() as stack:
        for owner, name, own in (
                (paddle.nn.functional, "linear", linear_product), (paddle.nn.functional, "dropout", drop),
                (paddle.nn, "ClipGradByGlobalNorm", functools.partial(ClipWhereNeeded, pool=pool)),
                (paddle.optimizer, "AdamW", type("AdamW", (AdamWInThreads,), {"pool": pool}))):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, own)
        yield
