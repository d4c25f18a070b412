"""Texts in, labels out: the options, formats and streams that predict.py and deploy/predictor share. Needs no Paddle."""

import argparse
import contextlib
import csv
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Optional, TextIO, Union

import numpy as np

from textcls.common.errors import Problems, UserError
from textcls.common.known import HOW_TO_FIT
from textcls.common.log import Progress, get_logger, progress_bar
from textcls.common.options import add_column_options, positive_int, probability, probability_or_auto
from textcls.common.outputs import check_output, check_output_folder, complete_file, is_stream, plain_ending
from textcls.common.probabilities import DECIMALS, UNDECIDED, is_decided, top_labels
from textcls.data.files import read_texts
from textcls.data.parquet import Rows, check_columns, check_pyarrow, column_names, find_text_column, is_parquet, new_parquet
from textcls.runtime.parts import describe_run, open_parts, parts_folder
from textcls.runtime.workbook import Sheet, check_row_count, check_workbook, new_workbook

# texts and characters of a file in memory at a time; batches by length are formed within a chunk
CHUNK, CHUNK_CHARACTERS = 8192, 1 << 23
TABLES = (".csv", ".json", ".jsonl")  # how the names of text files end that hold more than a text per line
Row = Any  # of jsonl a dict; else a list of str, in which xlsx and parquet have their numbers as float
RowsOf = Callable[[list[str], Optional[Progress]], Iterable[Row]]
LINE_BREAKS = re.compile("\r*[\n\t][\r\n\t]*")  # in texts of Parquet files; txt and tsv have a blank instead


def add_output_options(parser: argparse.ArgumentParser, output_file: Optional[str]) -> None:
    """Add the options of the scripts that label a file of texts. output_file: the default."""
    parser.add_argument("--data_file", default="data.txt", help="texts in dataset_dir, one per line (.gz: compressed), or a "
                        ".parquet file; -: standard input")
    add_column_options(parser)
    parser.add_argument("--output_file", default=output_file, help="where the answers go; -: standard output")
    parser.add_argument("--resume", action="store_true", help="keep the answers in whole parts beside output_file until all are "
                        "there, and go on behind those of an earlier run that was interrupted")
    parser.add_argument("--output_format", default="txt", choices=["txt", "tsv", "csv", "jsonl", "xlsx", "parquet"])
    parser.add_argument("--top_k", type=positive_int, default=1, help="how many classes to write per text (not in txt)")
    parser.add_argument("--threshold", type=probability_or_auto, default=0.0,
                        help=f"answers with a lower probability are written as `{UNDECIDED}`; auto: the one that was found for a "
                             "precision, and saved")


def add_known_option(parser: argparse.ArgumentParser) -> None:
    """Add --least_known to a script that labels a file of texts by a classifier."""
    parser.add_argument("--least_known", type=probability, default=0.0, help=f"texts that are less probably of a known label are "
                        f"written as `{UNDECIDED}`; for models of train.py --known centres")


def check_output_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the parser's error where the options of `add_output_options` do not fit together."""
    if args.top_k > 1 and args.output_file and args.output_format == "txt":
        parser.error("--top_k needs --output_format tsv, csv, jsonl, xlsx or parquet: txt holds one label per text")
    if args.resume and (args.data_file == "-" or args.output_file in (None, "-")):
        parser.error("--resume needs a file as --data_file and one as --output_file: streams cannot be read or written again")


def check_labels(args: argparse.Namespace, labels: list[str]) -> None:
    """Raise UserError where the options do not fit the model's labels."""
    if args.top_k > len(labels):
        raise UserError(f"--top_k {args.top_k}: the model has {len(labels)} classes, expected at most that many")
    check_threshold(args.threshold, labels)


def check_least_known(least_known: float, tells_unknown: bool, labels: list[str]) -> None:
    """Raise UserError where a model cannot answer with this least_known. tells_unknown: whether it says how known texts are."""
    if least_known > 0 and not tells_unknown:
        raise UserError(f"least_known {least_known}: this model does not tell unknown texts, expected 0, or a model trained with "
                        f"{HOW_TO_FIT}")
    check_threshold(least_known, labels, "least_known")


def check_threshold(threshold: float, labels: list[str], name: str = "threshold") -> None:
    """Raise UserError where answers below the threshold could not be told from those of a label."""
    if threshold > 0 and UNDECIDED in labels:
        raise UserError(f"{name} {threshold}: there is a label {UNDECIDED!r}, which answers below it could not be told from, "
                        f"expected {name} 0")


def check_decided(name: str) -> None:
    """Raise UserError where a label of an index has the name that stands for no label: no threshold could be used with it."""
    if name == UNDECIDED:
        raise UserError(f"label {name!r}: is what answers below --threshold are called, expected another name")


