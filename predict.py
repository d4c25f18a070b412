"""Label the texts of a file, or of standard input, with a trained classifier.

    python predict.py --device gpu --max_seq_length 128 --batch_size 32 --dataset_dir data
    python predict.py --dataset_dir data --output_format jsonl --top_k 3 --threshold 0.5 --output_file output.jsonl
    python predict.py --dataset_dir data --output_format jsonl --least_known 0.5 --output_file output.jsonl
    python predict.py --dataset_dir data --data_file many.parquet --output_format parquet --output_file many.out.parquet --resume
    cat texts.txt | python predict.py --data_file - --output_file output.txt
    python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo predict.py --device cpu --dataset_dir data
    python -m textcls.launch --master 10.0.0.1:6170 --nnodes 2 --rank 0 predict.py --device cpu ...    # on each host: its rank

Reads   dataset_dir/data.txt (one text per line; .gz is decompressed) or a .parquet file, params_path (made by train.py).
Writes  output_file in the order of the input. txt: header and `<text><tab><label>`; tsv and csv: label and probability of
        the top_k classes in columns, xlsx, for Excel, and parquet: the same; jsonl: {"text", "label", "probability", "top_k":
        [{"label", "probability"}, ...]}, and of a model that tells unknown texts "known", the probability that the text is of
        one of its labels at all (train.py --known centres).
"""

import contextlib
import itertools
import os

from textcls.common.digests import sha256
from textcls.common.errors import UserError, is_main_rank, run_script
from textcls.common.log import get_logger
from textcls.common.options import add_model_options, find_label_file, make_parser
from textcls.common.outputs import complete_file
from textcls.common.probabilities import softmax
from textcls.data.parquet import is_parquet
from textcls.models.checkpoints import load_checkpoint, saved_threshold
from textcls.models.device import select_device
from textcls.models.inference import predict_known
from textcls.models.processes import begin_processes, collect_files, compare_records, wait_for_all
from textcls.runtime.parts import hash_files
from textcls.runtime.predictions import (
    add_known_option,
    add_output_options,
    check_files,
    check_labels,
    check_least_known,
    check_output_options,
    input_path,
    label_chunks,
    make_rows,
    open_output,
    read_chunks,
    write_answers,
    write_rows,
)
from utils import tokenize


def parse_arguments():
    parser = make_parser(__doc__)
    add_model_options(parser)
    add_output_options(parser, output_file="output.txt")
    add_known_option(parser)
    args = parser.parse_args()
    check_output_options(parser, args)
    return args


def merge_parts(parts, sizes, output):
    """Copy the ranks' chunks to `output` in the order of the input. parts: paths, in rank order; sizes: lines of each chunk."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part, "rb")) for part in parts]
        for file, size in zip(itertools.cycle(files), sizes):
            output.writelines(itertools.islice(file, size))


def main():
    args = parse_arguments()
    if args.threshold == "auto":
        args.threshold = saved_threshold(args.params_path, args.max_seq_length)
    rank, ranks = int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
    from_stdin, to_stdout = args.data_file == "-", args.output_file == "-"
    if ranks > 1 and (from_stdin or to_stdout or is_parquet(args.data_file) or args.output_format in ("xlsx", "parquet")):
        raise UserError("standard input and output, Parquet files and workbooks work in a single process, expected text files "
                        "under paddle.distributed.launch")
    if ranks > 1 and args.resume:
        raise UserError("--resume works in a single process, expected no paddle.distributed.launch with it")
    if ranks > 1:
        begin_processes(vars(args))
    label_path = find_label_file(args)
    total = check_files(args, [label_path, args.params_path])
    select_device(args.device)
    checkpoint = load_checkpoint(args.params_path, label_path, args.max_seq_length)
    check_labels(args, checkpoint.labels)
    check_least_known(args.least_known, checkpoint.centres is not None, checkpoint.labels)

    def rows_of(texts, progress):
        logits, known = predict_known(checkpoint, tokenize(texts, checkpoint.encode), args.batch_size, progress)
        return make_rows(texts, softmax(logits, checkpoint.temperature), checkpoint.labels, args, known)

    if ranks > 1:
        compare_records("data", {f"the SHA-256 of {args.data_file}": sha256(input_path(args)),
                                 "the SHA-256 of the files in --params_path": hash_files(args.params_path)})
    if ranks == 1:
        write_answers(args, total, rows_of, [args.params_path])
    else:
        rows = itertools.chain.from_iterable(label_chunks(args, total, rows_of, rank, ranks))
        predict_in_parts(args, rows, rank, ranks)
    if is_main_rank() and not to_stdout:
        get_logger().info(f"Prediction results save in {args.output_file}.")


def predict_in_parts(args, rows, rank, ranks):
    """Each rank writes its rows to a hidden file beside the output; rank 0 joins them when all are done and on its host."""
    folder, name = os.path.split(os.path.abspath(args.output_file))
    parts = [os.path.join(folder, f".{name}.rank-{index}.part") for index in range(ranks)]
    try:
        with complete_file(parts[rank], newline="") as output:
            write_rows(output, rows, args)
        wait_for_all("answers")
        collect_files(parts)
        if rank == 0:
            with open_output(args) as output:
                output.flush()
                merge_parts(parts, map(len, read_chunks(input_path(args))), output.buffer)
        wait_for_all("output")
    finally:
        for part in parts if rank == 0 else parts[rank:rank + 1]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(part)


if __name__ == "__main__":
    run_script(main)
