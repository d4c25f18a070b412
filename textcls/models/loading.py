"""Reading a checkpoint and the data files that belong to it, so that all that is wrong with them is reported first."""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Optional, TypeVar

import numpy as np

from textcls.common.errors import Problems
from textcls.common.options import find_label_file
from textcls.data.files import check_splits, read_labelled, read_labels
from textcls.models.checkpoints import Checkpoint, load_checkpoint

Data = TypeVar("Data")


def load_with_data(args: Namespace, read: Callable[[list[str], Problems], Data], folder: Optional[str] = None
                   ) -> tuple[Checkpoint, Data]:
    """Read label.txt and the data files, then load the model, which takes longer. Returns it and what `read` returned.

    args: as of `add_model_options`. folder: of the checkpoint; None: args.params_path. read: function of (labels, problems)
    that reads the data files and reports all problems; labels is empty where label.txt is wrong, so that only the form of rows
    can be checked. UserError.
    """
    path, problems, folder = find_label_file(args), Problems(), folder or args.params_path
    if not os.path.isfile(path):  # only the checkpoint knows the labels
        checkpoint = load_checkpoint(folder, path, args.max_seq_length)
        return checkpoint, read(checkpoint.labels, problems)
    data = read(read_known_labels(path, problems), problems)
    return load_checkpoint(folder, path, args.max_seq_length), data


def read_known_labels(path: str, problems: Problems) -> list[str]:
    """Read the labels of a label.txt; [] where it is wrong: then `read_labelled` checks only the form of rows."""
    labels = read_labels(path, problems)
    return [] if problems.count else labels


def data_paths(args: Namespace) -> list[str]:
    """Join the folder and the names of train_file and dev_file."""
    return [os.path.join(args.dataset_dir, name) for name in (args.train_file, args.dev_file)]


def read_splits(args: Namespace, labels: list[str], problems: Problems
                ) -> tuple[tuple[list[str], np.ndarray], tuple[list[str], np.ndarray]]:
    """Read train and dev: (texts, label ids) of each. Reports what is wrong with them and what `problems` held before."""
    label_path = os.path.join(args.dataset_dir, args.label_file)
    train_path, dev_path = data_paths(args)
    train = read_labelled(train_path, labels, problems, label_path)
    dev = read_labelled(dev_path, labels, problems, label_path)
    if not problems.count:
        check_splits(train_path, dev_path, train, dev, labels, problems)
    problems.report()
    return train, dev
