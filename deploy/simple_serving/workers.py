"""Several server processes on one port: started, started again where one dies, and ended together."""

import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Callable, NamedTuple

from prometheus_client.multiprocess import mark_process_dead

from textcls.common.errors import TERMINATED, run_script

RESTART_SECONDS = 1.0  # before a dead worker is started again
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # names prometheus_client's folder, in which the metrics of all workers are added up
logger = logging.getLogger("serving")


class Worker(NamedTuple):
    """A process, and the end of a pipe that brings its figures once it is ready."""

    process: SpawnProcess
    ready: Connection


class Workers:
    """Server processes, one for each of some listening sockets.

    All sockets have one address (SO_REUSEPORT): the system shares new connections out. They stay open here, so that what the
    socket of a dead worker gets waits for the next one.

    serve: function of (on_ready, socket, *arguments) at the top level of a module, called in each process: it serves until
    SIGTERM and gives its figures to on_ready once it can.
    """

    def __init__(self, serve: Callable[..., Any], sockets: list[socket.socket], *arguments: Any) -> None:
        self.serve, self.sockets, self.arguments = serve, sockets, arguments
        self.context = multiprocessing.get_context("spawn")  # not fork: libraries have threads
        self.running: dict[int, Worker] = {}  # number of its socket -> worker
        self.is_ending = False

    def run(self, on_ready: Callable[[dict[str, Any]], None]) -> int:
        """Run the workers until a signal ends them; returns the exit code.

        on_ready: called with a worker's figures when all are ready. Where one fails before that, all end, with its exit code. The
        first one starts alone: what it converts the others find.
        """
        with tempfile.TemporaryDirectory(prefix="serving-metrics-") as folder:
            os.environ[METRICS_FOLDER] = folder
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    signal.signal(number, self.end)
            for numbers in [0], range(1, len(self.sockets)):
                for number in numbers:
                    self.start(number)
                for number in numbers:
                    try:
                        figures = self.running[number].ready.recv()
                    except EOFError:  # it has ended instead, and said why
                        failed = self.running[number].process
                        failed.join()
                        self.end()
                        self.watch()
                        return exit_code(failed)
            on_ready(figures)
            return self.watch()

    def start(self, number: int) -> None:
        """Start the worker of a socket."""
        ready, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=run_worker, args=(self.serve, theirs, self.sockets[number], self.arguments))
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the new process inherits it: Ctrl-C is for this one
        process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()
        self.running[number] = Worker(process, ready)
        if self.is_ending:  # since a moment ago
            process.terminate()

    def watch(self) -> int:
        """Start workers that die again, until all have ended; returns the exit code of one that has failed in that, or 0."""
        code = 0
        while self.running:
            wait([worker.process.sentinel for worker in self.running.values()])
            for number, (process, ready) in list(self.running.items()):
                if process.exitcode is None:
                    continue
                ready.close()
                mark_process_dead(process.pid)
                if self.is_ending:
                    if exit_code(process) != TERMINATED:  # not yet ready
                        code = exit_code(process) or code
                    del self.running[number]
                else:
                    logger.error("a worker (process %d) has ended with code %d and is started again", process.pid,
                                 exit_code(process))
                    time.sleep(RESTART_SECONDS)
                    self.start(number)
        return code

    def end(self, *_: object) -> None:
        """End all workers, called a second time at once. For signals, too."""
        self.is_ending = True
        for worker in self.running.values():
            worker.process.terminate()


def exit_code(process: SpawnProcess) -> int:
    """Return the exit code of a process that has ended, as shells give it: 128 + the signal that has killed it."""
    code = process.exitcode or 0
    return code if code >= 0 else 128 - code


def run_worker(serve: Callable[..., Any], ready: Connection, listening: socket.socket, arguments: tuple) -> None:
    """Serve, as a worker: in a process group of its own, so that a terminal's signals go to the parent only, and no longer than
    the parent lives."""
    os.setpgrp()
    threading.Thread(target=end_with_parent, daemon=True).start()

    def on_ready(figures):
        ready.send(figures)
        ready.close()

    run_script(lambda: serve(on_ready, listening, *arguments))


def end_with_parent() -> None:
    """Wait for the end of the parent, then end this process as a signal does."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
