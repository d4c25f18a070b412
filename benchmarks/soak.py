"""Keep deploy/simple_serving under load for a long time: compare each answer with the right one, and watch memory.

    python benchmarks/soak.py --export_dir output --texts data/data.txt --minutes 60
    python benchmarks/soak.py --export_dir export --texts data/data.txt --minutes 1 --workers 2

The clients, 64, ask one text per request for the most part. Now and then one starts anew, reads a long answer slowly, sends its
request in pieces, or breaks its connection off, before its request is complete or before it has an answer. Where export_dir holds
an index, in its folder index, a label comes into a copy of it and goes again, every --swap_seconds.

Reads   export_dir, of export_model.py --onnx, or an encoder of retrieval_based/export_model.py; texts, one per line.
Prints  each minute and at the end: requests, their rate, p50 and p99 in ms, the memory (RSS) of the server. Its growth is from
        the end of the warm-up, a tenth of the time, to the end. Code 1 where an answer was wrong or did not come.

The server listens on 127.0.0.1 only. It ends after --minutes or --most_requests.
"""

import argparse
import array
import asyncio
import collections
import contextlib
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from load import Client, encode_body, simple_serving
from measuring import ROOT, print_setting
from textcls.retrieval.changes import add_texts, remove_label
from textcls.retrieval.encoder import open_encoder
from textcls.retrieval.predictor import SearchPredictor
from textcls.runtime.exported import read_export
from textcls.runtime.predictor import Predictor

LABEL = "soak"  # that comes and goes; one that the index has not
CLOSE = 1e-4  # between two probabilities, or similarities: the sums of a batch differ a little from those of another one
SLACK = 3.0  # seconds for which an answer may still be that of the index before its last change: a batch was on its way
MANY = 64  # texts of a request whose answer is read slowly
ACTIONS = {"ask": 90, "start anew": 4, "read slowly": 2, "send slowly": 2, "break off": 2}  # name -> weight
SAMPLES = 10  # of the memory, one a second, whose median is a figure


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--export_dir", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="file of texts, one per line; the first 500 are asked")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--most_requests", type=int, default=50_000_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--swap_seconds", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", default=f"{ROOT}/.venv-simple-serving/bin/python", help="of the server's environment")
    args = parser.parse_args()
    if not (0 < args.minutes <= 7 * 24 * 60 and 0 < args.clients <= 400):
        parser.error("expected --minutes up to a week, and --clients up to 400")
    return args


class Model:
    """The right answers, {text: {label: probability}}: of the index without LABEL and with it, or of a classifier."""

    def __init__(self, export_dir, texts, folder):
        self.index = None
        self.changes = [(0.0, 0)]  # (time, which of `right` is right from then on)
        if read_export(export_dir, output=None).labels:
            predictor = Predictor(export_dir, num_threads=1)
            self.parameters, self.many = {"top_k": 2}, {"top_k": len(predictor.labels)}
            labels, probs = predictor(texts, len(predictor.labels))
            self.right = [{text: dict(zip(names, row.tolist())) for text, names, row in zip(texts, labels, probs)}]
            return
        self.index = folder / "index"
        shutil.copytree(export_dir / "index", self.index)
        self.parameters, self.many = {"top_k": 2, "num_nearest": 1}, {"top_k": 50, "num_nearest": 20}
        self.texts = texts[:1]  # of LABEL
        self.vectors = open_encoder(str(export_dir), num_threads=1).encode(self.texts)
        predictor = SearchPredictor(str(export_dir), str(self.index), num_threads=1)
        self.right = [self.answers(predictor, texts)]
        self.change(0)
        predictor.reload()
        self.right.append(self.answers(predictor, texts))
        self.change(1)
        self.changes = [(0.0, 0)]

    def answers(self, predictor, texts):
        return {text: {label: probability for label, probability, _ in found.top_k}
                for text, found in zip(texts, predictor.answer(texts, len(predictor.labels)))}

    def change(self, now):
        """Change the index, which is as `now`: 0 without LABEL, 1 with it. Takes some milliseconds."""
        self.changes = [*self.changes[-2:], (time.monotonic(), 1 - now)]  # before, since it may be noticed at once
        if now == 0:
            add_texts(self.index, LABEL, self.texts, self.vectors)
        else:
            remove_label(self.index, LABEL)

    def problem(self, texts, status, body, since):
        """Say what is wrong with an answer to a request sent at the time `since`; None: nothing."""
        if status != 200:
            return f"status {status}: {body[:300]}"
        results = json.loads(body)["result"]
        if len(results) != len(texts):
            return f"{len(results)} answers to {len(texts)} texts"
        ends = [begin for begin, _ in self.changes[1:]] + [float("inf")]
        possible = {now for (_, now), end in zip(self.changes, ends) if end > since - SLACK}
        for text, result in zip(texts, results):
            if not any(is_right(result, self.right[now][text]) for now in possible):
                return f"{text}: {result}, expected {[self.right[now][text] for now in possible]}"
        return None


def is_right(result, right):
    """Whether the labels of an answer are the most probable ones, best first. right: {label: probability} of all labels."""
    best = sorted(right.values(), reverse=True)
    return result["label"] == result["top_k"][0]["label"] and all(
        abs(top["confidence"] - right.get(top["label"], 2)) <= CLOSE and abs(top["confidence"] - probability) <= CLOSE
        for top, probability in zip(result["top_k"], best))


