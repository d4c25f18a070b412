"""What rpc_client.py and http_client.py share: options, texts in, answers out."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import read_texts
from textcls.errors import Problems, UserError
from textcls.options import positive_int


def parse_arguments(description, url):
    """Options of both clients. url: the default."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("texts", nargs="*", help="texts to label")
    parser.add_argument("--data_file", help="file of texts, one per line; -: standard input")
    parser.add_argument("--top_k", type=positive_int, default=1, help="how many labels per text")
    parser.add_argument("--url", default=url, help="where the service listens")
    parser.add_argument("--batch_size", type=positive_int, default=100, help="texts per request")
    parser.add_argument("--timeout", type=positive_int, default=60, help="seconds to wait for an answer")
    args = parser.parse_args()
    if bool(args.texts) == bool(args.data_file):
        parser.error("expected either texts or --data_file")
    return args


def label_texts(args, ask):
    """Print a block per text: data, label, confidence. With --top_k above 1 a block has the top labels, best first.

    ask: function of (keys, values: list of a list of str, then the str of --top_k) that sends one request and returns
    (err_no: int, err_msg: str, answer: dict of str as the service sends it). UserError where the service refuses.
    """
    texts = args.texts
    if args.data_file:
        problems = Problems()
        from_stdin = args.data_file == "-"
        texts = list(read_texts("standard input" if from_stdin else args.data_file, problems,
                                sys.stdin.buffer if from_stdin else None))
        problems.report()
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    for start in range(0, len(texts), args.batch_size):
        batch = texts[start:start + args.batch_size]
        number, message, answer = ask(["sentence", "top_k"], [batch, str(args.top_k)])
        if number != 0:
            raise UserError(f"{args.url}: request refused (err_no {number}): {message}")
        try:
            labels, confidences = json.loads(answer["label"]), json.loads(answer["confidence"])
            rows = [(", ".join(names), ", ".join(f"{value:.6f}" for value in values))
                    for names, values in zip(labels, confidences)]
        except (KeyError, TypeError, ValueError):
            rows = []
        if len(rows) != len(batch):
            raise UserError(f"{args.url}: not an answer of this service, expected label and confidence of {len(batch)} texts")
        for text, (label, confidence) in zip(batch, rows):
            print(f"data: {text}\nlabel: {label}\nconfidence: {confidence}\n{'-' * 29}")
