"""Run retrieval_based/ and deploy/simple_serving on a seeded synthetic set of very many labels; print accuracy, time and memory.

    python benchmarks/bench_many_labels.py

60,000 texts of 6,000 labels whose frequency falls as 1/rank, a dev and a test set of 2,000 drawn alike. A label is ten of
1,000 characters, the first four of them its name; a text has four of the ten among ten others of the same 1,000. The encoder
has ERNIE-Nano's shape and random weights. Every step is a command of the README in a process of its own; memory is that process's
largest resident set. Needs .venv-simple-serving; about a quarter of an hour on two cores.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import load
from measuring import ROOT, make_random

PYTHON = ROOT / ".venv-simple-serving/bin/python"
CLIENTS = 16
VOCABULARY = (ROOT / "data/vocab.txt").read_text(encoding="utf-8").split("\n")
CHARACTERS = [token for token in VOCABULARY if "\u4e00" <= token <= "\u9fff"][:1000]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=60_000)
    parser.add_argument("--labels", type=int, default=6_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--requests", type=int, default=2_000, help="to the server, of one text each")
    parser.add_argument("--output_dir", help="where everything is kept; None: a temporary folder")
    return parser.parse_args()


def draw_text(generator, own):
    """A text of 14 characters: four of its label's ten, in their order, among others."""
    text = generator.choice(CHARACTERS, 14)
    text[np.sort(generator.choice(14, 4, replace=False))] = own[np.sort(generator.choice(10, 4, replace=False))]
    return "".join(text)


def write_set(folder, args):
    """Write label.txt, train.txt, dev.txt and test.txt; every label has at least one training text."""
    generator = np.random.default_rng(0)
    characters = [generator.choice(CHARACTERS, 10, replace=False) for _ in range(args.labels)]
    labels = ["".join(own[:4]) for own in characters]
    share = 1 / np.arange(1, args.labels + 1)
    every_label = list(range(args.labels))
    for name, count, first in (("train", args.texts - args.labels, every_label), ("dev", 2000, []), ("test", 2000, [])):
        label_ids = first + list(generator.choice(args.labels, count, p=share / share.sum()))
        rows = [f"{draw_text(generator, characters[label])}\t{labels[label]}\n" for label in label_ids]
        (folder / f"{name}.txt").write_text("".join(rows), encoding="utf-8")
    (folder / "label.txt").write_text("".join(label + "\n" for label in labels), encoding="utf-8")


def run(script, *options):
    """Run a command line; prints its seconds and largest memory. Returns what it printed."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, f"retrieval_based/{script}.py", *map(str, options)], cwd=ROOT, encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(output)
    print(f"{script}.py: {time.perf_counter() - start:.0f} s, {usage.ru_maxrss / 1024:.0f} MB at most", flush=True)
    return output


def serve(folder, texts, requests):
    """Start deploy/simple_serving, send requests of one text each, and print speed, accuracy and largest memory."""
    options = ["--export_dir", folder / "export", "--index_dir", folder / "index"]
    with load.simple_serving(PYTHON, folder, *options) as (process, port):
        rows = [texts[number % len(texts)].split("\t") for number in range(requests)]
        answers, rate = load.ask_all(port, CLIENTS, ((label, load.encode(text)) for text, label in rows))
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    right = np.mean([json.loads(body)["result"][0]["label"] == label for label, body, _ in answers])
    megabytes, median = int(status.split("VmHWM:")[1].split()[0]) / 1024, 1000 * np.median([row[2] for row in answers])
    print(f"simple_serving: {rate:.0f} requests/s, median {median:.0f} ms, {100 * right:.2f} % right\n"
          f"simple_serving: {megabytes:.0f} MB at most")


def main():
    args = parse_arguments()
    with contextlib.ExitStack() as stack:
        folder = Path(args.output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_set(folder / "data", args)
        make_random(folder / "model", "nano")
        encoder = ["--params_path", folder / "export"]
        run("train", "--model_name_or_path", folder / "model", "--data_dir", folder / "data", "--output_dir", folder / "encoder",
            "--do_train", "--overwrite_output_dir", "--max_seq_length", 32, "--per_device_train_batch_size", 128,
            "--learning_rate", 5e-4, "--num_train_epochs", args.epochs, "--report_to", "none")
        run("export_model", "--params_path", folder / "encoder", "--output_path", folder / "export")
        print(run("build_index", *encoder, "--data_dir", folder / "data", "--index_dir", folder / "index", "--corpus", "texts"))
        print(run("evaluate", *encoder, "--index_dir", folder / "index", "--dataset_dir", folder / "data",
                  "--test_file", "test.txt", "--bad_case_file", folder / "bad_case.txt"))
        serve(folder, (folder / "data/test.txt").read_text(encoding="utf-8").splitlines(), args.requests)


if __name__ == "__main__":
    main()
