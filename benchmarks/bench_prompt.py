"""Measure how fast few-shot/train.py learns a prompt model, beside PaddleNLP's PromptTrainer as it comes, on this machine.

    python benchmarks/bench_prompt.py --vocab_file vocab.txt --train_file train.txt --label_file label.txt
    python benchmarks/bench_prompt.py ... --only stock                                # PromptTrainer alone

--train_file holds lines text<TAB>label, --label_file lines `label` or `label==word`. The model has the shape of ERNIE 3.0 Medium
and seeded random weights. Both get 8 texts a step, the prompt 这条新闻写的是 and the learning rates of the earlier application's
published command, and do not evaluate. Every measurement is a fresh process; the two take turns, the best of --repeats counts.
Steps per second: --steps divided by the time that the Trainer itself reports (train_runtime), without start, loading and saving.
As it comes: as in bench.py, with SoftVerbalizer and PromptDataCollatorWithPadding. Do not quote the ratio of a run that the bench
calls disturbed: other work on the machine adds time.
"""

import argparse
import tempfile

from measuring import CORES, Turns, start
from prompt_part import make_job, stock, suite


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name in ("vocab_file", "train_file", "label_file"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=30, help="default: 30, an epoch of 240 texts")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each, the best counts; default: 3")
    parser.add_argument("--only", choices=["stock", "suite"], help="leave the other out")
    args = parser.parse_args()
    workers, turns = {"stock": stock, "suite": suite}, Turns(args.repeats)
    names = [args.only] if args.only else list(workers)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(folder, "medium", args.vocab_file, args.train_file, args.label_file, args.steps)
        best = turns.best(stock, job, *({"worker": workers[name]} for name in names))
    for name, figures in zip(names, best):
        print(f"{name} {args.steps / figures['seconds']:.3f} steps/s")
    if len(names) == 2:
        print(f"ratio {best[0]['seconds'] / best[1]['seconds']:.2f}")
    print(f"{CORES} cores; {turns.quiet_note()}")


if __name__ == "__main__":
    start(main)
