"""Options that several scripts have, and the types of their values."""

import argparse
import contextlib
import os
import platform
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NoReturn, Optional, Union

from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.common.texts import LINE

LAUNCHER = "TEXTCLS_LAUNCHER"  # in the environment of a process that was not started by Paddle's launcher: its module
MOST_THREADS = 1024  # more cores than a machine has; with many more it would only stand still
POOLINGS = ("cls", "mean", "pooler")  # what may become of a text's token states, to make one vector of them
# options of older command lines, still taken but without effect -> why
OBSOLETE = {
    "--model_name": "the export holds all that is needed",
    "--model_name_or_path": "the encoder's folder says which model it is",
    "--output_emb_size": "the encoder's folder says how long its vectors are",
    "--pad_to_max_seq_len": "texts are padded to the longest of their batch",
    "--use_tensorrt": "an export runs by ONNX Runtime", "--enable_mkldnn": "an export runs by ONNX Runtime",
    "--export_type": "both forms are always written",
    "--recall_result_dir": "recall.py writes what is recalled", "--recall_result_file": "recall.py writes what is recalled",
    "--evaluate_result": "eval_results.json in output_dir has it", "--recall_num": "recall@1, 5, 10 and 20 are measured",
    "--hnsw_m": "this search is exact", "--hnsw_ef": "this search is exact", "--hnsw_max_elements": "an index has no such limit"}


def positive_int(text: str) -> int:
    """Type of options that count something."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def thread_count(text: str) -> int:
    """Type of options that say how many threads work at once."""
    if positive_int(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 to {MOST_THREADS}")
    return int(text)


def probability(text: str) -> float:
    """Type of options that are a probability or a share."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, 0 to 1")
    return value


def share_below_one(text: str) -> float:
    """Type of options that name a share that has to be shown by a sample, which can show neither 0 nor 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 and below 1, such as 0.95")
    return value


def probability_or_auto(text: str) -> Union[float, str]:
    """Type of --threshold where a threshold is stored with the model."""
    try:
        return text if text == "auto" else probability(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


def read_token_file(path: str, shortest: int = 1) -> str:
    """Read the token of a --token_file, one line of at least `shortest` visible ASCII characters. UserError, OSError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        token = file.read().strip()
    if len(token) < shortest or not re.fullmatch("[!-~]+", token):
        raise UserError(f"{path}: holds no token, expected one line of {shortest} or more visible ASCII characters")
    return token


def seed_number(text: str) -> int:
    """Type of --seed: what NumPy's generators take."""
    if not text.strip().isdecimal() or not int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 to {2**32 - 1}")
    return int(text)


def describe_versions() -> str:
    """List the versions of Python and of the packages that the suite stands on."""
    from importlib import metadata

    versions = [f"Python {platform.python_version()}"]
    for package in ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "onnxruntime", "onnxruntime-gpu", "tokenizers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    return ", ".join(versions)


