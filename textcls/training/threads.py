"""A training step, or an evaluation, on the threads of one process: each has some of the batch's rows and gradients of its own.

Paddle runs layer norm, GELU, softmax, dropout and sums on one thread, whatever OMP_NUM_THREADS says; only its matrix products
use more. So each thread here runs the model forward and backward on its rows.
"""

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from textcls.models.inference import count_cores
from textcls.models.paddle_setup import paddle
from textcls.training.operators import DRAWS

LEAST_ROWS = 8  # for a thread: with fewer, the sum of the threads' gradients takes longer than the rows


def count_threads(num_rows: int) -> int:
    """Return how many threads share the rows of a step out; the cores beyond go to the matrix products of each."""
    return max(1, min(count_cores(), num_rows // LEAST_ROWS))


class Call(NamedTuple):
    """One run of the model over a batch."""

    parts: list[paddle.Tensor]  # what each thread's model has given
    output: paddle.Tensor  # all of them, without their past


def lead_back(call: Call, index: int) -> None:
    """Run the backward pass of one part of a call."""
    start = sum(len(part) for part in call.parts[:index])
    call.parts[index].backward(call.output.grad[start:start + len(call.parts[index])])


class ThreadedModel:
    """A model that several threads run, in the place of the model itself in a training step on a CPU.

    model: a PretrainedModel, which is one of the threads'; the others have copies that share the weights, not the gradients.
    pool: of `open_pool(num_threads)`.
    Called like the model, it returns an output whose gradient `backward` leads on to the model's weights.
    """

    def __init__(self, model: paddle.nn.Layer, num_threads: int, pool: ThreadPoolExecutor):
        self.models = [model, *(copy.deepcopy(model) for _ in range(num_threads - 1))]
        for copied in self.models[1:]:
            for source, target in zip(model.parameters(), copied.parameters()):
                source._share_buffer_to(target)
                target.stop_gradient = source.stop_gradient
        trained = [[parameter for parameter in own.parameters() if not parameter.stop_gradient] for own in self.models]
        self.weights = list(zip(*trained))  # each of the model's own, with those of the copies
        self.arrived, self.num_parts, self.lock = [0] * len(self.weights), 0, threading.Lock()
        itself = weakref.ref(self)  # the model keeps the hooks for ever
        for number, parameters in enumerate(self.weights):
            for parameter in parameters:
                parameter._register_backward_hook(functools.partial(_arrive, itself, number))
        self.calls: list[Call] = []
        self.key, self.num_calls = (0, 0), 0
        self.pool = pool

    @property
    def training(self) -> bool:
        """Whether the models drop out."""
        return self.models[0].training

    def train(self) -> None:
        """Let the models drop out."""
        for model in self.models:
            model.train()

    def begin(self, seed: int, step: int) -> None:
        """Let the next runs draw their dropout by these two numbers alone."""
        self.key, self.num_calls = (seed, step), 0

    def __call__(self, input_ids: paddle.Tensor, **options: Any) -> paddle.Tensor:
        """Run the model; the arguments are its own, and all but input_ids go to every thread. Returns the model's output."""
        step = (self.key[0], (self.key[1] << 16) + self.num_calls)
        self.num_calls += 1
        ends = np.linspace(0, len(input_ids), min(len(self.models), len(input_ids)) + 1).astype(int)
        has_gradient = paddle.is_grad_enabled()

        def run(index: int) -> paddle.Tensor:
            DRAWS.begin(step, int(ends[index]))
            try:
                with paddle.set_grad_enabled(has_gradient):
                    return self.models[index](input_ids[ends[index]:ends[index + 1]], **options)
            finally:
                DRAWS.end()

        parts = self.share_out(run, len(ends) - 1)
        with paddle.no_grad():
            output = paddle.concat([part.detach() for part in parts])
        if has_gradient:
            output.stop_gradient = False
            self.calls.append(Call(parts, output))
        return output

    def backward(self) -> None:
        """Lead the gradients that outputs have by now back to the model's weights, and forget those outputs."""
        calls = [call for call in self.calls if call.output.grad is not None]
        self.calls = [call for call in self.calls if call.output.grad is None]
        for call in calls:
            self.num_parts = len(call.parts)
            self.share_out(functools.partial(lead_back, call), self.num_parts)
        self.num_parts = 0

    def arrive(self, number: int) -> None:
        """Note that one more thread has its gradient of a weight; the last one adds them up, in the order of the threads."""
        with self.lock:
            self.arrived[number] += 1
            if self.arrived[number] < self.num_parts:
                return
            self.arrived[number] = 0
        own, *others = self.weights[number][:self.num_parts]
        with paddle.no_grad():
            for other in others:
                own.grad.add_(other.grad)
                other.clear_gradient(False)

    def share_out(self, run: Callable[[int], Any], count: int) -> list:
        """Run run(0) to run(count - 1), each on a thread; the first error of one is raised here."""
        return list(self.pool.map(run, range(count)))


class EvaluatedModel:
    """A model that several threads ask about the rows of a batch, in the place of the model itself in an evaluation on a CPU.

    model: a PretrainedModel in eval mode, which the threads share; pool: of `open_pool(num_threads)`.
    """

    training = False

    def __init__(self, model: paddle.nn.Layer, num_threads: int, pool: ThreadPoolExecutor):
        self.model, self.num_threads, self.pool = model, num_threads, pool

    def __call__(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """Return the model's output, without its past."""
        @paddle.no_grad()
        def run(rows: np.ndarray) -> paddle.Tensor:
            return self.model(input_ids[int(rows[0]):int(rows[-1]) + 1])

        rows = np.array_split(np.arange(len(input_ids)), min(self.num_threads, len(input_ids)))
        return paddle.concat(list(self.pool.map(run, rows)))


def _arrive(itself: "weakref.ref[ThreadedModel]", number: int) -> None:
    """The hook of a weight, which Paddle calls when its gradient of a backward pass is complete."""
    threads = itself()
    if threads is not None and threads.num_parts:
        threads.arrive(number)
