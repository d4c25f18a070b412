"""Label the texts of a file, or of standard input, with a trained classifier.

    python predict.py --device gpu --max_seq_length 128 --batch_size 32 --dataset_dir data
    python predict.py --dataset_dir data --output_format jsonl --top_k 3 --threshold 0.5 --output_file output.jsonl
    cat texts.txt | python predict.py --data_file - --output_file output.txt
    python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo predict.py --device cpu --dataset_dir data

Reads   dataset_dir/data.txt (one text per line), params_path (made by train.py).
Writes  output_file in the order of the input. txt: header and `<text><tab><label>`; tsv and csv: label and probability of
        the top_k classes in columns; jsonl: {"text", "label", "probability", "top_k": [{"label", "probability"}, ...]}.
"""

import contextlib
import itertools
import os

from textcls.common.errors import UserError, is_main_rank, run_script
from textcls.common.log import get_logger, progress_bar
from textcls.common.options import add_model_options, find_label_file, make_parser
from textcls.common.outputs import check_output, complete_file
from textcls.models.checkpoints import load_checkpoint
from textcls.models.device import select_device
from textcls.models.inference import predict_probs
from textcls.runtime.predictions import (
    CHUNK,
    add_output_options,
    check_labels,
    check_output_options,
    count_texts,
    make_rows,
    open_output,
    read_chunks,
    write_rows,
)
from utils import tokenize


def parse_arguments():
    parser = make_parser(__doc__)
    add_model_options(parser)
    add_output_options(parser, output_file="output.txt")
    args = parser.parse_args()
    check_output_options(parser, args)
    return args


def predict_chunks(args, checkpoint, data_path, total, output, rank=0, ranks=1):
    """Write the rows of every chunk whose number is `rank` modulo `ranks` to the text stream `output`."""
    with progress_bar(total, "Predicting", leave=True, disable=rank > 0) as progress:
        for number, chunk in enumerate(read_chunks(data_path, args.data_file == "-")):
            if number % ranks == rank:
                tokens = tokenize(chunk, checkpoint.encode)
                probs = predict_probs(checkpoint, tokens, args.batch_size, progress=progress if ranks == 1 else None)
                write_rows(output, make_rows(chunk, probs, checkpoint.labels, args), args)
            if ranks > 1:
                progress.update(len(chunk))


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
    label_path = find_label_file(args)
    check_output(args.output_file, [data_path, label_path, args.params_path], args.dataset_dir)
    total = None if from_stdin else count_texts(data_path)
    select_device(args.device)
    checkpoint = load_checkpoint(args.params_path, label_path, args.max_seq_length)
    check_labels(args, checkpoint.labels)
    if ranks == 1:
        with open_output(args) as output:
            predict_chunks(args, checkpoint, data_path, total, output)
    else:
        predict_in_parts(args, checkpoint, data_path, total, rank, ranks)
    if is_main_rank() and not to_stdout:
        get_logger().info(f"Prediction results save in {args.output_file}.")


def predict_in_parts(args, checkpoint, data_path, total, rank, ranks):
    """Each rank writes its chunks to a hidden file beside the output; rank 0 joins them when all are done."""
    from textcls.models.paddle_setup import paddle

    folder, name = os.path.split(os.path.abspath(args.output_file))
    parts = [os.path.join(folder, f".{name}.rank-{index}.part") for index in range(ranks)]
    paddle.distributed.init_parallel_env()
    try:
        with complete_file(parts[rank], newline="") as output:
            predict_chunks(args, checkpoint, data_path, total, output, rank, ranks)
        paddle.distributed.barrier()
        if rank == 0:
            with open_output(args) as output:
                output.flush()
                merge_parts(parts, output.buffer)
        paddle.distributed.barrier()
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(parts[rank])


if __name__ == "__main__":
    run_script(main)
