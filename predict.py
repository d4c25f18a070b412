"""Label the texts of a file, or of standard input, with a trained classifier.

    python predict.py --device gpu --max_seq_length 128 --batch_size 32 --dataset_dir data
    python predict.py --dataset_dir data --output_format jsonl --top_k 3 --threshold 0.5 --output_file output.jsonl
    cat texts.txt | python predict.py --data_file - --output_file output.txt
    python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo predict.py --device cpu --dataset_dir data

Reads   dataset_dir/data.txt (one text per line), params_path (made by train.py).
Writes  output_file in the order of the input. txt: header and `<text><tab><label>`; tsv and csv: label and probability of
        the top_k classes in columns; jsonl: {"text", "label", "probability", "top_k": [{"label", "probability"}, ...]}.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import sys

import numpy as np
from tqdm import tqdm

from utils import (UNDECIDED, Problems, UserError, add_model_options, check_output, complete_file, find_label_file,
                   is_main_rank, positive_int, read_texts, run_script, tokenize)
from modeling import get_logger, load_checkpoint, predict_logits, select_device, softmax

CHUNK = 8192  # texts in memory at a time; batches by length are formed within a chunk


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--data_file", default="data.txt", help="texts, one per line, in dataset_dir; -: standard input")
    parser.add_argument("--output_file", default="output.txt", help="where the answers go; -: standard output")
    parser.add_argument("--output_format", default="txt", choices=["txt", "tsv", "csv", "jsonl"])
    parser.add_argument("--top_k", type=positive_int, default=1, help="how many classes to write per text (not in txt)")
    parser.add_argument("--threshold", type=float, default=0.0,
                        help=f"answers with a lower probability are written as `{UNDECIDED}`")
    args = parser.parse_args()
    if args.top_k > 1 and args.output_format == "txt":
        parser.error("--top_k needs --output_format tsv, csv or jsonl: txt holds one label per text")
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: expected 0 to 1")
    return args


def count_texts(path):
    """Check the whole file before any work is done on it; returns the number of its texts."""
    problems = Problems()
    count = sum(1 for _ in read_texts(path, problems))
    problems.report()
    return count


def header(args):
    """The first line of txt, tsv and csv as columns; None for jsonl."""
    if args.output_format == "jsonl":
        return None
    columns = ["text", "label"] + (["probability"] if args.output_format != "txt" else [])
    for place in range(2, args.top_k + 1):
        columns += [f"label_{place}", f"probability_{place}"]
    return columns


def make_rows(texts, probs, labels, args):
    """Yield one row per text: a JSON object for jsonl, else columns. probs: float32 [num_texts, num_classes]."""
    top = np.argsort(-probs, axis=1, kind="stable")[:, :args.top_k]
    for text, row, classes in zip(texts, probs.tolist(), top.tolist()):
        label = labels[classes[0]] if row[classes[0]] >= args.threshold else UNDECIDED
        if args.output_format == "jsonl":
            yield {"text": text, "label": label, "probability": round(row[classes[0]], 6),
                   "top_k": [{"label": labels[index], "probability": round(row[index], 6)} for index in classes]}
        elif args.output_format == "txt":
            yield [text, label]
        else:
            columns = [text, label, f"{row[classes[0]]:.6f}"]
            for index in classes[1:]:
                columns += [labels[index], f"{row[index]:.6f}"]
            yield columns


def write_rows(output, rows, args):
    """Write rows, one line each (a text never holds a line feed or, outside csv, a tab)."""
    if args.output_format == "jsonl":
        output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif args.output_format == "csv":
        csv.writer(output).writerows(rows)  # its CR LF also makes it quote texts with a lone CR
    else:
        output.writelines("\t".join(row) + "\n" for row in rows)


def predict_chunks(args, checkpoint, data_path, total, output, rank=0, ranks=1):
    """Write the rows of every chunk whose number is `rank` modulo `ranks` to the text stream `output`."""
    problems = Problems()
    texts = read_texts(data_path, problems, sys.stdin.buffer if args.data_file == "-" else None)
    with tqdm(total=total, desc="Predicting", unit=" texts", delay=2, disable=rank > 0) as progress:
        for number in itertools.count():
            chunk = list(itertools.islice(texts, CHUNK))
            if not chunk or problems.count:
                break
            if number % ranks == rank:
                tokens = tokenize(chunk, checkpoint.encode)
                probs = softmax(predict_logits(checkpoint, tokens, args.batch_size, progress if ranks == 1 else None))
                write_rows(output, make_rows(chunk, probs, checkpoint.labels, args), args)
            if ranks > 1:
                progress.update(len(chunk))
    for _ in texts:
        pass  # so that all problems of the input are reported
    problems.report()


def merge_parts(parts, output):
    """Copy the ranks' chunks to `output` in the order of the input. parts: paths, in rank order."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part, "rb")) for part in parts]
        for file in itertools.cycle(files):
            lines = list(itertools.islice(file, CHUNK))
            output.writelines(lines)
            if len(lines) < CHUNK:
                break


def main():
    args = parse_arguments()
    rank, ranks = int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
    from_stdin, to_stdout = args.data_file == "-", args.output_file == "-"
    if ranks > 1 and (from_stdin or to_stdout):
        raise UserError("--data_file - and --output_file - work in a single process, expected files under "
                        "paddle.distributed.launch")
    data_path = "standard input" if from_stdin else os.path.join(args.dataset_dir, args.data_file)
    if from_stdin and sys.stdin is None:
        raise UserError("--data_file -: standard input is closed, expected texts there, one per line")
    label_path = find_label_file(args)
    check_output(args.output_file, [data_path, label_path])
    total = None if from_stdin else count_texts(data_path)
    select_device(args.device)
    checkpoint = load_checkpoint(args.params_path, label_path, args.max_seq_length)
    if args.top_k > len(checkpoint.labels):
        raise UserError(f"--top_k {args.top_k}: the model has {len(checkpoint.labels)} classes, expected at most as many")
    first = header(args)
    if to_stdout:
        sys.stdout.reconfigure(encoding="utf-8", newline="")
        write_rows(sys.stdout, [first] if first else [], args)
        predict_chunks(args, checkpoint, data_path, total, sys.stdout)
        return
    if ranks == 1:
        with complete_file(args.output_file, newline="") as output:
            write_rows(output, [first] if first else [], args)
            predict_chunks(args, checkpoint, data_path, total, output)
    else:
        predict_in_parts(args, checkpoint, data_path, total, first, rank, ranks)
    if is_main_rank():
        get_logger().info(f"Prediction results save in {args.output_file}.")


def predict_in_parts(args, checkpoint, data_path, total, first, rank, ranks):
    """Each rank writes its chunks to a hidden file beside the output; rank 0 joins them when all are done."""
    import paddle

    folder, name = os.path.split(os.path.abspath(args.output_file))
    parts = [os.path.join(folder, f".{name}.rank-{index}.part") for index in range(ranks)]
    paddle.distributed.init_parallel_env()
    try:
        with complete_file(parts[rank], newline="") as output:
            predict_chunks(args, checkpoint, data_path, total, output, rank, ranks)
        paddle.distributed.barrier()
        if rank == 0:
            with complete_file(args.output_file, newline="") as output:
                write_rows(output, [first] if first else [], args)
                output.flush()
                merge_parts(parts, output.buffer)
        paddle.distributed.barrier()
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(parts[rank])


if __name__ == "__main__":
    run_script(main)
