"""Label texts by Triton's HTTP interface, with JSON (KServe's v2 protocol); needs nothing but numpy (for utils.py).

    python seqcls_http_client.py 头疼怎么办 拔牙多少钱
    python seqcls_http_client.py --top_k 3 --output_format jsonl --data_file ../../data/data.txt
    python seqcls_http_client.py --url http://127.0.0.1:8000 --timeout 10 头疼怎么办

Reads   texts from the command line, or --data_file, one per line (-: standard input).
Prints  a block per text: text, label, confidence; or with --output_format jsonl a JSON object per text.
"""

import json
import sys
from pathlib import Path
import urllib.error
import urllib.request
from http.client import HTTPException

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from client import MODEL, label_texts, no_answer, parse_arguments, refused
from textcls.errors import UserError, run_script


def make_ask(args):
    """The function that `label_texts` wants, by HTTP."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would look for 127.0.0.1 on itself

    def send(texts):
        """The answer to one request, parsed from JSON."""
        values = {"name": "INPUT", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}
        body = json.dumps({"inputs": [values], "parameters": {"top_k": args.top_k}}).encode()
        try:
            request = urllib.request.Request(f"{args.url}/v2/models/{MODEL}/infer", body, {"Content-Type": "application/json"})
            with opener.open(request, timeout=args.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            try:
                reason = json.load(error)["error"]
            except (ValueError, KeyError, TypeError):  # not from Triton
                reason = f"status {error.code}"
            raise refused(args, reason) from None
        except HTTPException:
            raise no_answer(args, "not HTTP") from None
        except (OSError, ValueError) as error:  # no connection, no URL, no JSON
            raise no_answer(args, getattr(error, "reason", error)) from None

    def ask(texts):
        answer = send(texts)
        try:
            data = {item["name"]: item["data"] for item in answer["outputs"]}
            labels, confidences = ([data[name][start:start + args.top_k] for start in range(0, len(data[name]), args.top_k)]
                                   for name in ("label", "confidence"))  # JSON has the tables flat
        except (KeyError, TypeError):
            labels = confidences = []
        if not len(labels) == len(confidences) == len(texts):
            raise UserError(f"{args.url}: not an answer of {MODEL}, expected label and confidence of {len(texts)} texts")
        return labels, confidences

    return ask


def main():
    args = parse_arguments(__doc__.splitlines()[0], "http://127.0.0.1:8000")
    label_texts(args, make_ask(args))


if __name__ == "__main__":
    run_script(main)
