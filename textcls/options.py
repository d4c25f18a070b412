"""Options that several scripts have, and the types of their values."""

import argparse
import os

from textcls.errors import UserError

def positive_int(text):
    """Type of options that count something."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def seed_number(text):
    """Type of --seed: what NumPy's generators take."""
    if not text.strip().isdecimal() or not int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 to {2**32 - 1}")
    return int(text)


def add_model_options(parser):
    """Add the options of the scripts that run a trained model on the files of a data folder."""
    parser.add_argument("--device", help="cpu, gpu, gpu:N, xpu or npu; None: the GPU if there is one, else the CPU")
    parser.add_argument("--dataset_dir", default="./data", help="folder of the data files")
    parser.add_argument("--params_path", default="./checkpoint/", help="checkpoint made by train.py")
    parser.add_argument("--max_seq_length", type=int, help="longest text in tokens; None: as in training")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch")
    parser.add_argument("--label_file", default="label.txt", help="labels in dataset_dir; must agree with the checkpoint")


def find_label_file(args):
    """Path of the label.txt to compare with the checkpoint's labels; only the default name may be missing."""
    path = os.path.join(args.dataset_dir, args.label_file)
    if args.label_file != "label.txt" and not os.path.isfile(path):
        raise UserError(f"{path}: file not found (--label_file), expected the labels of the checkpoint, one per line")
    return path