class Soak:
    """Clients at work, and what they have seen."""

    def __init__(self, args, model, port, texts):
        self.args, self.model, self.port, self.texts = args, model, port, texts
        self.random = random.Random(args.seed)
        self.end = time.monotonic() + args.minutes * 60
        self.done, self.problems, self.lost = collections.Counter(), [], 0
        self.num_problems = 0
        self.seconds = array.array("f")  # of single texts

    def is_over(self):
        return time.monotonic() > self.end or sum(self.done.values()) >= self.args.most_requests

    def note(self, action, texts, outcome, since):
        """Count an answer and compare it."""
        self.done[action] += 1
        if outcome is None:
            self.lost += 1
            return
        if problem := self.model.problem(texts, *outcome, since):
            self.num_problems += 1
            self.problems = [*self.problems, problem][:5]

    async def client(self):
        connection = None
        while not self.is_over():
            [action] = self.random.choices(list(ACTIONS), ACTIONS.values())
            if connection is None or connection.closing or action == "start anew":
                if connection is not None:
                    connection.transport.close()
                _, connection = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", self.port)
            texts = self.random.sample(self.texts, MANY if action == "read slowly" else 1)
            parameters = self.model.many if action == "read slowly" else self.model.parameters
            request, since = encode_body("/predict", {"data": {"text": texts}, "parameters": parameters}), time.monotonic()
            if action == "break off":
                await self.break_off(connection, request)
                connection = None
                continue
            if action == "send slowly":
                for start in range(0, len(request) - 1, 60):  # all but the last byte
                    connection.transport.write(request[:-1][start:start + 60])
                    await asyncio.sleep(self.random.random() / 5)
                request = request[-1:]
            answer = connection.ask(request)
            if action == "read slowly":
                connection.transport.pause_reading()
                await asyncio.sleep(self.random.random() * 2)
                if not connection.transport.is_closing():
                    connection.transport.resume_reading()
            outcome = await answer
            if action in ("ask", "start anew"):
                self.seconds.append(time.monotonic() - since)
            self.note(action, texts, outcome, since)
        if connection is not None:
            connection.transport.close()

    async def break_off(self, connection, request):
        """Send a request, or the first part of it, and reset the connection at once or a moment later."""
        connection.transport.write(request[:self.random.choice((20, len(request) - 5, len(request)))])
        await asyncio.sleep(self.random.choice((0, 0.005, 0.05)))
        connection.transport.abort()
        self.done["break off"] += 1

    async def swap(self):
        """Change the index again and again, in a thread."""
        now = 0
        while self.model.index and not self.is_over():
            await asyncio.sleep(self.args.swap_seconds)
            await asyncio.to_thread(self.model.change, now)
            now, self.done["swap"] = 1 - now, self.done["swap"] + 1

    async def watch(self, process, memory):
        """Note the memory each second, print figures each minute."""
        begin = time.monotonic()
        while not self.is_over():
            await asyncio.sleep(1)
            memory.append(resident(process.pid))
            if len(memory) % 60 == 0:
                print(self.figures(begin), f"RSS {memory[-1]:.1f} MiB", flush=True)

    def figures(self, begin):
        took = sorted(self.seconds) or [0.0]
        passed = time.monotonic() - begin
        return (f"{passed:.0f} s: {sum(self.done.values())} requests, {sum(self.done.values()) / passed:.0f}/s, "
                f"p50 {1000 * took[len(took) // 2]:.1f} ms, p99 {1000 * took[len(took) * 99 // 100]:.1f} ms, "
                f"wrong {self.num_problems}, lost {self.lost},")

    async def run(self, process):
        """Run until the end; returns the figures and the memory, MiB each second."""
        memory, begin = [], time.monotonic()
        await asyncio.gather(self.watch(process, memory), self.swap(), *(self.client() for _ in range(self.args.clients)))
        return self.figures(begin), memory


def resident(pid):
    """Resident memory of a process and its children in MiB."""
    size = 0
    with contextlib.suppress(OSError):  # a child that has just ended
        for line in Path(f"/proc/{pid}/status").read_text().split("\n"):
            if line.startswith("VmRSS"):
                size = int(line.split()[1]) / 1024
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            size += resident(child)
    return size


def main():
    args = parse_arguments()
    lines = args.texts.read_text(encoding="utf-8").split("\n")
    texts = list(dict.fromkeys(text for line in lines if (text := line.split("\t")[0].strip())))[:500]
    if len(texts) < MANY:
        sys.exit(f"{args.texts}: {len(texts)} different texts, expected {MANY} at least")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Model(args.export_dir, texts, folder)
        options = ["--export_dir", args.export_dir, "--workers", args.workers]
        if model.index:
            options += ["--index_dir", model.index]
        with simple_serving(args.python, folder, *options) as (process, port):
            soak = Soak(args, model, port, texts)
            figures, memory = asyncio.run(soak.run(process))
        code = process.returncode
    print_setting([args.python])
    start, end = (statistics.median(part) for part in (memory[len(memory) // 10:][:SAMPLES], memory[-SAMPLES:]))
    print(figures, *(f"{count} x {name}," for name, count in soak.done.items()), f"server ended with code {code}")
    print(f"RSS {memory[0]:.1f} MiB in the first second, {start:.1f} after the warm-up, {end:.1f} at the end: "
          f"{end / start - 1:+.2%} after the warm-up; most {max(memory):.1f}")
    for problem in soak.problems:
        print("wrong:", problem)
    sys.exit(1 if soak.num_problems or soak.lost or code else 0)


if __name__ == "__main__":
    main()
