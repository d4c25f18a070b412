"""Measure deploy/simple_serving and deploy/triton_serving against the offline predictor on the same texts, in one run.

    KUAKE_QIC_DIR=folder ERNIE_VOCAB=vocab.txt make bench-serving
    python benchmarks/bench_serving.py --kuake_dir folder --vocab vocab.txt

The model has the shape of ERNIE 3.0 Nano and seeded random weights; the texts are KUAKE-QIC's dev.txt in the order of the
file. The predictor gets all of them at once, and 32 at a time (the next 32 when these are done); the servers get them from 32
concurrent clients, one text per request, on the same cores, with batches of several requests and without. They take turns,
the best of --repeats counts. The percentages are of the two rates of the predictor.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

import bench

import load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEPLOY, CLIENTS = os.path.join(ROOT, "deploy"), 32


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kuake_dir", default=os.environ.get("KUAKE_QIC_DIR"), help="default: KUAKE_QIC_DIR")
    parser.add_argument("--vocab", default=os.environ.get("ERNIE_VOCAB", f"{ROOT}/data/vocab.txt"), help="ERNIE_VOCAB")
    parser.add_argument("--python", default=f"{ROOT}/.venv-simple-serving/bin/python", help="of the server's environment")
    parser.add_argument("--triton_python", default=f"{ROOT}/.venv-triton/bin/python", help="of Triton's environment")
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


def read_log(process, path):
    """What a server has logged; the end of this script where the server has ended."""
    with open(path, encoding="utf-8", errors="replace") as file:
        content = file.read()
    if process.poll() is not None:
        sys.exit(content)
    return content


@contextlib.contextmanager
def simple_serving(args, export, folder, *options):
    """Run deploy/simple_serving; gives (port, function of a text: its request)."""
    log = os.path.join(folder, "simple.log")
    command = [args.python, f"{DEPLOY}/simple_serving/server.py", "--export_dir", export, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=open(log, "w", encoding="utf-8"))
    try:
        while '"listening"' not in (content := read_log(process, log)):
            time.sleep(0.1)
        yield int(json.loads(content.split("\n")[0])["url"].rsplit(":", 1)[1]), load.encode
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def triton_serving(args, export, folder, *options):
    """Run deploy/triton_serving without a container; gives (port, function of a text: its request)."""
    models, log, ports = os.path.join(folder, "models"), os.path.join(folder, "triton.log"), []
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.append(str(taken.getsockname()[1]))
    subprocess.run([args.triton_python, f"{DEPLOY}/triton_serving/build_repository.py", "--export_dir", export,
                    "--model_repository", models, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(
        [args.triton_python, f"{DEPLOY}/triton_serving/start_server.py", "--model_repository", models, "--http_port", ports[0],
         "--grpc_port", ports[1], "--metrics_port", ports[2]], stderr=open(log, "w", encoding="utf-8"))
    try:
        while "Started HTTPService" not in read_log(process, log):
            time.sleep(0.1)
        yield int(ports[0]), lambda text: load.encode_body("/v2/models/seqcls/infer", {"inputs": [
            {"name": "INPUT", "datatype": "BYTES", "shape": [1, 1], "data": [text]}]})
    finally:
        process.terminate()
        process.wait()


def offline(export, texts, size):
    """Texts per second of the predictor, so many at a time."""
    from textcls.runtime.predictor import Predictor

    predictor = Predictor(export)
    predictor(texts)  # warm-up
    start = time.perf_counter()
    for first in range(0, len(texts), size):
        predictor(texts[first:first + size])
    return [len(texts) / (time.perf_counter() - start)]


def clients(port, requests):
    """[requests per second, p50 and p99 in ms] of a server under CLIENTS clients."""
    import uvloop  # so that the clients cost little
    seconds = []

    def on_answer(key, status, body, took):
        if status != 200:
            sys.exit(f"status {status}: {body}")
        seconds.append(took * 1000)

    start = time.perf_counter()
    uvloop.run(load.drive(port, CLIENTS, ((None, request.encode()) for request in requests), on_answer))
    rate = len(requests) / (time.perf_counter() - start)
    seconds.sort()
    return [rate, seconds[len(seconds) // 2], seconds[len(seconds) * 99 // 100]]


def turn(args, folder, worker, *arguments):
    """Run one of the two functions above in a process of the server's environment."""
    job = os.path.join(folder, "turn.json")
    with open(job, "w", encoding="utf-8") as file:
        json.dump([worker, arguments], file)
    done = subprocess.run([args.python, os.path.abspath(__file__), "turn", job], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        texts, export = make_export(args, folder), os.path.join(folder, "export")
        jobs = {"predictor, all texts at once": ("offline", export, texts, len(texts)),
                "predictor, 32 at a time": ("offline", export, texts, 32)}
        for name, server, options in (
                ("simple_serving", simple_serving, []), ("  without batches", simple_serving, ["--batch_size", "1"]),
                ("triton_serving", triton_serving, []), ("  without batches", triton_serving, ["--max_batch_size", "1"])):
            place = os.path.join(folder, str(len(jobs)))
            os.mkdir(place)
            port, encode = stack.enter_context(server(args, export, place, *options))
            jobs[name if name not in jobs else name + " "] = ("clients", port, [encode(text).decode() for text in texts])
        turns = [{name: turn(args, folder, *job) for name, job in jobs.items()} for _ in range(args.repeats)]
    best = {name: max(results[name] for results in turns) for name in jobs}
    offline_rates = [rate for rate, *latencies in best.values() if not latencies]
    for name, (rate, *latencies) in best.items():
        print(f"{name:<30}{rate:7.0f}/s", *(f"{rate / other:5.0%}" for other in offline_rates),
              *(f"{name} {ms:.1f} ms" for name, ms in zip(("p50", "p99"), latencies)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["turn"]:
        with open(sys.argv[2], encoding="utf-8") as turn_file:
            function, function_arguments = json.load(turn_file)
        print(json.dumps({"offline": offline, "clients": clients}[function](*function_arguments)))
    else:
        main()
