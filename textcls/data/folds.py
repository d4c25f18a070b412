"""Labelled rows split into folds, and what models that have not seen a row say of it: kept in a file."""

import re
import unicodedata
import warnings
import zipfile
from collections.abc import Sequence

import numpy as np

from textcls.common.digests import rows_id
from textcls.common.errors import UserError
from textcls.common.outputs import complete_file
from textcls.data.files import LabelledTexts, compare_labels

NO_MATTER = re.compile(r"[^\w+\-.<>=≤≥±]|_|(?<!\d)\.|\.(?!\d)|(?<=[^\W\d])-(?=[^\W\d])")


def comparison_key(text: str) -> str:
    """Reduce a text to what it shares with texts that differ only in width, case, blanks, punctuation or most symbols.

    Never empty. Kept is what makes another statement of the same words: + - < > = ≤ ≥ ±, the point of 5.6 and the hyphen of 3-5.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return NO_MATTER.sub("", folded) or folded


def split_folds(texts: list[str], label_ids: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Give each row a fold: int64 [num_rows], 0 to folds - 1. Every class is spread evenly, also one with few rows.

    Equal texts share a fold, or each would vouch for the other's label. UserError where the rows are too few.
    """
    from sklearn.model_selection import StratifiedKFold

    groups: dict[str, int] = {}
    group_of = np.array([groups.setdefault(comparison_key(text), len(groups)) for text in texts])
    first_ids = label_ids[np.unique(group_of, return_index=True)[1]]
    check_folds(first_ids, folds)
    fold_of = np.empty(len(groups), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer rows than folds, which is fine here
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(first_ids, first_ids)
        for fold, (_, held_out) in enumerate(splits):
            fold_of[held_out] = fold
    return fold_of[group_of]


def check_folds(label_ids: np.ndarray, folds: int) -> None:
    """Raise UserError where the rows cannot be split into so many folds, or say nothing about labels."""
    counts = np.bincount(label_ids)
    if (counts > 0).sum() < 2:
        raise UserError("the training rows are all of one class, expected at least two")
    if folds > counts.max():
        raise UserError(f"--folds {folds}: the largest class has {counts.max()} different texts, expected no more folds")


def write_out_of_fold(path: str, logits: np.ndarray, labels: list[str], rows: LabelledTexts) -> None:
    """Keep the logits, float32 [num_rows, num_classes], of rows by models that have not seen them, for `read_out_of_fold`."""
    with complete_file(path, "wb") as output:
        np.savez_compressed(output, logits=logits, labels=np.array(labels), rows=np.array(rows_id(*rows, in_order=True)))


def read_out_of_fold(path: str, labels: list[str], rows: tuple[Sequence[str], np.ndarray], file: str) -> np.ndarray:
    """Read what `write_out_of_fold` has kept: logits, float32 [num_rows, num_classes].

    file: the path of the rows, for messages. UserError where it is of other rows or labels, or no such file.
    """
    expected = "the out_of_fold.npz that train.py --folds wrote"
    try:
        with np.load(path, allow_pickle=False) as content:
            logits, own_labels, digest = content["logits"], content["labels"].tolist(), str(content["rows"])
    except FileNotFoundError:
        raise UserError(f"{path}: file not found, expected {expected}") from None
    except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected {expected}") from None
    compare_labels(own_labels, labels, "label.txt", path)
    if digest != rows_id(*rows, in_order=True) or logits.shape != (len(rows[0]), len(labels)):
        raise UserError(f"{path}: is of {len(logits)} rows that are not those of {file} ({len(rows[0])} rows), expected the rows "
                        "that train.py --folds had, in the same order")
    return logits
