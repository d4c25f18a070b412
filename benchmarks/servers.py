"""Servers that the benchmarks start and end: a command whose log says when it listens, and deploy/simple_serving. No script."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Union

from measuring import ROOT

DEPLOY = ROOT / "deploy"


@contextlib.contextmanager
def running(command: list, log: Path, ready: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run a server; gives its process and its log up to the text `ready`. The script ends where the server does."""
    with open(log, "w", encoding="utf-8") as stderr:
        process = subprocess.Popen(list(map(str, command)), stderr=stderr)
    try:
        while ready not in (content := log.read_text(encoding="utf-8", errors="replace")):
            if process.poll() is not None:
                sys.exit(content)
            time.sleep(0.1)
        yield process, content
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def simple_serving(python: Union[str, Path], folder: Path, *options: Union[str, Path]) -> Iterator[tuple[subprocess.Popen, int]]:
    """Run deploy/simple_serving with its log in a folder; gives its process and port."""
    command = [python, DEPLOY / "simple_serving/server.py", "--port", "0", *options]
    with running(command, folder / "simple.log", '"listening"') as (process, content):
        yield process, int(json.loads(content.split("\n")[0])["url"].rsplit(":", 1)[1])
