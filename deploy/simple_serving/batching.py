"""Micro-batching: the texts of requests that come at the same time are answered together."""

import asyncio
import bisect
import queue
import threading
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

BYTES_PER_TOKEN = 3  # of UTF-8, about: a Chinese character is one token, an English word of six letters two


class QueueFull(Exception):
    """More texts would wait than the queue may hold; nothing of the request was taken."""


class MicroBatcher:
    """Answers the texts of concurrent requests in common batches.

    There is no timer: as soon as one of `slots` threads is free it takes the text that has waited longest and, with it, those
    waiting texts of like length that make a text of the batch cheapest (`choose`). A single request never waits for others,
    batches grow by themselves with the load, and no text is overtaken for long. The texts of one request may be spread over
    batches.

    The event loop never waits for the threads: it puts texts into a queue, which a thread empties when it looks for a batch. (A
    lock that both sides took cost the event loop a sixth of its time, since a thread that held it had to wait for Python's own.)

    run: function of (list of str, list of what each one's request wants), called in the threads: a sequence with one item per
    text, such as an array's rows. batch_size: texts per batch at most. batch_cost: of `choose`. longest: tokens that the model
    reads of a text. slots: batches at a time. max_queue: texts that may wait. on_batch: called with the size of each batch, in
    the event loop's thread.
    """

    def __init__(self, run: Callable[[list[str], list[Any]], Sequence], batch_size: int, batch_cost: float, longest: int,
                 slots: int, max_queue: int, on_batch: Callable[[int], None] = lambda size: None) -> None:
        self._run, self.on_batch = run, on_batch
        self.batch_size, self.batch_cost, self.longest, self.max_queue = batch_size, batch_cost, longest, max_queue
        self._arriving: queue.SimpleQueue[_Text] = queue.SimpleQueue()
        self._choosing = threading.Lock()  # guards the two that follow, which hold the same texts
        self._by_arrival: dict[int, _Text] = {}
        self._by_length: list[_Text] = []
        self._arrived = self._left = 0  # texts; the one changes in the event loop only, the other under the lock
        for number in range(slots):
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Number of texts that wait for a batch."""
        return self._arrived - self._left

    async def __call__(self, texts: list[str], wanted: Any) -> list:
        """Return the items of the texts, in their order. wanted: handed to `run`. Raises QueueFull, and what `run` raises.

        What has not begun by then is dropped where this is cancelled, or one batch of the request has failed.
        """
        if self.waiting + len(texts) > self.max_queue:
            raise QueueFull
        request = _Request(len(texts), wanted)
        for place, text in enumerate(texts):
            length = min(len(text.encode()) // BYTES_PER_TOKEN + 2, self.longest)  # 2: [CLS] and [SEP]
            self._arriving.put(_Text(length, self._arrived, text, place, request))
            self._arrived += 1
        try:
            return await request.complete
        except BaseException:
            request.is_dropped = True
            raise

    def _work(self):
        """A thread: it fetches its batches itself, so that it needs not wait for the event loop between two of them."""
        while True:
            with self._choosing:
                batch = self._take_batch()
            if not batch:  # all of it dropped
                continue
            result, error = None, None
            try:
                result = self._run([item.text for item in batch], [item.request.wanted for item in batch])
            except Exception as raised:  # the requests of this batch raise it; the thread goes on
                error = raised
            batch[0].request.loop.call_soon_threadsafe(self._hand_out, batch, result, error)

    def _take_batch(self):
        """Take the next batch, a list of _Text; waits for a text where there is none."""
        while not (self._by_arrival and self._arriving.empty()):
            item = self._arriving.get()
            self._by_arrival[item.number] = item
            bisect.insort(self._by_length, item)
        oldest = next(iter(self._by_arrival.values()))
        position = bisect.bisect_left(self._by_length, oldest)
        first = max(0, position - self.batch_size + 1)
        near = self._by_length[first:position + self.batch_size]
        start, end = choose([item.length for item in near], position - first, self.batch_size, self.batch_cost)
        batch = near[start:end]
        del self._by_length[first + start:first + end]
        for item in batch:
            del self._by_arrival[item.number]
        self._left += len(batch)
        return [item for item in batch if not item.request.is_dropped]

    def _hand_out(self, batch, result, error):
        """In the event loop's thread: give each request its items of the result, or the error."""
        self.on_batch(len(batch))
        for position, item in enumerate(batch):
            request = item.request
            if request.complete.done():  # failed in another batch, or nobody waits for it any more
                continue
            if error is not None:
                request.complete.set_exception(error)
            else:
                request.add(item.place, result[position])


def choose(lengths: list[int], position: int, batch_size: int, batch_cost: float) -> tuple[int, int]:
    """Choose the batch with the text at `position`: returns (start, end) in lengths, tokens of texts, in rising order.

    A batch of k texts takes as long as batch_cost + k * its longest text (tokens): the constant part, for which the weights are
    read from memory, is shared by the texts. Of all batches with the text it is the one that wastes least for each of its texts,
    (batch_cost + padding) / k.
    """
    best, chosen = float("inf"), (position, position + 1)
    for start in range(max(0, position - batch_size + 1), position + 1):
        total = sum(lengths[start:position])
        for end in range(position + 1, min(len(lengths), start + batch_size) + 1):
            total += lengths[end - 1]
            size = end - start
            waste = (batch_cost + size * lengths[end - 1] - total) / size
            if waste < best:
                best, chosen = waste, (start, end)
    return chosen


class _Text(NamedTuple):
    """A text that waits; sorted by its first two."""

    length: int  # tokens, about
    number: int  # in the order of arrival
    text: str
    place: int  # in its request
    request: "_Request"


class _Request:
    """A request whose items come from one or several batches."""

    def __init__(self, size, wanted):
        self.loop, self.wanted = asyncio.get_running_loop(), wanted
        self.complete, self._items, self._missing = self.loop.create_future(), [None] * size, size
        self.is_dropped = False  # nobody waits for it any more

    def add(self, place, item):
        self._items[place] = item
        self._missing -= 1
        if not self._missing:
            self.complete.set_result(self._items)
