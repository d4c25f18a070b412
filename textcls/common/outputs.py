"""Output files and folders: checked before the work, under their final names only when they are complete."""

import contextlib
import gzip
import io
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Optional, cast

from textcls.common.errors import UserError

GZIP = ".gz"  # how the names of files end that are compressed
STAGING = ".staging"  # how the names of folders begin that are not finished
MARKERS = {"config.json": "of a model", "model_config.json": "of an older model", "deploy.json": "of an exported model",
           "index.json": "of an index"}
MODEL_PARTS = re.compile(r"vocab\.txt|(tokenizer|special_tokens|added_tokens).*json|sentencepiece.*|.+\.(pdmodel|pdiparams|onnx)")
DATA_FILES = ("train.txt", "dev.txt", "test.txt", "label.txt", "data.txt")  # no script may overwrite these


def check_output(output: str, inputs: Iterable[str], dataset_dir: str) -> None:
    """Raise UserError where an output file could not be written, or would replace an input or a data file of dataset_dir.

    inputs: files, and folders all of whose files count.
    """
    if not output or os.path.isdir(output):
        raise UserError(f"{output or 'the output file'}: is a folder or without a name, expected the name of a file")
    check_writable(output, os.path.dirname(os.path.abspath(output)))
    output, written = os.path.realpath(output), output
    for path in map(os.path.realpath, inputs):
        if output == path or (os.path.isfile(output) and os.path.dirname(output) == path):
            raise UserError(f"{written}: is an input of this run, expected another name for the output")
    if output in [os.path.realpath(os.path.join(dataset_dir, name)) for name in DATA_FILES]:
        raise UserError(f"{written}: is a data file, expected another name for the output")


def check_outputs(outputs: Sequence[str], inputs: Sequence[str], dataset_dir: str) -> None:
    """Do as `check_output` for several output files, which may not be each other."""
    for position, output in enumerate(outputs):
        check_output(output, inputs, dataset_dir)
        if os.path.realpath(output) in map(os.path.realpath, outputs[:position]):
            raise UserError(f"{output}: named for two outputs, expected different files")


def check_output_folder(path: str, option: str, inputs: Optional[dict[str, str]] = None, marker: Optional[str] = None) -> None:
    """Raise UserError where the output folder that an option names could not be made or written to, or would cost the user files.

    inputs: {what is read: its path}; none of them may be the folder. marker: of `complete_folder`, for folders whose files are
    replaced: they may not be the working folder or one above it, nor hold data files or an output of another kind. A label.txt
    or a part of a model, which would be replaced, may only be there if an earlier output has left it.
    """
    if not path or (os.path.exists(path) and not os.path.isdir(path)):
        raise UserError(f"{option} {path}: is no folder, expected the name of one, new or old")
    check_writable(f"{option} {path}", os.path.abspath(path))
    if not os.path.isdir(path):
        return
    for what, source in (inputs or {}).items():
        if os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f"{option} {path}: is {what}, expected another one")
    if marker is None:
        return
    if os.path.realpath(path) in map(str, [Path.cwd(), *Path.cwd().parents]):
        raise UserError(f"{option} {path}: is the working folder or above it, expected a folder for the output alone")
    names = os.listdir(path)
    own = {marker, "model_config.json"} if marker == "config.json" else {marker}
    is_ours = bool(own.intersection(names)) or any(name.startswith(STAGING) for name in names)
    parts = set() if is_ours else set(filter(MODEL_PARTS.fullmatch, names))
    foreign = sorted({*DATA_FILES, *MARKERS, *parts}.intersection(names) - own - ({"label.txt"} if is_ours else set()))
    if foreign:
        what = "a data file" if foreign[0] in DATA_FILES else MARKERS.get(foreign[0], "a part of a model")
        raise UserError(f"{option} {path}: holds {foreign[0]}, {what}, expected a folder for the output alone")


