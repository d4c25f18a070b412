"""Label texts by Triton's HTTP interface, with JSON (KServe's v2 protocol); needs nothing but numpy.

    python seqcls_http_client.py 头疼怎么办 拔牙多少钱
    python seqcls_http_client.py --top_k 3 --output_format jsonl --data_file ../../data/data.txt
    python seqcls_http_client.py --url http://127.0.0.1:8000 --timeout 10 头疼怎么办

Reads   texts from the command line, or --data_file, one per line (-: standard input).
Prints  a block per text: text, label, confidence, and known where the model tells unknown texts; or with --output_format jsonl
        a JSON object per text.
"""

import json
from argparse import Namespace

from seqcls import EXPECTED, MODEL, make_block, make_parameters, refused

from textcls.common.errors import UserError, run_script
from textcls.runtime.client import Ask, Prediction, make_client_parser, post_json, run_client


def make_ask(args: Namespace) -> Ask:
    """Make the function that `run_client` wants, by HTTP."""
    def ask(texts):
        values = {"name": "INPUT", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}
        request = {"inputs": [values], "parameters": make_parameters(args)}
        status, content = post_json(args, request, EXPECTED, f"/v2/models/{MODEL}/infer")
        if status != 200:
            raise refused(args, read_reason(status, content))
        try:
            data = {item["name"]: item["data"] for item in json.loads(content)["outputs"]}
            pairs = list(zip(data["label"], data["confidence"]))  # JSON has the tables flat
            known = data.get("known", [None] * len(texts))
        except ValueError as error:
            raise UserError(f"{args.url}: no answer ({error}), expected {EXPECTED}") from None
        except (KeyError, TypeError):
            return []
        if len(pairs) != len(texts) * args.top_k or len(known) != len(texts):
            return []
        return [Prediction(pairs[start:start + args.top_k], own) for start, own in zip(range(0, len(pairs), args.top_k), known)]

    return ask


def read_reason(status: int, content: bytes) -> str:
    """Return what a refusal says."""
    try:
        return json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):  # not from Triton
        return f"status {status}"


def main():
    run_client(make_client_parser(__doc__, "http://127.0.0.1:8000", batch_size=32), make_ask, make_block)


if __name__ == "__main__":
    run_script(main)
