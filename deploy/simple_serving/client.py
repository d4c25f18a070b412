"""Label texts by a running server.py; needs nothing but numpy.

    python client.py 头疼怎么办 拔牙多少钱
    python client.py --data_file ../../data/data.txt --top_k 3
    python client.py --url http://10.0.0.5:8189 --token_file token.txt --output_format jsonl --data_file texts.txt

Reads   texts from the command line, or --data_file, one per line (-: standard input).
Prints  a block per text: the text, its labels, a line of dashes; or with --output_format jsonl a JSON object per text.
"""

import json
import sys
from http.client import responses
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deploy.client import make_client_parser, post_json, run_client
from textcls.errors import UserError, run_script

EXPECTED = "the address of a running server.py"


def read_token(path):
    """The token in the server's token file. UserError."""
    with open(path, encoding="latin-1") as file:
        token = file.read().strip()
    if not token.isascii() or len(token.split()) != 1:
        raise UserError(f"{path}: holds no token, expected the one line of the server's token file")
    return token


def make_ask(args):
    """The function that `run_client` wants."""
    headers = {"Authorization": f"Bearer {read_token(args.token_file)}"} if args.token_file else {}

    def ask(texts):
        request = {"data": {"text": texts}, "parameters": {"top_k": args.top_k}}
        status, content = post_json(args, request, EXPECTED, "/predict", headers)
        if status != 200:
            raise UserError(f"{args.url}: refused with status {status} ({read_reason(status, content)}), expected what README.md "
                            "says")
        try:
            return [[(top["label"], top["confidence"]) for top in result["top_k"]] for result in json.loads(content)["result"]]
        except (ValueError, KeyError, TypeError) as error:  # another kind of server
            raise UserError(f"{args.url}: no answer ({error}), expected {EXPECTED}") from None

    return ask


def read_reason(status, content):
    """What a refusal says, in one line. content: bytes."""
    try:
        return "; ".join(f"{item['field']}: {item['message']}".lstrip(": ") for item in json.loads(content)["errors"])
    except (ValueError, KeyError, TypeError):  # not from our server
        return responses.get(status, "unknown")


def make_block(text, top):
    return [f"data: {text}", "label: " + ", ".join(f"{label} ({confidence:.6f})" for label, confidence in top)]


def main():
    parser = make_client_parser(__doc__, "http://127.0.0.1:8189", batch_size=64)
    parser.add_argument("--token_file", help="file with the server's token")
    run_client(parser, make_ask, make_block)


if __name__ == "__main__":
    run_script(main)