def nearest_folder(folder: str) -> str:
    """Return a folder, or the nearest one above it that is there: folders are made where they are missing."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder


def check_writable(output: str, folder: str) -> None:
    """Raise UserError where an output cannot be written in a folder, or in the nearest one above it that is there."""
    folder = nearest_folder(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{output}: cannot be written in {folder}, expected a folder with write permission")


def lock_folder(folder: str, option: str = "--output_dir") -> Optional[int]:
    """Make a folder this process's own until it ends, or closes what is returned, a file descriptor. Linux, macOS; else None.

    option: that would name another folder. UserError while another run works in it.
    """
    os.makedirs(folder, exist_ok=True)
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except BlockingIOError:
        raise UserError(f"{folder}: another run is writing there, expected another {option}, or its end") from None
    except ImportError:
        return None  # Windows has no such lock


@contextlib.contextmanager
def locked_folder(folder: str) -> Iterator[None]:
    """Make a folder this process's own in the block, as `lock_folder` does."""
    handle = lock_folder(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def is_gzip(path: str) -> bool:
    """Tell a compressed file by its name."""
    return str(path).lower().endswith(GZIP)


def plain_ending(path: str) -> str:
    """Return the ending of a file's name in lower case, before .gz if it ends in that."""
    return Path(str(path)[:-len(GZIP)] if is_gzip(path) else path).suffix.lower()


def is_stream(path: str) -> bool:
    """Return True for a pipe or device, which can be neither replaced nor read twice."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextlib.contextmanager
def named_in_errors(path: str) -> Iterator[None]:
    """Name the output that is being written in errors that name no file, such as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


@contextlib.contextmanager
def complete_file(path: str, mode: str = "w", newline: Optional[str] = None) -> Iterator[IO]:
    """Open a temporary file beside `path` for writing; it gets its final name only when the block ends well. What is written is
    compressed where `path` ends in .gz.
    """
    path = os.path.realpath(path)  # a link stays, and what it leads to is written
    if is_stream(path):
        with open(path, mode, encoding=None if "b" in mode else "utf-8", newline=newline) as output:
            yield output
        return
    part = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}.part")
    try:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            output = open_part(part, is_gzip(path), mode, newline)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}), expected a writable folder") from None
        with named_in_errors(path), output:
            yield output
        os.replace(part, path)
    except BaseException:  # Ctrl-C and SIGTERM too, which are no Exception
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def open_part(part: str, is_compressed: bool, mode: str, newline: Optional[str]) -> IO:
    """Open the temporary file of `complete_file`."""
    encoding = None if "b" in mode else "utf-8"
    if not is_compressed:
        return open(part, mode, encoding=encoding, newline=newline)
    output = GzipOutput(part)
    return cast(IO, output if "b" in mode else io.TextIOWrapper(output, encoding=encoding, newline=newline))


class GzipOutput(gzip.GzipFile):
    """A new compressed file. It holds no name and no time: the same content gives the same bytes."""

    def __init__(self, path: str):
        self.file = open(path, "wb")
        super().__init__("", "wb", 6, self.file, mtime=0)  # 6: as the command gzip does; 9, the default here, takes twice as long

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.file.close()


@contextlib.contextmanager
def complete_folder(path: str, marker: str) -> Iterator[str]:
    """Make a temporary folder; when the block ends well its files and folders move into `path`, the file `marker` last.

    The old marker is removed first: a folder that holds its marker is complete, whenever the process may be killed.
    """
    if not path:
        raise UserError("the name of the output folder is empty, expected a name")
    path = os.path.abspath(path)
    is_new = not os.path.isdir(path)
    try:
        os.makedirs(path, exist_ok=True)
        staging = tempfile.mkdtemp(prefix=f"{STAGING}-", dir=path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}), expected a writable folder") from None
    try:
        with named_in_errors(path):
            yield staging
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(path, marker))
        for name in sorted(os.listdir(staging), key=lambda name: (name == marker, name)):
            target = os.path.join(path, name)
            if os.path.isdir(target):
                shutil.rmtree(target)
            os.replace(os.path.join(staging, name), target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(path)  # stays where it holds the result


def write_labels(path: str, labels: Sequence[str]) -> None:
    """Write a label.txt. labels: list of str, position = class id."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(label + "\n" for label in labels)
