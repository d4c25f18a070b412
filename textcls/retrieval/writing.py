"""Index folders written whole, and what every change of one ends with. Needs no Paddle.

index.json names everything else by random names and is replaced as the last step of each change: whenever a process may be
killed, the old or the new index opens, and who has the old one open keeps it.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.outputs import complete_file, named_in_errors
from textcls.data.files import read_json
from textcls.retrieval.head import Head
from textcls.retrieval.index import FORMAT, MARKER, PARTS, SearchIndex, Segment, Stamp, assemble, index_stamp, open_index
from textcls.retrieval.nearest import TYPES, WantedType, build_approximate
from textcls.retrieval.pending import Pending, is_pending, no_changes, settle
from textcls.retrieval.rows import BLOCK, NewRows, make_segment


class OutdatedIndex(Exception):
    """Another process has changed what a change was prepared for: prepare it again."""


def new_header(encoder_id: str, dimension: int, corpus: str, labels: list[tuple[str, list[str]]], dtype: str = "float32",
               prefixes: tuple[str, str] = ("", "")) -> dict:
    """The index.json of a new index, with the settings that hold where no dev texts say better.

    labels: list of (name, descriptions and synonyms). prefixes: what was put before the texts that are asked about, and before
    those of the rows.
    """
    entries = [{"id": number, "name": name, "texts": texts} for number, (name, texts) in enumerate(labels)]
    return {"format": FORMAT, "encoder_id": encoder_id, "dimension": dimension, "metric": "cosine", "dtype": dtype,
            "prefixes": dict(zip(("query", "text"), prefixes)), "corpus": corpus, "labels": entries, "next_id": len(labels),
            "segments": [],
            **dict.fromkeys(TYPES), "vote": {"neighbours": 20, "temperature": 0.05, "sharpness": 1.0, "least_rows": 20},
            "lexical": {"weight": 0.3, "neighbours": 20, "temperature": 0.1}, "known": None, "head": None,
            "threshold": None, "pending": no_changes()}


def memory_index(header: dict, rows: NewRows) -> SearchIndex:
    """An index of NewRows that is in no folder yet: SearchIndex. header: of `new_header`."""
    return assemble("", header, None, [make_segment(rows, None)])


def read_pending(folder: str) -> Optional[Pending]:
    """The changes since the index in a folder was built, those of none where there is no index, None where they are not known."""
    path = os.path.join(folder, MARKER)
    header = read_json(path) if os.path.exists(path) else {}
    pending = header.get("pending", None if header.get("changed") else no_changes())
    if not is_pending(pending):
        raise UserError(f"{path}: pending is damaged, expected what index.py wrote")
    return pending


def write_index(folder: str, index: SearchIndex, wanted: Optional[WantedType] = None,
                pending: Optional[Pending] = None) -> dict:
    """Write a `memory_index` into a folder, in place of what index may be there. wanted: of `wanted_type`.

    Returns its index.json. pending: what the index was made in view of; UserError where the folder has another one by now.
    """
    with changing(folder):
        if pending is not None and read_pending(folder) != pending:
            raise UserError(f"{folder}: was changed by index.py meanwhile, which the new index would lack, expected the same "
                            "command again")
        header = {**index.header, "segments": [write_segment(folder, index.header, index.segments[0])]}
        if index.head is not None:
            header["head"] = {**header["head"], "folder": write_head(folder, header, index.head)}
        if wanted is not None and len(index.row_labels) > wanted.beyond:
            header[wanted.name] = build_approximate(folder, index, wanted)
        return write_header(folder, header, changed=header["pending"] != no_changes())


@contextlib.contextmanager
def settling(index: SearchIndex) -> Iterator[None]:
    """Note that the block has written the changes of an index into the data files, which no other process can change meanwhile.

    OutdatedIndex where it has changed since it was opened.
    """
    with changing(index.folder):
        if index_stamp(index.folder) != index.stamp:
            raise OutdatedIndex
        yield
        write_header(index.folder, {**index.header, "pending": settle(index.header["pending"])},
                     index.header.get("changed", False))


def replace_index(folder: str, source: str, seen: Stamp, kept: str) -> dict:
    """Put the index of the folder source in place of the one in folder, of which a copy goes to the folder kept.

    seen: stamp of the index to replace; OutdatedIndex where it has changed since. Returns the new index.json.
    """
    with changing(folder):
        if index_stamp(folder) != seen:
            raise OutdatedIndex
        copy_files(folder, kept)
        header = open_index(source).header
        for name in parts(header) - parts(open_index(folder, to_search=False).header):  # what is in use is never written over
            path, target = os.path.join(source, name), os.path.join(folder, name)
            if os.path.isdir(path):
                shutil.copytree(path, target, dirs_exist_ok=True)  # a killed process may have begun it
            else:
                shutil.copyfile(path, target)
        return write_header(folder, header, header["changed"])


def copy_index(folder: str, copy: str) -> Stamp:
    """Copy an index to a folder, in place of what is there. Returns its stamp. UserError."""
    with changing(folder):
        stamp = index_stamp(folder)
        copy_files(folder, copy)
    return stamp


def copy_files(folder: str, copy: str) -> None:
    """Copy an index, which no other process may change meanwhile; the copy appears when it is complete."""
    part = f"{copy}.part"
    for path in (part, copy):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns(".*"))
    os.replace(part, copy)


def write_segment(folder: str, header: dict, segment: Segment) -> dict:
    """Write a Segment of float32 as a new folder; returns its entry of index.json. header: says the dtype and the corpus."""
    name, dtype = f"segment-{secrets.token_hex(8)}", header["dtype"]
    path = os.path.join(folder, name)
    os.mkdir(path)
    arrays = {**{name: getattr(segment, name) for name in ("label_ids", "sum_ids", "sums", "text_offsets")},
              **{f"lexical_{part}": values for part, values in segment.postings._asdict().items()}}
    if header["corpus"] == "means":
        arrays.update(counts=segment.counts.astype(np.int32), lengths=segment.lengths.astype(np.float32))
    scales = (np.abs(segment.vectors).max(axis=1) / 127).astype(np.float32)
    if dtype == "int8":
        arrays["scales"] = scales
    for array, values in arrays.items():
        np.save(os.path.join(path, f"{array}.npy"), values)
    vectors = np.lib.format.open_memmap(os.path.join(path, "vectors.npy"), "w+", dtype, segment.vectors.shape)
    for start in range(0, len(vectors), BLOCK):
        block = segment.vectors[start:start + BLOCK]
        if dtype == "int8":
            block = np.rint(block / np.maximum(scales[start:start + BLOCK, None], 1e-30))
        vectors[start:start + BLOCK] = block
    vectors.flush()
    text_path = os.path.join(path, "texts.txt")
    with named_in_errors(text_path), open(text_path, "wb") as file:  # NumPy's tofile loses the end on a full disk without a word
        file.write(segment.text_bytes.data)
    return {"folder": name, "rows": len(segment.label_ids)}


def write_head(folder: str, header: dict, head: Head) -> str:
    """Write a head as a new folder; returns its name. header: says the labels' ids. UserError where it came to nothing."""
    if not (np.isfinite(head.weights).all() and np.isfinite(head.offsets).all()):
        raise UserError(f"{folder}: the head did not converge, and is as it was, expected finite weights, or an index without "
                        "one (build_index.py --head off)")
    name = f"head-{secrets.token_hex(8)}"
    os.mkdir(os.path.join(folder, name))
    ids = np.array([entry["id"] for entry in header["labels"]], np.int32)
    for array, values in (("labels", ids[head.labels]), ("weights", head.weights), ("offsets", head.offsets)):
        np.save(os.path.join(folder, name, f"{array}.npy"), values)
    return name


