"""Micro-batching: the texts of requests that come at the same time are labelled together."""

import asyncio
import heapq
from concurrent.futures import ThreadPoolExecutor

import numpy as np


class QueueFull(Exception):
    """More texts would wait than the queue may hold; nothing of the request was taken."""


class MicroBatcher:
    """Labels the texts of concurrent requests in common batches.

    There is no timer: as soon as one of `slots` threads is free it takes the text that has waited longest and, with it, the
    waiting texts nearest in length, so that little is padded. A single request never waits for others, batches grow by
    themselves with the load, and no text is overtaken for long. The texts of one request may be spread over batches.
    All methods belong to the event loop's thread.

    probabilities: function of a list of str, called in the threads: float32 [num_texts, num_classes]. batch_size: texts per
    batch at most. slots: batches at a time. max_queue: texts that may wait. on_batch: called with the size of each batch.
    """

    def __init__(self, probabilities, batch_size, slots, max_queue, on_batch=lambda size: None):
        self._probabilities, self.on_batch = probabilities, on_batch
        self.batch_size, self.max_queue = batch_size, max_queue
        self._free, self._threads = slots, ThreadPoolExecutor(slots, thread_name_prefix="batch")
        self._waiting = {}  # in the order of arrival: number of the text -> (text, its place in the request, _Answer)
        self._arrived = 0

    @property
    def waiting(self):
        """Number of texts that wait for a batch."""
        return len(self._waiting)

    async def __call__(self, texts):
        """Label a list of str: float32 [num_texts, num_classes]. Raises QueueFull, and what `probabilities` raises."""
        if self.waiting + len(texts) > self.max_queue:
            raise QueueFull
        answer = _Answer(len(texts))
        for place, text in enumerate(texts):
            self._waiting[self._arrived] = text, place, answer
            self._arrived += 1
        self._start_batches()
        return await answer.complete

    def _start_batches(self):
        while self._free and self._waiting:
            batch = self._take_batch()
            self._free -= 1
            self.on_batch(len(batch))
            run = asyncio.get_running_loop().run_in_executor(self._threads, self._probabilities, [text for text, _, _ in batch])
            run.add_done_callback(lambda done, batch=batch: self._finish(batch, done))

    def _take_batch(self):
        numbers = self._waiting
        if self.waiting > self.batch_size:
            length = len(next(iter(self._waiting.values()))[0])  # in characters, which in Chinese are about as many tokens
            numbers = heapq.nsmallest(self.batch_size, self._waiting, key=lambda number: (
                abs(len(self._waiting[number][0]) - length), number))
        return [self._waiting.pop(number) for number in list(numbers)]

    def _finish(self, batch, done):
        self._free += 1
        self._start_batches()  # first, so that the model goes on while answers are written
        for position, (_, place, answer) in enumerate(batch):
            if answer.complete.done():  # failed in another batch, or nobody waits for it any more
                continue
            if done.exception() is not None:
                answer.complete.set_exception(done.exception())
            else:
                answer.add(place, done.result()[position])


class _Answer:
    """Probabilities of one request, which come from one or several batches."""

    def __init__(self, size):
        self.complete, self._rows, self._missing = asyncio.get_running_loop().create_future(), [None] * size, size

    def add(self, place, row):
        self._rows[place] = row
        self._missing -= 1
        if not self._missing:
            self.complete.set_result(np.array(self._rows))
