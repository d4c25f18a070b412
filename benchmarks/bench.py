"""Measure this suite against Paddle as it comes and against Hugging Face with PyTorch, side by side on this machine.

    KUAKE_QIC_DIR=folder ERNIE_VOCAB=vocab.txt make bench             # all of it; makes the PyTorch environment too
    KUAKE_QIC_DIR=folder ERNIE_VOCAB=vocab.txt make bench BENCH="--quick --skip_torch"
    python benchmarks/bench.py --kuake_dir folder --vocab vocab.txt --torch_python .venv-bench/bin/python --profile
    python benchmarks/bench.py --kuake_dir folder --vocab vocab.txt --part predictor                # deploy/predictor only
    python benchmarks/bench.py ... --part prompt                    # only the training of few-shot/
    python benchmarks/bench.py --part retrieval                     # only that of retrieval_based/, needs no data
    python benchmarks/bench.py --part analysis                      # only the search of sent_interpret.py, needs no data
    python benchmarks/bench.py ... --part stacks --other_python .venv-paddle3/bin/python    # this suite with both Paddles

The models have the shapes of ERNIE 3.0 Nano and Medium and seeded random weights. Every measurement is a fresh process;
the variants take turns (A B C A B C ...) and the best of --repeats counts. Other work on the machine adds time, and far
more to PyTorch, whose threads wait for each other (measured: its ratio of 1.3 became 5), so the bench also says how
many cores other processes took: do not quote the ratios of a run that it calls disturbed.
As it comes: PaddlePaddle and PaddleNLP without this suite's process set-up (only the zlib crash is cured), PaddleNLP's
tokenizer, texts in file order (training: shuffled), padded to the longest of the batch by DataCollatorWithPadding.
PyTorch: a BERT of the same shape with transformers' defaults and Trainer, batches by length, a thread per core.
Training: time between steps of each library's Trainer, on batches spread evenly over the lengths of an epoch of the
variant's own sampler, so that few steps stand for the epoch. Two processes: 32 texts a step each.
deploy/predictor, text in and label out, is measured against ONNX Runtime itself on the same model and ready-made batches by
length (its own threads, one per core), and against the earlier application's way: paddle2onnx at every start, PaddleNLP's
tokenizer, all texts padded to the longest of all, batches in file order; its start is not counted. Cold start: from the
start of a process to its first label.
stacks: this suite in this environment and in --other_python, which has the other Paddle, on the same weights; each predictor
runs what its own stack exported, with its own ONNX Runtime.
prompt, retrieval: ms per text of few-shot/train.py at Medium's shape beside PaddleNLP's PromptTrainer (bench_prompt.py), and per
pair of retrieval_based/train.py at Nano's shape beside the earlier recipe (bench_retrieval.py). --quick: Nano, few steps.
analysis: seconds in which each method of sent_interpret.py finds the 3 training rows for and the 3 against 1,000 texts among
100,000, on seeded random features of the size of ERNIE 3.0 Medium, its preparations (the fit of representer) included.
"""

import argparse
import os
import sys
import tempfile
from types import SimpleNamespace

from analysis_part import measure_search
from core_part import measure_reading, measure_shape, profile
from measuring import ROOT, Turns, add_kuake_options, kuake_job, make_model, print_setting, start, work
from predictor_part import measure_predictor
from prompt_part import measure_prompt
from retrieval_part import measure_retrieval
from stacks_part import measure_stacks

STEPS = {"medium": 4, "nano": 40}
WITHOUT_DATA = ("analysis", "retrieval")  # parts that need no KUAKE-QIC


