"""Label texts with an exported model by ONNX Runtime; no Paddle is needed.

    python deploy/predictor/infer.py --model_path_prefix export/float32 --dataset_dir data
    python deploy/predictor/infer.py --model_path_prefix export --dataset_dir data --use_quantize --output_file output.txt
    cat texts.txt | python deploy/predictor/infer.py --model_path_prefix export --data_file - --output_file -
    python deploy/predictor/infer.py --model_path_prefix export --dataset_dir data --perf --perf_dataset dev
    python deploy/predictor/infer.py --device gpu --device_id 0 --use_fp16 --model_path_prefix export --dataset_dir data

Reads   model_path_prefix: a folder that export_model.py --onnx or prune.py wrote (or prefix of the model in it);
        dataset_dir/data.txt, one text per line; with --perf dataset_dir/dev.txt or test.txt, `<text><tab><label>`.
Writes  the answers in the order of the input to output_file, in the formats of predict.py; without --output_file a block
        per text to standard output. --use_quantize and --use_fp16 keep the converted model beside the exported one.
"""

import argparse
import itertools
import logging
import os
import statistics
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Optional

from textcls.common.errors import Problems, needs_packages, run_script
from textcls.common.options import find_label_file, make_parser, positive_int, thread_count
from textcls.data.files import compare_labels, read_labelled, read_labels
from textcls.runtime.exported import read_export, saved_threshold
from textcls.runtime.predictions import (
    add_known_option,
    add_output_options,
    check_files,
    check_labels,
    check_least_known,
    check_output_options,
    label_chunks,
    make_rows,
    open_stdout,
    write_answers,
)
from textcls.runtime.quantize import add_device_options

if TYPE_CHECKING:
    from textcls.runtime.predictor import Predictor

REPEATS, LONGEST = 5, 60.0  # --perf: runs after the warm-up, and seconds after which no further run is started
logger = logging.getLogger("predictor")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model_path_prefix", default="../../export/float32", help="exported folder, or prefix in it")
    add_device_options(parser, with_calibration_file=False)  # that is dataset_dir/dev.txt
    parser.add_argument("--num_threads", type=thread_count, help="CPU threads; None: one per usable core")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch")
    parser.add_argument("--max_seq_length", type=int, help="longest text in tokens; None: as in training")
    parser.add_argument("--dataset_dir", default="../../data", help="folder of the data files")
    parser.add_argument("--label_file", default="label.txt", help="labels in dataset_dir; must agree with the model's")
    add_output_options(parser, output_file=None)
    add_known_option(parser)
    parser.add_argument("--perf", action="store_true", help="measure accuracy and speed instead of labelling data_file")
    parser.add_argument("--perf_dataset", default="dev", choices=["dev", "test"], help="what --perf runs on")
    args = parser.parse_args()
    check_output_options(parser, args)
    if args.perf and args.output_file:
        parser.error("--perf writes no answers: expected no --output_file with it")
    if args.output_format != "txt" and not args.output_file:
        parser.error(f"--output_format {args.output_format} needs --output_file (-: standard output)")
    return args


def set_up_logging() -> None:
    """Send messages of the predictor to standard error as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the quantizer gives the root logger a handler of its own


def load_predictor(args: argparse.Namespace) -> "Predictor":
    """Load the model and check the options that depend on it."""
    if args.num_threads:
        os.environ.setdefault("RAYON_NUM_THREADS", str(args.num_threads))  # threads of the tokenizer
    with needs_packages("deploy/predictor/requirements.txt"):
        from textcls.runtime.predictor import Predictor
    logger.info(">>> [InferBackend] Creating Engine ...")
    dev_path = os.path.join(args.dataset_dir, "dev.txt")
    predictor = Predictor(
        args.model_path_prefix, device=args.device, device_id=args.device_id, dtype=args.dtype, num_threads=args.num_threads,
        batch_size=args.batch_size, max_seq_length=args.max_seq_length,
        calibration_file=dev_path if os.path.isfile(dev_path) else None, allow_accuracy_drop=args.allow_accuracy_drop)
    logger.info(f">>> [InferBackend] Use {args.device.upper()} to inference ...")
    if args.dtype != "fp32":
        logger.info(f">>> [InferBackend] Use {args.dtype.upper()} to inference ...")
    logger.info(">>> [InferBackend] Engine Created ...")
    label_path = find_label_file(args)
    if os.path.isfile(label_path):
        compare_labels(predictor.labels, read_labels(label_path), label_path, args.model_path_prefix)
    check_labels(args, predictor.labels)
    check_least_known(args.least_known, predictor.tells_unknown, predictor.labels)
    return predictor


def print_blocks(rows: Iterable[dict], top_k: int) -> None:
    """Print rows of jsonl as blocks: the text, its labels, a line of dashes. With top_k above 1, also probabilities."""
    output = open_stdout()
    for row in rows:
        if top_k == 1:
            labels = row["label"]
        else:
            labels = ", ".join(f"{top['label']} ({top['probability']:.6f})" for top in row["top_k"])
        print(f"input data: {row['text']}\nlabels: {labels}\n{'-' * 29}", file=output)


def label_file(args: argparse.Namespace, total: Optional[int], model: str) -> None:
    """Label the texts that args name. total: their number, None where it is not known; model: the exported folder."""
    predictor = load_predictor(args)
    row_args = args if args.output_file else argparse.Namespace(**{**vars(args), "output_format": "jsonl"})

    def rows_of(texts, progress):
        probs, known = predictor.answer(texts, progress)
        return make_rows(texts, probs, predictor.labels, row_args, known)

    if not args.output_file:
        return print_blocks(itertools.chain.from_iterable(label_chunks(args, total, rows_of)), args.top_k)
    write_answers(args, total, rows_of, [model])
    if args.output_file != "-":
        logger.info(f"Prediction results save in {args.output_file}.")


def measure(args: argparse.Namespace) -> None:
    """Print accuracy and speed, text in and label out, on a labelled file."""
    path = os.path.join(args.dataset_dir, f"{args.perf_dataset}.txt")
    predictor, problems = load_predictor(args), Problems()
    texts, label_ids = read_labelled(path, predictor.labels, problems, "the model's label.txt")
    problems.report()
    predictor.probabilities(texts[:3 * args.batch_size])  # warm-up: memory is laid out, threads are started
    seconds = []
    while not seconds or (len(seconds) < REPEATS and sum(seconds) < LONGEST):
        start = time.perf_counter()
        guesses = predictor.probabilities(texts).argmax(axis=1)
        seconds.append(time.perf_counter() - start)
    middle, ms = statistics.median(seconds), [second * 1000 / len(texts) for second in seconds]
    print(f"acc: {(guesses == label_ids).mean() * 100:.2f}")
    print(f"sample nums: {len(texts)}, time: {middle:.2f}, latency: {middle * 1000 / len(texts):.3f} ms")
    print(f"median of {len(ms)} runs; fastest {min(ms):.3f}, slowest {max(ms):.3f} ms per text; "
          f"{len(texts) / middle:.0f} texts/s")


def main():
    args = parse_arguments()
    set_up_logging()
    if args.threshold == "auto":
        args.threshold = saved_threshold(read_export(args.model_path_prefix), args.max_seq_length)
    if args.perf:
        return measure(args)
    model = args.model_path_prefix if os.path.isdir(args.model_path_prefix) else os.path.dirname(args.model_path_prefix) or "."
    label_file(args, check_files(args, [os.path.join(args.dataset_dir, args.label_file), model]), model)


if __name__ == "__main__":
    run_script(main)
