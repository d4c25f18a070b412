"""The log of all scripts, in the form of PaddleNLP's: `[time] [    INFO] - text` on standard error; progress of long work."""

import contextlib
import functools
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Optional, Protocol

from textcls.common.errors import is_main_rank

NESTED = "TEXTCLS_NESTED"  # in the environment of a script that another one runs, and goes on from
LEAST_SILENT, MOST_SILENT = 2, 30  # seconds between two lines of progress


@functools.cache
def get_logger() -> logging.Logger:
    """Return the suite's logger, which says only warnings in all processes but the first.

    It needs no Paddle, so that what goes wrong before a model is loaded is said at once.
    """
    logger = logging.getLogger("textcls")
    handler = logging.StreamHandler()
    handler.setFormatter(make_formatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main_rank() else logging.WARNING)
    logger.propagate = False
    return logger


def make_formatter() -> logging.Formatter:
    """Return the form of a log line; coloured only on a terminal."""
    plain = logging.Formatter("[%(asctime)-15s] [%(levelname)8s] - %(message)s")
    if sys.stderr is None or not sys.stderr.isatty():
        return plain
    try:
        import colorlog
    except ImportError:  # the environments of deploy/ do without
        return plain
    colours = {"INFO": "green", "TRAIN": "cyan", "EVAL": "blue", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold_red"}
    return colorlog.ColoredFormatter("%(log_color)s[%(asctime)-15s] [%(levelname)8s]%(reset)s - %(message)s", log_colors=colours)


def log_everything(wanted: bool) -> None:
    """Let the log say all that PaddleNLP and the suite have to say, or the stages of the work and warnings alone."""
    logging.getLogger("PaddleNLP").setLevel(logging.DEBUG if wanted else logging.WARNING)
    get_logger().setLevel(logging.DEBUG if wanted else logging.INFO if is_main_rank() else logging.WARNING)


@contextlib.contextmanager
def only_warnings() -> Iterator[None]:
    """Leave out of the log what is neither warning nor error, unless it says everything."""
    earlier = get_logger().level
    get_logger().setLevel(earlier if earlier == logging.DEBUG else logging.WARNING)
    try:
        yield
    finally:
        get_logger().setLevel(earlier)


@contextlib.contextmanager
def library_log(level: int) -> Iterator[None]:
    """Let PaddleNLP's log also say what is of this level."""
    library = logging.getLogger("PaddleNLP")
    earlier = library.level
    library.setLevel(min(level, earlier))
    try:
        yield
    finally:
        library.setLevel(earlier)


@contextlib.contextmanager
def leaving_out(words: str) -> Iterator[None]:
    """Keep from PaddleNLP's log what has these words in it."""
    library = logging.getLogger("PaddleNLP")

    def is_said(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    library.addFilter(is_said)
    try:
        yield
    finally:
        library.removeFilter(is_said)


def say_next(script: str, *options: str) -> None:
    """Log the command that a user will want to type next, unless another script has run this one."""
    if NESTED not in os.environ:
        get_logger().info(f"Next: python {shlex.join([script, *options])}")


def progress_bar(total: Optional[int], description: str, unit: str = "texts", leave: bool = False, disable: bool = False,
                 initial: int = 0) -> "Progress":
    """A context manager that shows how far long work has got; call its update(n) as units are done, from any thread.

    On a terminal a tqdm bar. Elsewhere, where a bar would fill the log, a plain line every tenth of the work or 30 s.
    total: number of units, or None where it is not known; initial: how many were done before.
    """
    if disable or (sys.stderr is not None and sys.stderr.isatty()):
        from tqdm import tqdm

        return tqdm(total=total, desc=description, unit=f" {unit}", delay=2, leave=leave, disable=disable, initial=initial)
    return PlainProgress(total, description, unit, initial)


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

    def __init__(self, total: Optional[int], description: str, unit: str, initial: int):
        self.total, self.description, self.unit, self.initial = total, description, unit, initial
        self.done, self.lock, self.start = initial, threading.Lock(), time.monotonic()
        self.said, self.next = self.start, initial + (total or 0) / 10  # when the last line came, and where the next one is due

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
                left = f", {self.describe_rest(self.total - self.done)} left" if self.total and self.done < self.total else ""
                get_logger().info(f"{self.description}: {self.done}{of} {self.unit}{left}")
                self.said, self.next = time.monotonic(), self.done + (self.total or 0) / 10

    def describe_rest(self, rest: int) -> str:
        """Say how long the rest of the units will take at the speed so far."""
        return describe_seconds((time.monotonic() - self.start) / (self.done - self.initial) * rest)


def describe_seconds(seconds: float) -> str:
    """Seconds as a person would say them: 45 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
