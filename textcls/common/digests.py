"""Digests that tell contents apart: of files, bytes and labelled rows."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from textcls.common.errors import UserError
from textcls.common.stored_texts import StoredTexts, sort_texts

DIGITS = 16  # hexadecimal ones of an id, the first of a SHA-256


def sha256(path: str) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits. UserError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a file") from None
    return digest.hexdigest()


def file_id(path: str) -> str:
    """Name the content of a file: DIGITS of its `sha256`. UserError."""
    return sha256(path)[:DIGITS]


def content_id(content: bytes) -> str:
    """Name a content: the first DIGITS of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def rows_id(texts: Sequence[str], label_ids: np.ndarray, in_order: bool = False) -> str:
    """Name labelled rows. label_ids: int64 [num_rows]; in_order: rows in another order have another name."""
    lines: Iterable[str] = (f"{label_id}\t{text}" for text, label_id in zip(texts, map(int, label_ids)))
    if not in_order:
        lines = sort_texts(lines, texts.folder) if isinstance(texts, StoredTexts) else sorted(lines)
    digest, separator = hashlib.sha256(), ""
    for line in lines:
        digest.update(f"{separator}{line}".encode("utf-8", "surrogatepass"))
        separator = "\n"
    return digest.hexdigest()[:DIGITS]
