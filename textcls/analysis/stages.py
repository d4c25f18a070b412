"""Stages of a longer work: commands of the suite run one after the other, each with a log and one line of output."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

from textcls.analysis.experiments import ROOT
from textcls.common.errors import UserError
from textcls.common.log import describe_seconds

LEFT = re.compile(r", (\d[\d.]* (?:s|min|h)) left$", re.MULTILINE)  # of the suite's lines of progress
LOG_LINE = re.compile(r'\[\d{4}-|\+ python |warning: |{"time": ')  # how a line of a stage begins that is no error
QUIET_SECONDS = 30  # between two remaining times where there is no terminal


class Stage(NamedTuple):
    name: str  # of its log, too
    made: str  # the file that is there when it is done, and not before
    words: list[str]  # script and options


@contextlib.contextmanager
def running(words: Sequence[str], output: IO, errors: IO) -> Iterator[subprocess.Popen]:
    """Run a command in the block; where that ends before it, such as by Ctrl-C, end the command, and wait until it has."""
    # a session of its own: Ctrl-C reaches this process alone, which lets the command end in order
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def read_end(path: str, start: int = 0) -> str:
    """Read what has been added to a file since it had `start` bytes, but no more than the last 64 KiB."""
    with open(path, "rb") as file:
        file.seek(max(start, os.path.getsize(path) - (1 << 16)))
        return file.read().decode("utf-8", "replace")


def follow(process: subprocess.Popen, title: str, log: str, start: int) -> int:
    """Print the remaining time that a stage's log says until it ends: on a terminal in place, else behind the title.

    Returns the exit code.
    """
    said, due, is_terminal = "", 0.0, sys.stdout.isatty()
    print(f"{title} ...", end="", flush=True)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.2)
        left = LEFT.findall(read_end(log, start))
        if left and left[-1] != said and (is_terminal or time.monotonic() >= due):
            said, due = left[-1], time.monotonic() + QUIET_SECONDS
            print(f"\r\033[K{title} ... {said} left" if is_terminal else f" {said} left ...", end="", flush=True)


def explain_failure(code: int, log: str, start: int = 0) -> str:
    """Say why a command failed: what it has said to the user, in its own words, else its last line and its log."""
    lines = [line for line in read_end(log, start).splitlines() if line.strip()]
    said = [line for line in lines if not LOG_LINE.match(line)]
    if code == 2 and said:
        return "\n".join(said)
    last = f" ({lines[-1]})" if lines else ""
    return f"{log}: ends with exit code {code}{last}, expected 0; the same command goes on from there"


def run_stage(title: str, stage: Stage, logs: str) -> None:
    """Run a stage unless what it makes is there, and print one line. logs: the folder of its log. UserError where it fails."""
    if os.path.exists(stage.made):
        print(f"{title}: {stage.made} is there", flush=True)
        return
    os.makedirs(logs, exist_ok=True)
    log, begun = os.path.join(logs, f"{stage.name}.log"), time.monotonic()
    script, *options = stage.words
    again = f"\r\033[K{title} ... " if sys.stdout.isatty() else " "
    with open(log, "a", encoding="utf-8") as errors, open(os.path.join(logs, f"{stage.name}.out"), "a") as output:
        start = os.path.getsize(log)
        errors.write(f"+ python {shlex.join(stage.words)}\n")
        errors.flush()
        with running([sys.executable, str(ROOT / script), *options], output, errors) as process:
            try:
                code = follow(process, title, log, start)
            except BaseException:
                print(flush=True)  # ends the line
                raise
    print(f"{again}{'failed' if code else 'done in ' + describe_seconds(time.monotonic() - begun)}", flush=True)
    if code:
        raise UserError(explain_failure(code, log, start))
