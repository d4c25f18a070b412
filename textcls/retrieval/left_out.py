"""The folder of encoders that have been trained without a part of the labels each, as retrieval_based/leave_out.py makes it."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from textcls.common.errors import UserError
from textcls.common.outputs import complete_file
from textcls.data.files import read_json
from textcls.retrieval.pending import DataFiles

MARKER = "left_out.json"  # of a complete folder: the labels that each part lacks
LEAST_KEPT = 2  # labels that an encoder is trained on


def split_labels(labels: Sequence[str], parts: int) -> list[list[str]]:
    """Draw, by a fixed seed, the labels that each part is trained without: each label is of one part. UserError."""
    order = np.random.default_rng(0).permutation(len(labels))
    if parts < 2 or len(labels) - -(-len(labels) // parts) < LEAST_KEPT or parts > len(labels):
        raise UserError(f"--parts {parts}: of {len(labels)} labels, expected 2 or more, each of a label or more, and "
                        f"{LEAST_KEPT} labels or more that are left")
    return [[labels[place] for place in sorted(order[part::parts].tolist())] for part in range(parts)]


def part_folder(folder: str, number: int) -> str:
    """Name the folder of a part's encoder. number: from 1."""
    return os.path.join(folder, f"part-{number}")


def drop_labels(data: DataFiles, left: Iterable[str]) -> DataFiles:
    """The data files without some labels and their texts."""
    gone = set(left)
    train, dev = ([row for row in rows if row[1] not in gone] for rows in (data.train, data.dev))
    return DataFiles({label: words for label, words in data.words.items() if label not in gone}, train, dev)


def write_left_out(folder: str, parts: list[list[str]]) -> None:
    """Say which labels each part lacks: written last, when all encoders are there."""
    with complete_file(os.path.join(folder, MARKER)) as file:
        json.dump({"parts": parts}, file, ensure_ascii=False, indent=1)


def read_left_out(folder: str, labels: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Find the encoders of a folder: (path, of each label whether the encoder was trained without it: bool [num_labels]).

    UserError where the folder is not complete, or its labels are not these.
    """
    path = os.path.join(folder, MARKER)
    if not os.path.isfile(path):
        raise UserError(f"{folder}: has no {MARKER}, expected the --output_dir of retrieval_based/leave_out.py, run to its end")
    parts: Any = read_json(path).get("parts")
    if not is_partition(parts):
        raise UserError(f"{path}: is damaged, expected what retrieval_based/leave_out.py wrote")
    if other := set(labels).symmetric_difference(label for part in parts for label in part):
        raise UserError(f"{path}: was made for other labels, such as {min(other)!r}, expected those of the new index: run "
                        "retrieval_based/leave_out.py on data files that have them, into another folder")
    places = [(part_folder(folder, number), np.isin(labels, part)) for number, part in enumerate(parts, 1)]
    for place, _ in places:  # before the texts are encoded
        if not os.path.isdir(place):
            raise UserError(f"{place}: no such folder, expected an encoder of retrieval_based/leave_out.py")
    return places


def is_partition(parts: object) -> bool:
    """Whether these are two or more lists of labels, each label in one of them."""
    if not isinstance(parts, list) or len(parts) < 2 or not all(isinstance(part, list) and part for part in parts):
        return False
    names = [label for part in parts for label in part]
    return all(isinstance(label, str) for label in names) and len(set(names)) == len(names)