def parse_arguments():
    """The options, and the data for jobs ({} where only the search is measured)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_kuake_options(parser)
    parser.add_argument("--torch_python", default=os.path.join(ROOT, ".venv-bench", "bin", "python"))
    parser.add_argument("--skip_torch", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per variant, the best counts; default: 3")
    parser.add_argument("--quick", action="store_true", help="a trial: Nano, 1 repeat, 6 steps, 100,000 lines")
    parser.add_argument("--other_python", help="with --part stacks: the Python of an environment with the other Paddle")
    parser.add_argument("--part", choices=["all", "core", "predictor", "prompt", "retrieval", "analysis", "stacks"],
                        default="all", help="what to measure; default: all")
    parser.add_argument("--profile", action="store_true", help="add the costliest operations of training Nano")
    args = parser.parse_args()
    data = {} if args.part in WITHOUT_DATA else kuake_job(parser, args)
    if (args.part == "stacks") != bool(args.other_python):
        parser.error("expected --part stacks and --other_python together")
    args.torch_python = os.path.abspath(args.torch_python)
    args.with_torch = not args.skip_torch and os.path.isfile(args.torch_python)
    args.repeats = 1 if args.quick else max(1, args.repeats)
    return args, data


def main():
    args, data = parse_arguments()
    turns, report = Turns(args.repeats), SimpleNamespace(rows=[], ratios=[], stacks=[], notes=[])
    with tempfile.TemporaryDirectory() as folder:
        for shape in [] if args.part in (*WITHOUT_DATA, "prompt") else ["nano"] if args.quick else STEPS:
            job = {**data, "shape": shape, "folder": os.path.join(folder, shape), "steps": 6 if args.quick else STEPS[shape]}
            os.mkdir(job["folder"])
            work(make_model, job)
            if args.part == "stacks":
                measure_stacks(turns, report, job, args.other_python)
            if args.part in ("all", "core"):
                measure_shape(turns, report, job, args.quick, args.torch_python if args.with_torch else None)
            if args.part in ("all", "predictor"):
                measure_predictor(turns, report, job)
        for part, measure in (("prompt", measure_prompt), ("retrieval", measure_retrieval)):
            if args.part in ("all", part):
                measure(turns, report, os.path.join(folder, part), args)
        if args.part in ("all", "analysis"):
            measure_search(turns, report, folder, args.quick)
        if args.part in ("all", "core"):
            measure_reading(turns, report, job, 100000 if args.quick else 1000000)
            if args.profile:
                profile(report, job)
    report.notes.append(turns.quiet_note())
    print_report(args, report)


def print_report(args, report):
    """rows: [what, as it comes, this suite, PyTorch], None where not measured; ratios: [what, other, this suite, bar]; stacks:
    [what, here, other]."""
    print_setting([sys.executable, *([args.other_python] if report.stacks else [args.torch_python] * args.with_torch)])
    if report.stacks:
        print("{:<52}{:>12}{:>12}{:>8}".format("ms per text, best of " + str(args.repeats), "here", "other", "ratio"))
    else:
        print(f"figures   ms per text, best of {args.repeats}; ratio: other / this suite, above 1 this suite is faster\n")
    for what, own, other in report.stacks:
        print(f"{what:<52}{own:12.4g}{other:12.4g}{own / other:8.3g}")
    line = "{:<40}{:>12}{:>12}{:>8}{:>12}{:>8}".format
    if report.rows:
        print(line("what", "as it comes", "this suite", "ratio", "PyTorch", "ratio"))
    for what, stock, suite, torch in report.rows:
        cells = (stock, suite, stock and stock / suite, torch, torch and torch / suite)
        print(line(what, *(f"{cell:.4g}" if cell else "-" for cell in cells)))
    if report.ratios:
        print("\n{:<52}{:>12}{:>12}{:>8}{:>14}".format("deploy/predictor against", "other", "predictor", "ratio", "at least"))
    for what, other, own, bar in report.ratios:
        print(f"{what:<52}{other:12.4g}{own:12.4g}{other / own:8.3g}{bar:10} {'kept' if other / own >= bar else 'MISSED'}")
    if not args.with_torch and not report.stacks:
        report.notes.append(f"no PyTorch: --skip_torch, or no {args.torch_python} (make bench makes it)")
    print("\n" + "\n".join(report.notes))


if __name__ == "__main__":
    start(main)