def input_path(args: argparse.Namespace) -> str:
    """Return the path of the texts to label, or what messages call standard input."""
    return "standard input" if args.data_file == "-" else os.path.join(args.dataset_dir, args.data_file)


def check_files(args: argparse.Namespace, inputs: list[str]) -> Optional[int]:
    """Check the output file and all texts, before a model is loaded. inputs: what else is read, and may not be written.

    Returns the number of texts; None of standard input, where it is not known. UserError.
    """
    check_columns(args, [input_path(args)])
    if plain_ending(args.data_file) in TABLES:
        get_logger().warning(f"{input_path(args)}: each of its lines is taken for a text, a header and other columns with it; "
                             "expected a .parquet file where one column is meant.")
    if args.output_file not in (None, "-"):
        check_output(args.output_file, [input_path(args), *inputs], args.dataset_dir)
    if args.output_format == "xlsx":
        check_workbook(args.output_file)
    if args.resume:
        check_output_folder(parts_folder(args.output_file), "--resume")
    if (args.output_format == "parquet") != (args.output_file is not None and is_parquet(args.output_file)):
        raise UserError(f"--output_format {args.output_format}: {args.output_file} as output, expected --output_format parquet "
                        "and --output_file with a name that ends in .parquet, or neither")
    if args.output_format == "parquet":
        check_pyarrow(args.output_file)
    count = None if args.data_file == "-" else count_texts(input_path(args), args.text_column)
    if count and args.output_format == "xlsx":
        check_row_count(count + 1)
    return count


def write_answers(args: argparse.Namespace, total: Optional[int], rows_of: RowsOf, models: Sequence[str]) -> None:
    """Label the texts that args name, and write the output; with --resume by way of parts, which an earlier run may have begun.

    total, rows_of: of `label_chunks`. models: folders whose files the answers depend on.
    """
    if not args.resume:
        with open_output(args) as output:
            return write_rows(output, itertools.chain.from_iterable(label_chunks(args, total, rows_of)), args)
    with open_parts(args.output_file, describe_run(args, input_path(args), models)) as parts:
        if parts.count:
            get_logger().info(f"--resume: going on behind {parts.count} whole parts in {parts.folder}.")
        for rows in label_chunks(args, total, rows_of, done=parts.count):
            parts.add(rows)
        with open_output(args) as output:
            write_rows(output, parts.rows(), args)
        parts.remove()


def label_chunks(args: argparse.Namespace, total: Optional[int], rows_of: RowsOf, rank: int = 0, ranks: int = 1, done: int = 0
                 ) -> Iterator[Iterable[Row]]:
    """Yield the rows of each chunk of the texts that args name, with a progress bar.

    total: of `check_files`. rows_of: function of (texts, progress bar or None) that returns their rows. Of several ranks each
    takes the chunks whose number is `rank` modulo `ranks`. done: chunks that are left out.
    """
    chunks = read_chunks(input_path(args), args.data_file == "-", args.text_column)
    initial = sum(map(len, itertools.islice(chunks, done)))
    with progress_bar(total, "Predicting", leave=True, disable=rank > 0, initial=initial) as progress:
        for number, texts in enumerate(chunks):
            if number % ranks == rank:
                yield rows_of(texts, progress if ranks == 1 else None)
            if ranks > 1:
                progress.update(len(texts))


def count_texts(path: str, text_column: Optional[str] = None) -> int:
    """Check the whole file before any work is done on it; returns the number of its texts."""
    if is_stream(path):
        raise UserError(f"{path}: a pipe or device, which cannot be read twice, expected a file, or --data_file - for standard "
                        "input")
    problems = Problems()
    count = sum(1 for _ in read_texts(path, problems, text_column=text_column))
    problems.report()
    return count


def read_chunks(path: str, from_stdin: bool = False, text_column: Optional[str] = None) -> Iterator[list[str]]:
    """Yield the texts of an unlabelled file in lists of at most CHUNK texts and about CHUNK_CHARACTERS; at its end UserError
    names all problems found.

    from_stdin: read standard input, which path then only names. text_column: of a Parquet file.
    """
    if from_stdin and sys.stdin is None:
        raise UserError("standard input is closed, expected texts, one per line")
    problems = Problems()
    texts = read_texts(path, problems, sys.stdin.buffer if from_stdin else None, text_column)
    while True:
        chunk: list[str] = []
        size = 0
        for text in texts:
            chunk.append(text)
            size += len(text)
            if len(chunk) == CHUNK or size >= CHUNK_CHARACTERS:
                break
        if not chunk or problems.count:
            break
        yield chunk
    for _ in texts:
        pass  # so that all problems of the input are reported
    problems.report()


