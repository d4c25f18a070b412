"""Shared by the tests of analysis/review.py: a server of its own, requests to it, small data."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

from helpers import ROOT, open_url, read_lines, write_lines

LABELS = read_lines(ROOT / "data/label.txt")


class Server:
    """A running review.py, and requests to it."""

    def __init__(self, folder, *options):
        self.folder, self.log, self.options = folder, folder / "server.log", options
        self.start()

    def start(self):
        """Start it, once more where it was killed: it listens at another address then."""
        folder, options = self.folder, self.options
        words = ["--dataset_dir", folder, "--cache_dir", folder / "cache", "--port", "0", *map(str, options)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, ROOT / "analysis/review.py", *words], stderr=log, cwd=folder,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not (found := re.search(r"(http://127.0.0.1:\d+)/#token=([\w-]+)\S*", self.log.read_text(encoding="utf-8"))):
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            time.sleep(0.02)
        self.address, (self.url, self.token) = found.group(), found.groups()

    def ask(self, path, headers=None, **content):
        """(status, answer) of a request of the page, with other headers than its own where they are given."""
        body = json.dumps({"who": "amy", **content}).encode()
        request = urllib.request.Request(f"{self.url}/api/{path}", body, {
            "Content-Type": "application/json", "X-Review-Token": self.token, **(headers or {})})
        try:
            with open_url(request) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def decide(self, card, action="keep", who="amy", **content):
        status, answer = self.ask("decide", who=who, key=card["key"], action=action, seen=card["seen"], **content)
        assert status == 200, answer
        return answer

    def card(self, who="amy", kind="all"):
        return self.ask("card", who=who, kind=kind)[1]["card"]

    def kill(self):
        self.process.kill()
        self.process.wait()


def make_data(folder, count=140):
    """Rows of the sample data: train, dev, data and label files, with a text twice that has two labels, and one that is HTML."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("train.txt", count), ("dev.txt", 40), ("data.txt", 12), ("label.txt", None)):
        write_lines(folder / name, read_lines(ROOT / "data" / name)[:rows])
    text, label = read_lines(folder / "train.txt")[0].split("\t")
    other = LABELS[LABELS.index(label) - 1]
    more = [f"{text}？\t{other}", f"<b>感冒</b> & 发烧\t{LABELS[0]}"]
    write_lines(folder / "train.txt", read_lines(folder / "train.txt") + more)
    return folder


def entries(folder):
    return [json.loads(line) for line in read_lines(folder / "review.jsonl")]
