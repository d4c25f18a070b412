"""Measure deploy/simple_serving and deploy/triton_serving against the offline predictor on the same texts, in one run.

    KUAKE_QIC_DIR=folder ERNIE_VOCAB=vocab.txt make bench-serving
    python benchmarks/bench_serving.py --kuake_dir folder --vocab vocab.txt

The model has the shape of ERNIE 3.0 Nano, or --shape, and seeded random weights; the texts are KUAKE-QIC's dev.txt in the order
of the file. The predictor gets all of them at once, and 32 at a time (the next 32 when these are done); the servers get them
from 32 or 64 concurrent clients, one text per request, on the same cores, with batches of several requests and without. They take
turns, the best of --repeats counts. The percentages are of the two rates of the predictor. cpu is the time of all cores for a
text, of clients and server together, server that of the server alone: unlike the rates they hardly depend on what else the
machine does.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import load
from load import DEPLOY, running, simple_serving
from measuring import ROOT, SHAPES, Turns, add_kuake_options, kuake_job, make_model, start, work
from predictor_part import export

TICKS = os.sysconf("SC_CLK_TCK")  # of the times in /proc, per second


def parse_arguments():
    """The options, and the data for jobs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_kuake_options(parser)
    parser.add_argument("--python", default=f"{ROOT}/.venv-simple-serving/bin/python", help="of the server's environment")
    parser.add_argument("--triton_python", default=f"{ROOT}/.venv-triton/bin/python", help="of Triton's environment")
    parser.add_argument("--shape", choices=list(SHAPES), default="nano", help="of the model")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    return args, kuake_job(parser, args)


@contextlib.contextmanager
def triton_serving(python, folder, *options):
    """Run deploy/triton_serving without a container; gives its process and HTTP port."""
    models, ports = folder / "models", []
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.append(taken.getsockname()[1])
    subprocess.run([python, DEPLOY / "triton_serving/build_repository.py", "--model_repository", models, *options], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command = [python, DEPLOY / "triton_serving/start_server.py", "--model_repository", models, "--http_port", ports[0],
               "--grpc_port", ports[1], "--metrics_port", ports[2]]
    with running(command, folder / "triton.log", "Started HTTPService") as (process, _):
        yield process, ports[0]


def encode_triton(text):
    """The HTTP request of one text to Triton."""
    return load.encode_body("/v2/models/seqcls/infer", {"inputs": [
        {"name": "INPUT", "datatype": "BYTES", "shape": [1, 1], "data": [text]}]})


def offline(job):
    """Texts per second of the predictor, job["size"] at a time. Worker in the server's environment."""
    from textcls.runtime.predictor import Predictor

    predictor, texts = Predictor(job["export"]), job["dev"]
    predictor(texts)  # warm-up
    begin, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), job["size"]):
        predictor(texts[first:first + job["size"]])
    cpu = time.process_time() - cpu
    return {"rate": len(texts) / (time.perf_counter() - begin), "cpu": 1000 * cpu / len(texts)}


def cpu_seconds(pid):
    """CPU seconds of a process and of its children, those that have ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(int, fields[11:15])) / TICKS + sum(map(cpu_seconds, children))


def clients(job):
    """Requests per second, p50, p99, CPU in ms of all and of the server under job["clients"] clients. Worker in the server's
    environment."""
    import uvloop  # so that the clients cost little

    encode = encode_triton if job["triton"] else load.encode
    requests = [(None, encode(text)) for text in job["dev"]]
    server, own = cpu_seconds(job["pid"]), time.process_time()
    answers, rate = load.ask_all(job["port"], job["clients"], requests, uvloop.run)
    server, own = cpu_seconds(job["pid"]) - server, time.process_time() - own
    took = sorted(1000 * seconds for _, _, seconds in answers)
    return {"rate": rate, "p50": took[len(took) // 2], "p99": took[len(took) * 99 // 100],
            "cpu": 1000 * (server + own) / len(took), "server": 1000 * server / len(took), "server_seconds": server}


def main():
    args, data = parse_arguments()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        job = {**data, "folder": folder, "shape": args.shape, "export": os.path.join(folder, "export")}
        work(make_model, job)
        work(export, job)
        job["python"] = args.python
        variants = {"predictor, all texts at once": {"worker": offline, "size": len(data["dev"])},
                    "predictor, 32 at a time": {"worker": offline, "size": 32}}
        for name, server, python, options, numbers in (
                ("simple_serving", simple_serving, args.python, [], (32, 64)),
                ("  two workers", simple_serving, args.python, ["--workers", "2"], (64,)),
                ("  without batches", simple_serving, args.python, ["--batch_size", "1"], (32,)),
                ("triton_serving", triton_serving, args.triton_python, [], (32, 64)),
                ("  without batches ", triton_serving, args.triton_python, ["--max_batch_size", "1"], (32,))):
            place = Path(folder, str(len(variants)))
            place.mkdir()
            process, port = stack.enter_context(server(python, place, "--export_dir", job["export"], *options))
            for number in numbers:
                variants[f"{name}, {number} clients"] = {"triton": server is triton_serving, "port": port, "pid": process.pid,
                                                         "clients": number}
        turns = Turns(args.repeats)
        rounds = turns.rounds(clients, job, *variants.values())
    best = [max(repeats, key=lambda figures: figures["rate"]) for repeats in zip(*rounds)]
    for name, figures in zip(variants, best):
        print(f"{name:<36}{figures['rate']:7.0f}/s", *(f"{figures['rate'] / offline['rate']:5.0%}" for offline in best[:2]),
              *(f"{key} {figures[key]:.2f} ms" for key in ("cpu", "server", "p50", "p99") if key in figures))
    print(turns.quiet_note())


if __name__ == "__main__":
    start(main)