def open_stdout(**options: str) -> TextIO:
    """Return standard output, which run_script has set to UTF-8. options: of `reconfigure`. UserError where it is closed."""
    if sys.stdout is None:
        raise UserError("standard output is closed, expected somewhere to write to")
    sys.stdout.reconfigure(**options)  # type: ignore[union-attr]  # a TextIOWrapper in scripts
    return sys.stdout


@contextlib.contextmanager
def open_output(args: argparse.Namespace) -> Iterator[Union[TextIO, Sheet, Rows]]:
    """Open what args.output_file names (-: standard output), a text stream, a Sheet or Rows, and write the header."""
    if args.output_format == "parquet":
        with new_parquet(args.output_file, *parquet_columns(args)) as rows:
            yield rows
        return
    first = header(args)
    if args.output_file == "-":
        stream: contextlib.AbstractContextManager = contextlib.nullcontext(open_stdout(newline=""))
    elif args.output_format == "xlsx":
        stream = new_workbook(args.output_file)
    else:
        stream = complete_file(args.output_file, newline="")
    with stream as output:
        write_rows(output, [first] if first else [], args)
        yield output


def parquet_columns(args: argparse.Namespace) -> tuple[dict[str, type], Optional[str], list[str]]:
    """Return what `new_parquet` takes: the columns of the answers, and those of a Parquet input that come after them."""
    own: dict[str, type] = {name: float if name.startswith("probability") else str for name in header(args) or []}
    path = input_path(args)
    if not is_parquet(path):
        return own, None, []
    text_column = find_text_column(path, args.text_column)
    others = [name for name in column_names(path) if name != text_column]
    taken = [name for name in others if name in own]
    if taken:
        get_logger().warning(f"{path}: left out of the output: {', '.join(map(repr, taken))}, since the answers have columns of "
                             "the same name.")
    return own, path, [name for name in others if name not in own]


def header(args: argparse.Namespace) -> Optional[list[str]]:
    """Return the first row of txt, tsv, csv and xlsx as columns, the columns of parquet; None for jsonl."""
    if args.output_format == "jsonl":
        return None
    columns = ["text", "label"] + (["probability"] if args.output_format != "txt" else [])
    for place in range(2, args.top_k + 1):
        columns += [f"label_{place}", f"probability_{place}"]
    return columns


def make_rows(texts: Sequence[str], probs: np.ndarray, labels: list[str], args: argparse.Namespace,
              known: Optional[np.ndarray] = None) -> Iterator[Row]:
    """Yield one row per text: a JSON object for jsonl, else columns. probs: float32 [num_texts, num_classes]; known: float
    [num_texts], or None, of `make_row`."""
    all_known = [None] * len(texts) if known is None else known.tolist()
    for text, top, own in zip(texts, top_labels(probs, labels, args.top_k), all_known):
        yield make_row(text, top, args, own)


def make_row(text: str, top: Sequence[tuple[str, float]], args: argparse.Namespace, known: Optional[float] = None) -> Row:
    """Make the row of a text. top: list of (label, probability), best first; below --threshold the text is UNDECIDED. known: the
    probability that it is of a label at all, below --least_known it is UNDECIDED, too; None: nobody knows."""
    least_known = 0.0 if known is None else args.least_known  # an option of those whose models may tell
    label = top[0][0] if is_decided(top[0][1], args.threshold, known, least_known) else UNDECIDED
    if args.output_format == "jsonl":
        row = {"text": text, "label": label, "probability": top[0][1]}
        if known is not None:
            row["known"] = round(known, DECIMALS)
        return {**row, "top_k": [{"label": name, "probability": value} for name, value in top]}
    if args.output_format in ("txt", "tsv"):
        text = LINE_BREAKS.sub(" ", text)
    if args.output_format == "txt":
        return [text, label]
    number = float if args.output_format in ("xlsx", "parquet") else "{:.6f}".format
    columns = [text, label, number(top[0][1])]
    for name, value in top[1:]:
        columns += [name, number(value)]
    return columns


def write_rows(output: Union[TextIO, Sheet, Rows], rows: Iterable[Row], args: argparse.Namespace) -> None:
    """Write rows of `make_row`."""
    if isinstance(output, (Sheet, Rows)):
        output.writerows(rows)
    elif args.output_format == "jsonl":
        output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif args.output_format == "csv":
        csv.writer(output).writerows(rows)  # its CR LF also makes it quote texts with a lone CR
    else:
        output.writelines("\t".join(row) + "\n" for row in rows)
