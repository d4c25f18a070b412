"""Measure what a slow network costs a training on two hosts: network namespaces of this machine, the cable limited by tc.

    KUAKE_QIC_DIR=folder python benchmarks/bench_hosts.py
    KUAKE_QIC_DIR=folder python benchmarks/bench_hosts.py --shapes nano --steps 25

Needs Linux, root, the commands ip and tc, and two cores: each host has one. The models have the shapes of ERNIE 3.0 and random
weights. Each row is a training of --steps steps; the first two do not count. `MB a step` is what a host has sent; `texts/s` is of
both hosts together, and of the row `one host` of the same training on a single core; `of two` is the share of twice that.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import BATCH, CORES, MAX_LENGTH, ROOT, SHAPES, add_kuake_options, foreign_seconds, make_random
from two_hosts import limit_rate, sent_bytes, start_launcher, two_hosts, why_not

NOT_COUNTED = 2  # steps


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_kuake_options(parser)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="of the models")
    parser.add_argument("--rates", nargs="+", type=int, default=[10000, 1000, 100], help="of the cable, million bits per second")
    parser.add_argument("--accumulate", nargs="+", type=int, default=[1, 8], help="values of --gradient_accumulation_steps")
    parser.add_argument("--steps", type=int, default=6, help="of each training")
    args = parser.parse_args()
    if not args.kuake_dir or why_not() or CORES < 2 or args.steps < NOT_COUNTED + 2:
        parser.error(f"expected --kuake_dir or KUAKE_QIC_DIR, two cores and --steps {NOT_COUNTED + 2} or more. {why_not()}")
    return args


def words_of(args, model, output, accumulate):
    """The command line of a training."""
    return ["train.py", "--model_name_or_path", model, "--data_dir", args.kuake_dir, "--output_dir", output, "--device", "cpu",
            "--do_train", "--max_steps", args.steps, "--per_device_train_batch_size", BATCH, "--max_seq_length", MAX_LENGTH,
            "--gradient_accumulation_steps", accumulate, "--logging_steps", 1, "--save_strategy", "no", "--report_to", "none",
            "--disable_tqdm", "true", "--overwrite_output_dir"]


def follow(process, count):
    """Read the log of a training. Returns for each step (when it ended, count() then)."""
    found, said = [], []
    for line in process.stderr:
        said.append(line)
        if re.search(r"global step \d+,", line):
            found.append((time.perf_counter(), count()))
    if process.wait():
        sys.exit("".join(said[-20:]))
    return found[NOT_COUNTED - 1:]


def measure(args, hosts, model, folder, rate, accumulate):
    """Train on two hosts, or without a rate on one. Returns (seconds a step, bytes that a host sends in it)."""
    environment, cores = {"OMP_NUM_THREADS": "1"}, sorted(os.sched_getaffinity(0))
    if rate is None:
        command = [sys.executable, *words_of(args, model, folder / "out", accumulate)]
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8",
                                   env={**os.environ, **environment})
        os.sched_setaffinity(process.pid, cores[:1])
        steps = follow(process, lambda: 0)
    else:
        launchers = []
        for rank, host in enumerate(hosts):
            limit_rate(host, rate)
            launchers.append(start_launcher(host, rank, folder / f"log{rank}", *words_of(
                args, model, folder / f"out{rank}", accumulate), **environment))
            os.sched_setaffinity(launchers[-1].pid, cores[rank:rank + 1])
        steps = follow(launchers[0], lambda: sent_bytes(hosts[0]))
        launchers[1].communicate()
    (begin, sent_before), (end, sent) = steps[0], steps[-1]  # the launcher passes lines on five times a second: no single steps
    return (end - begin) / (len(steps) - 1), (sent - sent_before) / (len(steps) - 1)


def main():
    args = parse_arguments()
    begin, foreign = time.perf_counter(), foreign_seconds()
    print(f"{'model':<8}{'network':<14}{'batches a step':>14}{'MB a step':>11}{'s a step':>10}{'texts/s':>9}{'of two':>8}",
          flush=True)
    with two_hosts() as hosts, tempfile.TemporaryDirectory() as name:
        for shape in args.shapes:
            model = Path(name) / shape
            make_random(model, shape)
            alone = {}
            for rate in [None, *args.rates]:
                for accumulate in args.accumulate:
                    seconds, sent = measure(args, hosts, model, Path(name), rate, accumulate)
                    texts = BATCH * accumulate * (1 if rate is None else 2) / seconds
                    if rate is None:
                        alone[accumulate], network, share = texts, "one host", ""
                    else:
                        network, share = f"{rate:,} Mbit/s", f"{texts / alone[accumulate] / 2:.0%}"
                    print(f"{shape:<8}{network:<14}{accumulate:>14}{sent / 1e6:>11.1f}{seconds:>10.2f}{texts:>9.1f}{share:>8}",
                          flush=True)
    print(f"other processes took {(foreign_seconds() - foreign) / (time.perf_counter() - begin):.2f} cores")


if __name__ == "__main__":
    main()
