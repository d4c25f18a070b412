"""Errors that the user can mend: one at a time, or all problems of the files at once; and how a script ends."""

import contextlib
import difflib
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, Optional

MAX_REPORTED = 20  # problems printed in full; the rest are only counted
TERMINATED = 143  # exit code of a process that SIGTERM has ended
LOST = 3  # exit code of a process of several, where another one is gone
CONNECTION_LOST = "the connection to another process of this run is lost"


def is_main_rank() -> bool:
    """Return True in a single process and in the first of several, on all hosts together."""
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def speaks_for_host() -> bool:
    """Return True in one process of each host: what goes wrong on a host alone has to be said there."""
    return os.environ.get("PADDLE_RANK_IN_NODE", os.environ.get("PADDLE_TRAINER_ID", "0")) == "0"


def count_ranks() -> int:
    """Return how many processes work together."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", 1))


class UserError(Exception):
    """Something the user can mend. Printed without a traceback; the exit code is 2."""


def run_script(main: Callable[[], object]) -> None:
    """Run a script's main(): UserError is printed and ends the process with code 2, Ctrl-C with 130, SIGTERM with 143, and where
    another process of a run is gone with LOST.

    SIGTERM ends it as an exception would, so that unfinished files are removed. What the script prints is UTF-8, whatever the
    terminal says that it can show: an ASCII one would end the script at the first Chinese text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    exit_on_sigterm()
    try:
        main()
    except UserError as error:
        if speaks_for_host():
            print(error, file=sys.stderr)
        end_process(2)
    except BrokenPipeError:
        os._exit(1)  # the reader of our output has gone; anything more to write would fail again
    except MemoryError as error:
        print(f"out of memory ({error}), expected a smaller model, fewer texts at once or more memory", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # disk full, no permission, a folder in place of a file
        place = error.filename or "writing failed"
        if error.errno == errno.ENOSPC and error.filename2:
            place = error.filename2  # of a copy it is the second file that cannot be written
        reason = error.strerror or " ".join(map(str, error.args))  # NumPy's have no strerror
        print(f"{place}: {reason}, expected a file that can be read or written and free space", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, ImportError) as error:
        if not is_interrupt(error):
            raise
        end_interrupted()
    except SystemExit as error:
        if error.code == TERMINATED:
            print("Terminated.", file=sys.stderr)
        raise
    except RuntimeError as error:
        if count_ranks() == 1 or not re.search("gloo|tcp", str(error), re.IGNORECASE):
            raise
        print(f"{CONNECTION_LOST} ({str(error).strip().splitlines()[-1]}), expected all of them to run until the end",
              file=sys.stderr)
        end_process(LOST)
    if is_connected():
        end_process(0)


def is_connected() -> bool:
    """Tell whether Paddle has connected this process with others."""
    paddle = sys.modules.get("paddle")
    return count_ranks() > 1 and paddle is not None and paddle.distributed.is_initialized()


def end_process(code: int) -> NoReturn:
    """End with an exit code; one that Paddle has connected with others without more ado: 2.6.2 with gloo now and then crashes, or
    waits for the others, while it shuts down."""
    if not is_connected():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C in the block, such as imports that take seconds, end the process in a line, with code 130.

    What is imported may swallow a KeyboardInterrupt, or make an ImportError of it: so it is noted when it comes.
    """
    was_interrupted, before = False, signal.getsignal(signal.SIGINT)

    def interrupt(*_: object) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        raise KeyboardInterrupt

    is_handled = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    try:
        if is_handled:
            signal.signal(signal.SIGINT, interrupt)
        yield
    except (KeyboardInterrupt, ImportError) as error:
        if not (was_interrupted or is_interrupt(error)):
            raise
        was_interrupted = True
    finally:
        if is_handled:
            signal.signal(signal.SIGINT, before)
    if was_interrupted:
        end_interrupted()


def is_interrupt(error: BaseException) -> bool:
    """Tell whether Ctrl-C is behind an error: an import in C++ makes an ImportError of it."""
    reason: Optional[BaseException] = error
    while reason is not None and not isinstance(reason, KeyboardInterrupt):
        reason = reason.__cause__ or reason.__context__
    return reason is not None


def end_interrupted() -> NoReturn:
    """End the process as Ctrl-C does."""
    print("Interrupted.", file=sys.stderr)
    sys.exit(130)


def exit_on_sigterm() -> None:
    """Let SIGTERM, and SIGHUP unless nohup has it ignored, end the process as an exception would.

    To be called once more after importing what takes these signals over (textcls.models.paddle_setup puts them back itself).
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))


@contextlib.contextmanager
def needs_packages(requirements: str) -> Iterator[None]:
    """End the process with code 2 where an import in the block fails. requirements: the file whose packages are needed."""
    try:
        with interruptible():
            yield
    except ImportError as error:
        print(f"the package {error.name} is missing, expected `pip install -r {requirements}`", file=sys.stderr)
        sys.exit(2)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Return " (did you mean ...?)" with the one of `names` that is most like `name`; "" where none is."""
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_name(name: str, names: Sequence[str], wrong: str) -> None:
    """Raise UserError if `name` is not among `names`."""
    if name not in names:
        raise UserError(f"{wrong} {name!r}{did_you_mean(name, names)}, expected one of {', '.join(map(repr, names))}")


class Problems:
    """Collects what is wrong in the user's files, so that all of it is reported at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []  # of the first MAX_REPORTED errors
        self.count = 0  # of all errors
        self.warnings: list[str] = []  # the first MAX_REPORTED
        self.num_warnings = 0  # of all of them

    def add(self, path: str, line: Optional[int], wrong: str, expected: str) -> None:
        """Note `path:line: wrong, expected ...`; line is 1-based, or None for the file as a whole."""
        self.count += 1
        if self.count <= MAX_REPORTED:
            self.lines.append(f"{path}:{line}: {wrong}, expected {expected}" if line else
                              f"{path}: {wrong}, expected {expected}")

    def warn(self, path: str, line: Optional[int], wrong: str, expected: str) -> None:
        """Note something that is reported but does not stop the run."""
        self.num_warnings += 1
        if self.num_warnings <= MAX_REPORTED:
            self.warnings.append(f"warning: {path}:{line}: {wrong}, expected {expected}" if line else
                                 f"warning: {path}: {wrong}, expected {expected}")

    def report(self) -> None:
        """Print the warnings; raise UserError if there were errors."""
        if self.warnings and is_main_rank():
            more = self.num_warnings - len(self.warnings)
            print("\n".join(self.warnings + ([f"... and {more} more warnings"] if more else [])), file=sys.stderr)
        self.warnings, self.num_warnings = [], 0
        if self.count:
            total = f"{self.count} problem{'s' if self.count > 1 else ''} found"
            if self.count > MAX_REPORTED:
                total += f", the first {MAX_REPORTED} are shown"
            raise UserError("\n".join(self.lines + [total + "."]))
