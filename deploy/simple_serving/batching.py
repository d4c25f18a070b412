"""Micro-batching: the texts of requests that come at the same time are answered together."""

import asyncio
import heapq
import threading
from collections.abc import Sequence
from typing import Any, Callable


class QueueFull(Exception):
    """More texts would wait than the queue may hold; nothing of the request was taken."""


class MicroBatcher:
    """Answers the texts of concurrent requests in common batches.

    There is no timer: as soon as one of `slots` threads is free it takes the text that has waited longest and, with it, the
    waiting texts nearest in length, so that little is padded. A single request never waits for others, batches grow by
    themselves with the load, and no text is overtaken for long. The texts of one request may be spread over batches.

    run: function of (list of str, list of what each one's request wants), called in the threads: a sequence with one item per
    text, such as an array's rows. batch_size: texts per batch at most. slots: batches at a time. max_queue: texts that may
    wait. on_batch: called with the size of each batch, in the event loop's thread.
    """

    def __init__(self, run: Callable[[list[str], list[Any]], Sequence], batch_size: int, slots: int, max_queue: int,
                 on_batch: Callable[[int], None] = lambda size: None) -> None:
        self._run, self.on_batch = run, on_batch
        self.batch_size, self.max_queue = batch_size, max_queue
        self._waiting = {}  # in the order of arrival: number of the text -> (text, its place in the request, _Request)
        self._arrived, self._changed = 0, threading.Condition()  # the latter guards _waiting
        for number in range(slots):
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Number of texts that wait for a batch."""
        return len(self._waiting)

    async def __call__(self, texts: list[str], wanted: Any) -> list:
        """Return the items of the texts, in their order. wanted: handed to `run`. Raises QueueFull, and what `run` raises.

        What has not begun by then is dropped where this is cancelled, or one batch of the request has failed.
        """
        if self.waiting + len(texts) > self.max_queue:
            raise QueueFull
        request = _Request(len(texts), wanted)
        with self._changed:
            first = self._arrived
            self._arrived += len(texts)
            for place, text in enumerate(texts):
                self._waiting[first + place] = text, place, request
            self._changed.notify(len(texts))
        try:
            return await request.complete
        except BaseException:
            with self._changed:
                for place in range(len(texts)):
                    self._waiting.pop(first + place, None)
            raise

    def _work(self):
        """A thread: it fetches its batches itself, so that it needs not wait for the event loop between two of them."""
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                batch = self._take_batch()
            result, error = None, None
            try:
                result = self._run([text for text, _, _ in batch], [request.wanted for _, _, request in batch])
            except Exception as raised:  # the requests of this batch raise it; the thread goes on
                error = raised
            batch[0][2].loop.call_soon_threadsafe(self._hand_out, batch, result, error)

    def _take_batch(self):
        """Take the next batch from _waiting: a list of its values."""
        numbers = list(self._waiting)
        if len(numbers) > self.batch_size:
            length = len(self._waiting[numbers[0]][0])  # in characters, which in Chinese are about as many tokens
            numbers = heapq.nsmallest(self.batch_size, numbers, key=lambda number: (
                abs(len(self._waiting[number][0]) - length), number))
        return [self._waiting.pop(number) for number in numbers]

    def _hand_out(self, batch, result, error):
        """In the event loop's thread: give each request its items of the result, or the error."""
        self.on_batch(len(batch))
        for position, (_, place, request) in enumerate(batch):
            if request.complete.done():  # failed in another batch, or nobody waits for it any more
                continue
            if error is not None:
                request.complete.set_exception(error)
            else:
                request.add(place, result[position])


class _Request:
    """A request whose items come from one or several batches."""

    def __init__(self, size, wanted):
        self.loop, self.wanted = asyncio.get_running_loop(), wanted
        self.complete, self._items, self._missing = self.loop.create_future(), [None] * size, size

    def add(self, place, item):
        self._items[place] = item
        self._missing -= 1
        if not self._missing:
            self.complete.set_result(self._items)
