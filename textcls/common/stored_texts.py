"""Texts in a temporary file that are read like those of a list: of each, memory holds twelve bytes."""

import array
import heapq
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Union, cast, overload

import numpy as np

from textcls.common.errors import UserError
from textcls.common.outputs import nearest_folder

PART = 1 << 16  # texts that are in memory at a time
BUFFER = 1 << 10  # bytes: more would be read in vain where the texts of shuffled rows are read


class StoredTexts(Sequence[str]):
    """Texts of a file. A slice, or an array of their numbers, gives StoredTexts of the same file.

    file: that holds them in UTF-8; starts: int64 [num_texts], in bytes; sizes: int32 [num_texts], in bytes; folder: for other
    temporary files.
    """

    def __init__(self, file: BinaryIO, starts: np.ndarray, sizes: np.ndarray, folder: str):
        self.file, self.starts, self.sizes, self.folder = file, starts, sizes, folder

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> str:
        ...

    @overload
    def __getitem__(self, index: Union[slice, np.ndarray]) -> "StoredTexts":
        ...

    def __getitem__(self, index: Union[int, slice, np.ndarray]) -> Union[str, "StoredTexts"]:
        if isinstance(index, (slice, np.ndarray)):
            return StoredTexts(self.file, self.starts[index], self.sizes[index], self.folder)
        return self._read(int(self.starts[index]), int(self.sizes[index]))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), PART):
            part = slice(start, start + PART)
            yield from map(self._read, self.starts[part].tolist(), self.sizes[part].tolist())

    def _read(self, start: int, size: int) -> str:
        self.file.seek(start)  # costs nothing where the buffer has what follows
        return self.file.read(size).decode("utf-8", "surrogatepass")


def store_texts(texts: Iterable[str], folder: str) -> StoredTexts:
    """Write texts into a temporary file of a folder, or of the nearest one above it that is there. UserError where it is full.

    The file has no name there, so that nothing of it is left however the process ends.
    """
    file = cast(BinaryIO, tempfile.TemporaryFile(buffering=BUFFER, dir=nearest_folder(os.path.abspath(folder))))
    sizes = array.array("i")
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        sizes.append(len(content))
        try:
            file.write(content)
        except OSError as error:
            raise _not_written(folder, error) from None
    try:
        file.flush()
    except OSError as error:
        raise _not_written(folder, error) from None
    lengths = np.array(sizes, np.int32)
    return StoredTexts(file, np.cumsum(lengths, dtype=np.int64) - lengths, lengths, folder)


def _not_written(folder: str, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be written ({error.strerror}), expected a writable folder")


def sort_texts(texts: Iterable[str], folder: str) -> Iterator[str]:
    """Yield texts in the order of `sorted`: parts of them are sorted, stored in temporary files of a folder, and merged."""
    rest, parts = iter(texts), []
    while part := sorted(itertools.islice(rest, PART)):
        parts.append(store_texts(part, folder))
    return heapq.merge(*parts)
