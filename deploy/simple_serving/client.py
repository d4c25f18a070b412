"""Label texts by a running server.py; needs nothing but Python.

    python client.py 头疼怎么办 拔牙多少钱
    python client.py --data_file ../../data/data.txt --top_k 3
    python client.py --url http://10.0.0.5:8189 --token_file token.txt --output_format jsonl --data_file texts.txt

Reads   texts from the command line, or --data_file, one per line (-: standard input).
Prints  a block per text: the text, its labels, a line of dashes; or with --output_format jsonl a JSON object per text.
"""

import argparse
import http.client
import json
import sys
from pathlib import Path
import urllib.error
import urllib.request

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import read_texts
from textcls.errors import Problems, UserError, run_script
from textcls.options import positive_int


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("texts", nargs="*", help="texts to label")
    parser.add_argument("--data_file", help="texts, one per line; -: standard input")
    parser.add_argument("--url", default="http://127.0.0.1:8189", help="where server.py listens")
    parser.add_argument("--token_file", help="file with the server's token")
    parser.add_argument("--top_k", type=positive_int, default=1, help="labels per text")
    parser.add_argument("--batch_size", type=positive_int, default=64, help="texts per request")
    parser.add_argument("--timeout", type=positive_int, default=60, help="seconds to wait for an answer")
    parser.add_argument("--output_format", default="txt", choices=["txt", "jsonl"])
    args = parser.parse_args()
    if bool(args.texts) == bool(args.data_file):
        parser.error("expected either texts or --data_file")
    return args


def read_input(args):
    """The texts of the command line or of --data_file: list of str. UserError."""
    if args.texts:
        return args.texts
    problems = Problems()
    texts = list(read_texts(args.data_file, problems, sys.stdin.buffer if args.data_file == "-" else None))
    problems.report()
    return texts


def request(args, token, texts):
    """Ask the server for a list of str; returns the list of its answers, dicts of label, confidence, top_k. UserError."""
    body = json.dumps({"data": {"text": texts}, "parameters": {"top_k": args.top_k}}).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not lead to a server of one's own
        with opener.open(urllib.request.Request(f"{args.url}/predict", body, headers), timeout=args.timeout) as answer:
            return json.load(answer)["result"]
    except urllib.error.HTTPError as error:
        try:
            reason = "; ".join(f"{item['field']}: {item['message']}".lstrip(": ") for item in json.load(error)["errors"])
        except (ValueError, KeyError, TypeError):  # not from our server
            reason = error.reason
        raise UserError(f"{args.url}: refused with status {error.code} ({reason}), expected what README.md says") from None
    except (OSError, ValueError, KeyError, TypeError) as error:  # no connection, no URL, or another kind of server
        raise UserError(f"{args.url}: no answer ({getattr(error, 'reason', error)}), expected the address of a running "
                        "server.py") from None
    except http.client.HTTPException:
        raise UserError(f"{args.url}: what answers there is no HTTP, expected the address of a running server.py") from None


def main():
    args, token = parse_arguments(), None
    if args.token_file:
        with open(args.token_file, encoding="latin-1") as file:
            token = file.read().strip()
        if not token.isascii() or len(token.split()) != 1:
            raise UserError(f"{args.token_file}: holds no token, expected the one line of the server's token file")
    texts = read_input(args)
    sys.stdout.reconfigure(encoding="utf-8")
    for start in range(0, len(texts), args.batch_size):
        chunk = texts[start:start + args.batch_size]
        for text, answer in zip(chunk, request(args, token, chunk)):
            if args.output_format == "jsonl":
                print(json.dumps({"text": text, **answer}, ensure_ascii=False))
            else:
                labels = ", ".join(f"{top['label']} ({top['confidence']:.6f})" for top in answer["top_k"])
                print(f"data: {text}\nlabel: {labels}\n{'-' * 29}")


if __name__ == "__main__":
    run_script(main)
