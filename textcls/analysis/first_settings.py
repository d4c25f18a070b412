"""First settings for a table: what is made of it, a classifier or an index, and how it is trained. Rules of thumb."""

import os
from typing import NamedTuple, Union

import numpy as np

from textcls.common.errors import Problems, UserError
from textcls.data.files import read_labelled, read_labels
from textcls.models.weights import find_weights

FEW_ROWS, MANY_LABELS = 20, 200  # rows a label for training (the median) below which, labels from which on it is an index
LONG_TEXT, MANY_LONG = 126, 0.05  # characters; the share of longer texts from which on the end of a text is read, too


class Counts(NamedTuple):
    rows: int  # for training
    dev_rows: int
    labels: int
    rows_per_label: float  # for training, the median
    long_share: float  # of the texts for training, those of more than LONG_TEXT characters


def count_rows(data_dir: str) -> Counts:
    """Count what a data folder of train.txt, dev.txt and label.txt holds. UserError where nothing could be learnt of it."""
    labels, problems = read_labels(os.path.join(data_dir, "label.txt")), Problems()
    if not os.path.getsize(os.path.join(data_dir, "dev.txt")):
        raise UserError(f"{data_dir}: no label has two rows, one to learn from and one to test with, expected a larger table")
    (texts, label_ids), dev = (read_labelled(os.path.join(data_dir, name), labels, problems) for name in ("train.txt", "dev.txt"))
    problems.report()
    sizes = np.bincount(label_ids, minlength=len(labels))
    return Counts(len(texts), len(dev[0]), len(labels), float(np.median(sizes)),
                  float(np.mean([len(text) > LONG_TEXT for text in texts])))


def choose_way(counts: Counts) -> str:
    """Choose "classifier" or "index"."""
    return "index" if counts.rows_per_label < FEW_ROWS or counts.labels >= MANY_LABELS else "classifier"


def has_weights(model: str) -> bool:
    """Whether a model is pretrained; a name that is no folder is."""
    return not os.path.isdir(model) or find_weights(model) is not None


def choose_settings(model: str, way: str, counts: Counts) -> dict[str, Union[str, int]]:
    """Choose the options of the training, {name: value}, as the documents do for the size of the data. way: of `choose_way`."""
    small = counts.rows < 1000
    settings: dict[str, Union[str, int]]
    if way == "index":
        rate, epochs, batch = ("5e-5", 10, 64) if has_weights(model) else ("2e-3", 5, 32)
        settings = {"learning_rate": rate, "num_train_epochs": epochs * 2 if small else epochs,
                    "per_device_train_batch_size": 16 if small else batch, "max_seq_length": 64}
    elif has_weights(model):
        settings = {"learning_rate": "3e-5", "num_train_epochs": 30 if small else 10 if counts.rows < 20_000 else 4,
                    "per_device_train_batch_size": 16 if small else 32, "max_seq_length": 128}
    else:
        settings = {"learning_rate": "2e-3" if small else "1e-3", "num_train_epochs": 20 if small else 12,
                    "per_device_train_batch_size": 8 if small else 32, "max_seq_length": 128}
        if small:  # of random weights, which at first learn nothing for some epochs
            settings["early_stopping_patience"] = 0
    if counts.long_share > MANY_LONG:
        settings["long_text"] = "head_tail"
    return settings
