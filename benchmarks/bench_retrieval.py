"""Measure the training of sentence encoders: pairs per second beside the earlier recipe, and the memory of large batches.

    python benchmarks/bench_retrieval.py --quick                            # ERNIE-Nano's shape, random weights, two minutes
    python benchmarks/bench_retrieval.py --data_dir DIR --model_name_or_path MODEL

The earlier recipe: batches of 32 pairs (--earlier_batch_size) in random order; a text and the name of its label are tokenized
by PaddleNLP's own tokenizer as they come, every row's label is encoded, the loss compares each text with the label of each row;
[CLS] through the pooler. Both recipes see the same rows, train all weights by AdamW and pad to the longest of a batch.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

from measuring import ROOT, Turns, make_random, start, work
from retrieval_part import earlier, new


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default=str(ROOT / "data"))
    parser.add_argument("--model_name_or_path", help="model folder; None: random weights of ERNIE-Nano's shape")
    parser.add_argument("--max_seq_length", type=int, default=384)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--earlier_batch_size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=2048, help="training pairs of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="768 pairs, twice")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.repeats = 768, 2
    return args


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if not args.model_name_or_path:
            args.model_name_or_path = os.path.join(folder, "model")
            make_random(Path(args.model_name_or_path), "nano")
        job, turns = {**vars(args), "folder": folder, "chunk_size": 0}, Turns(args.repeats)
        ratios = []
        for number, results in enumerate(turns.rounds(new, job, {"worker": earlier}, {}), 1):
            speeds = [args.pairs / figures["seconds"] for figures in results]
            ratios.append(speeds[1] / speeds[0])
            print(f"run {number}: earlier recipe {speeds[0]:.1f} pairs/s, now {speeds[1]:.1f} pairs/s, ratio {ratios[-1]:.2f}")
        print(f"median ratio {np.median(ratios):.2f}\n{turns.quiet_note()}", flush=True)
        for batch_size, chunk in ((64, 0), (512, 64), (512, 0)):
            figures = work(new, job, batch_size=batch_size, chunk_size=chunk, pairs=512)
            megabytes = figures["peak_gb"] * 1e9 / 2**20
            print(f"batch of {batch_size}, chunks of {chunk or 'all'}: {megabytes:.0f} MB at most", flush=True)


if __name__ == "__main__":
    start(main)
