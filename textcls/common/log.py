"""The log of all scripts, in the form of PaddleNLP's: `[time] [    INFO] - text` on standard error; progress of long work."""

import contextlib
import functools
import logging
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Optional, Protocol

LEAST_SILENT, MOST_SILENT = 2, 30  # seconds between two lines of progress


@functools.cache
def get_logger() -> logging.Logger:
    """Return the suite's logging.Logger. It needs no Paddle, so that what goes wrong before a model is loaded is said at once."""
    logger = logging.getLogger("textcls")
    handler = logging.StreamHandler()
    handler.setFormatter(make_formatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger


def make_formatter() -> logging.Formatter:
    """Return the form of a log line; coloured only on a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return logging.Formatter("[%(asctime)-15s] [%(levelname)8s] - %(message)s")
    import colorlog

    colours = {"INFO": "green", "TRAIN": "cyan", "EVAL": "blue", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold_red"}
    return colorlog.ColoredFormatter("%(log_color)s[%(asctime)-15s] [%(levelname)8s]%(reset)s - %(message)s", log_colors=colours)


@contextlib.contextmanager
def without_library_log() -> Iterator[None]:
    """Drop what PaddleNLP has to say below the level of warnings."""
    library = logging.getLogger("PaddleNLP")
    level = library.level
    library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        library.setLevel(level)


def progress_bar(total: Optional[int], description: str, unit: str = "texts", leave: bool = False,
                 disable: bool = False) -> "Progress":
    """A context manager that shows how far long work has got; call its update(n) as units are done, from any thread.

    On a terminal a tqdm bar. Elsewhere, where a bar would fill the log, a plain line every tenth of the work or 30 s.
    total: number of units, or None where it is not known.
    """
    if disable or (sys.stderr is not None and sys.stderr.isatty()):
        from tqdm import tqdm

        return tqdm(total=total, desc=description, unit=f" {unit}", delay=2, leave=leave, disable=disable)
    return PlainProgress(total, description, unit)


class Progress(Protocol):
    """What `progress_bar` gives."""

    def __enter__(self) -> "Progress":
        ...

    def __exit__(self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType], /
                 ) -> object:
        ...

    def update(self, count: int, /) -> object:
        ...


class PlainProgress:
    """The progress of `progress_bar` as lines of the log. Work of less than LEAST_SILENT seconds has none."""

    def __init__(self, total: Optional[int], description: str, unit: str):
        self.total, self.description, self.unit = total, description, unit
        self.done, self.lock = 0, threading.Lock()
        self.said, self.next = time.monotonic(), (total or 0) / 10  # when the last line came, and where the next one is due

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        with self.lock:
            self.done += count
            seconds = time.monotonic() - self.said
            is_due = bool(self.total) and self.done >= self.next and seconds >= LEAST_SILENT
            if is_due or seconds >= MOST_SILENT:
                of = f" of {self.total}" if self.total else ""
                get_logger().info(f"{self.description}: {self.done}{of} {self.unit}")
                self.said, self.next = time.monotonic(), self.done + (self.total or 0) / 10