def replace_head(index: SearchIndex, head: Head) -> dict:
    """Give an index folder another head, fitted to `index`; OutdatedIndex where it has changed since.

    Returns the new index.json.
    """
    with changing(index.folder):
        if index_stamp(index.folder) != index.stamp:
            raise OutdatedIndex
        header = {**index.header, "head": {**index.header["head"], "folder": write_head(index.folder, index.header, head)}}
        return write_header(index.folder, header, changed=header.get("changed", False))


def write_header(folder: str, header: dict, changed: bool = True) -> dict:
    """The last step of a change: replace index.json, then delete what it does not name. Returns the new index.json.

    changed: whether this is no longer what was built.
    """
    header = {**header, "changed": changed}
    with complete_file(os.path.join(folder, MARKER)) as file:
        file.write(json.dumps(header, ensure_ascii=False) + "\n")
    used = parts(header)
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(f".{MARKER}.") or (PARTS.match(name) and name not in used):
            with contextlib.suppress(OSError):  # Windows keeps what somebody has open: the next change tries again
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return header


def parts(header: dict) -> set[str]:
    """The names of the files and folders that an index.json names."""
    used = {entry["folder"] for entry in header["segments"]} | {header[name]["file"] for name in TYPES if header[name]}
    return used | ({header["head"]["folder"]} if header["head"] else set())


@contextlib.contextmanager
def changing(folder: str) -> Iterator[None]:
    """Keep other processes from changing the folder, which is made where it is missing."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, ".lock"), "w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}), expected a writable folder") from None
    with lock:
        with contextlib.suppress(ImportError):  # Windows has none
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield
