"""Servers under load, for the tests and the benchmarks: a server in a process of its own, and many clients at once. No script."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Union

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


def encode(text, top_k=1):
    """The HTTP request of one text."""
    return encode_body("/predict", {"data": {"text": [text]}, "parameters": {"top_k": top_k}})


def encode_body(path, content):
    """The HTTP request that posts an object as JSON."""
    body = json.dumps(content).encode()
    return b"POST %b HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        path.encode(), len(body), body)


class Client(asyncio.Protocol):
    """One keep-alive connection. outcome: None for a connection that ended, else (status, body)."""

    def __init__(self):
        self.buffer, self.answer, self.closing = b"", None, False

    def connection_made(self, transport):
        self.transport = transport

    def ask(self, request):
        """Send a request; returns a future of (status, body), or of None where the connection ends without an answer."""
        self.answer = asyncio.get_running_loop().create_future()
        if self.closing:
            self.answer.set_result(None)
        else:
            self.transport.write(request)
        return self.answer

    def data_received(self, data):
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if found:
            head = head.lower()
            length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            if len(body) >= length:
                self.buffer = body[length:]
                self.closing = b"connection: close" in head
                if self.answer is not None and not self.answer.done():  # else it breaks the connection off
                    self.answer.set_result((int(head.split(b" ", 2)[1]), body[:length]))

    def connection_lost(self, error):
        self.closing = True
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(None)


async def drive(port, clients, work, on_answer, keep_alive=True):
    """Let `clients` clients work at once: each takes an item of the iterator `work`, (key, request), waits for the answer,
    gives it to on_answer(key, status or None where there was none, body, seconds), and takes the next.

    Ends when the work is done, or when the server takes no connections any more. Returns how many requests found none.
    """
    loop, refused = asyncio.get_running_loop(), 0

    async def client():
        nonlocal refused
        connection = None
        for key, request in work:
            if connection is None or connection.closing or not keep_alive:
                if connection is not None:
                    connection.transport.close()
                try:
                    _, connection = await loop.create_connection(Client, "127.0.0.1", port)
                except OSError:
                    refused += 1
                    return
            start = time.perf_counter()
            outcome = await connection.ask(request)
            on_answer(key, *(outcome or (None, b"")), time.perf_counter() - start)
        if connection is not None:
            connection.transport.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return refused


def ask_all(port: int, clients: int, requests: Iterable[tuple[Any, bytes]],
            run: Callable = asyncio.run) -> tuple[list[tuple], float]:
    """Ask a server all requests, (key, request), by `clients` clients at once. Returns [(key, body, seconds)] in the order of the
    answers, all of status 200, and the requests per second. run: what runs a coroutine."""
    answers = []

    def on_answer(key, status, body, seconds):
        assert status == 200, f"status {status}: {body}"
        answers.append((key, body, seconds))

    start = time.perf_counter()
    run(drive(port, clients, iter(requests), on_answer))
    return answers, len(answers) / (time.perf_counter() - start)