class ShowVersions(argparse.Action):
    """--version: print Python's version and those of the packages that the suite stands on, and end."""

    def __init__(self, option_strings: list[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> None:
        print(describe_versions())
        parser.exit()


class Obsolete(argparse.Action):
    """An option of OBSOLETE: takes a value or none, keeps nothing, and says so in the log where it is given."""

    def __init__(self, option_strings: list[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
                 option_string: Optional[str] = None) -> None:
        get_logger().warning(f"{option_string} has no effect: {OBSOLETE[str(option_string)]}.")


def add_obsolete_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Let a script take options of older command lines that have no effect. names: keys of OBSOLETE."""
    for name in names:
        parser.add_argument(name, action=Obsolete, help=f"without effect: {OBSOLETE[name]}")


def add_version_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action=ShowVersions, help="print the versions of Python and of the packages used, and end")


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage of all options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} ({self.prog} --help lists all options)")


def make_parser(doc: str, epilog: Optional[str] = None) -> argparse.ArgumentParser:
    """Make the parser of a script. doc: its docstring, whose first line says what it does; epilog: ends the help."""
    parser = Parser(description=doc.splitlines()[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter, epilog=epilog)
    add_version_option(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser, train_file: bool = False, dev_file: bool = False,
                      cache_dir: bool = False) -> None:
    """Add the options of the scripts that run a trained model on the files of a data folder, and those of the three asked for."""
    parser.add_argument("--device", help="cpu, gpu, gpu:N, xpu or npu; None: the GPU if there is one, else the CPU")
    parser.add_argument("--dataset_dir", default="./data", help="folder of the data files")
    parser.add_argument("--params_path", default="./checkpoint/", help="checkpoint made by train.py")
    parser.add_argument("--max_seq_length", type=int, help="longest text in tokens; None: as in training")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch")
    parser.add_argument("--label_file", default="label.txt", help="labels in dataset_dir; must agree with the checkpoint")
    if train_file:
        parser.add_argument("--train_file", default="train.txt", help="training file in dataset_dir")
    if dev_file:
        parser.add_argument("--dev_file", default="dev.txt", help="development file in dataset_dir")
    if cache_dir:
        parser.add_argument("--cache_dir", default=".analysis_cache", help='folder for features of texts; "": keep none')


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the scripts that run a sentence encoder, a checkpoint, an export or a pretrained one."""
    add_pooling_option(parser)
    parser.add_argument("--max_seq_length", type=int, help="longest text in tokens; None: as in training")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch")
    parser.add_argument("--device", help="cpu, gpu, gpu:N, ...; None: the GPU if there is one, else the CPU")


def encoder_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `open_encoder` takes of the options of `add_encoder_options`."""
    return {name: getattr(args, name) for name in ("device", "batch_size", "max_seq_length", "pooling")}


def add_pooling_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pooling", choices=POOLINGS, help="of a pretrained model whose folder does not say so: what becomes of "
                        "token states, mean, cls (the first one) or pooler; None: mean, or what the encoder's folder says")


def prefix(text: str) -> str:
    """Type of the options of `add_prefix_options`."""
    if text and (problem := LINE.problem(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}, expected {LINE.expected}, or \"\" for none")
    return text


def add_prefix_options(parser: argparse.ArgumentParser, default: Optional[str] = None) -> None:
    """Add the prefixes that some encoders want. default: None where an index knows them, and an option is compared with it."""
    known = "; None: that of the index, which has to be the same" if default is None else ""
    parser.add_argument("--query_prefix", type=prefix, default=default,
                        help=f"what is put before each text that is asked about, as some encoders want it{known}")
    parser.add_argument("--text_prefix", type=prefix, default=default,
                        help=f"what is put before each text and label name in the index{known}")


def add_column_options(parser: argparse.ArgumentParser, labelled: bool = False) -> None:
    """Add the options that name columns of Parquet files. labelled: the files have labels, too."""
    parser.add_argument("--text_column", help="column of the texts in a .parquet file; None: text, or the only one of strings")
    if labelled:
        parser.add_argument("--label_column", help="column of the labels in it; None: label, or the only other one of strings")


def find_label_file(args: argparse.Namespace) -> str:
    """Return the path of the label.txt to compare with the checkpoint's labels; only the default name may be missing."""
    path = os.path.join(args.dataset_dir, args.label_file)
    if args.label_file != "label.txt" and not os.path.isfile(path):
        raise UserError(f"{path}: file not found (--label_file), expected the labels of the checkpoint, one per line")
    return path


def parse_widths(texts: Sequence[str], num_heads: int) -> list[float]:
    """Read the widths of prune.py, as fractions of the heads. texts: such as "3/4" or "0.5". UserError."""
    possible = ", ".join(str(Fraction(kept, num_heads)) for kept in range(1, num_heads))
    widths: list[float] = []
    if num_heads < 2:
        raise UserError("--width_mult_list: the model has a single head, expected one with two or more to prune")
    for text in texts:
        if not re.fullmatch(r"\d{1,4}/0*[1-9]\d{0,3}|\d{0,4}\.?\d{1,9}", text):
            raise UserError(f"--width_mult_list {text}: not a fraction or decimal, expected some of {possible}")
        width = Fraction(text)
        if not 0 < width < 1 or (width * num_heads).denominator != 1:
            raise UserError(f"--width_mult_list {text}: {float(width):g} of {num_heads} heads is not a whole number below "
                            f"{num_heads}, expected some of {possible}")
        if float(width) in widths:
            raise UserError(f"--width_mult_list {text}: named twice, expected each width once")
        widths.append(float(width))
    return widths
