"""Measure deploy/simple_serving against the offline predictor on the same texts, in one run.

    KUAKE_QIC_DIR=folder ERNIE_VOCAB=vocab.txt make bench-serving
    python tests/bench_serving.py --kuake_dir folder --vocab vocab.txt --python .venv-simple-serving/bin/python

The model has the shape of ERNIE 3.0 Nano and seeded random weights; the texts are KUAKE-QIC's dev.txt in the order of the
file. The predictor gets all of them at once, and 32 at a time (the next 32 when these are done); the server gets them from 32
concurrent clients, one text per request, on the same cores. They take turns, the best of --repeats counts.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time

import bench
import load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLIENTS = 32


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kuake_dir", default=os.environ.get("KUAKE_QIC_DIR"), help="default: KUAKE_QIC_DIR")
    parser.add_argument("--vocab", default=os.environ.get("ERNIE_VOCAB", f"{ROOT}/data/vocab.txt"), help="ERNIE_VOCAB")
    parser.add_argument("--python", default=f"{ROOT}/.venv-simple-serving/bin/python", help="of the server's environment")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not args.kuake_dir or not os.path.isfile(os.path.join(args.kuake_dir, "dev.txt")):
        parser.error(f"{args.kuake_dir}: no dev.txt there, expected KUAKE-QIC's folder as --kuake_dir or KUAKE_QIC_DIR")
    return args


def make_export(args, folder):
    """Write a Nano of random weights to folder/export; returns the dev texts."""
    with open(os.path.join(args.kuake_dir, "label.txt"), encoding="utf-8") as file:
        labels = file.read().splitlines()
    texts = {}
    for name in ("train", "dev"):
        with open(os.path.join(args.kuake_dir, f"{name}.txt"), encoding="utf-8", newline="\n") as file:
            texts[name] = [line.rstrip("\r\n").split("\t") for line in file]
    job = {"variant": "suite", "ranks": 1, "profile": False, "labels": labels, "texts": [row[0] for row in texts["train"]],
           "label_ids": [labels.index(row[1]) for row in texts["train"]], "vocab": os.path.abspath(args.vocab), "shape": "nano",
           "folder": folder, "sizes": dict(bench.SHAPES["nano"], **bench.SIZES), "steps": 1}
    args.torch_python = None
    bench.work(args, job, "make_model")
    bench.work(args, job, "export", quantize=False, threads=None, dev=[], variant="predictor")
    return [row[0] for row in texts["dev"]]


def measure(export, texts, port):
    """One turn: (texts/s of the predictor, 32 at a time, requests/s of the server, its p50 and p99 in ms)."""
    sys.path.insert(0, os.path.join(ROOT, "deploy", "predictor"))
    from predictor import Predictor
    predictor, rates = Predictor(export), []
    predictor(texts)  # warm-up
    for size in (len(texts), 32):
        start = time.perf_counter()
        for first in range(0, len(texts), size):
            predictor(texts[first:first + size])
        rates.append(len(texts) / (time.perf_counter() - start))
    requests, seconds = [(0, load.encode(text)) for text in texts], []

    def on_answer(key, status, body, took):
        if status != 200:
            sys.exit(f"status {status}: {body}")
        seconds.append(took * 1000)

    start = time.perf_counter()
    asyncio.run(load.drive(port, CLIENTS, iter(requests), on_answer))
    rates.append(len(texts) / (time.perf_counter() - start))
    seconds.sort()
    return [*rates, seconds[len(seconds) // 2], seconds[len(seconds) * 99 // 100]]


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        texts, export = make_export(args, folder), os.path.join(folder, "export")
        log = os.path.join(folder, "log")
        server = subprocess.Popen([args.python, f"{ROOT}/deploy/simple_serving/server.py", "--export_dir", export, "--port", "0"],
                                  stderr=open(log, "w", encoding="utf-8"))
        try:
            while True:
                with open(log, encoding="utf-8") as file:
                    content = file.read()
                if '"listening"' in content:
                    break
                if server.poll() is not None:
                    sys.exit(content)
                time.sleep(0.1)
            port = int(json.loads(content.split("\n")[0])["url"].rsplit(":", 1)[1])
            job = os.path.join(folder, "turn.json")
            with open(job, "w", encoding="utf-8") as file:
                json.dump([export, texts, port], file)
            turns = []
            for _ in range(args.repeats):
                done = subprocess.run([args.python, os.path.abspath(__file__), "turn", job], stdout=subprocess.PIPE, check=True)
                turns.append(json.loads(done.stdout))
                print("turn", *(f"{figure:.1f}" for figure in turns[-1]), file=sys.stderr)
        finally:
            server.terminate()
            server.wait()
    offline, chunks = (max(turn[place] for turn in turns) for place in (0, 1))
    _, _, rate, middle, late = max(turns, key=lambda turn: turn[2])
    print(f"predictor, all texts at once   {offline:7.0f} texts/s\npredictor, 32 at a time         {chunks:6.0f} texts/s\n"
          f"server, {CLIENTS} clients             {rate:6.0f} requests/s: {rate / offline:.0%} and {rate / chunks:.0%} of these\n"
          f"latency                        p50 {middle:.1f} ms, p99 {late:.1f} ms: {late / middle:.1f} times")


if __name__ == "__main__":
    if sys.argv[1:2] == ["turn"]:
        with open(sys.argv[2], encoding="utf-8") as turn_file:
            print(json.dumps(measure(*json.load(turn_file))))
    else:
        main()
