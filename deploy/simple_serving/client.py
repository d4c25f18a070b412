"""Label texts by a running server.py; needs nothing but numpy.

    python client.py 头疼怎么办 拔牙多少钱
    python client.py --data_file ../../data/data.txt --top_k 3
    python client.py --url http://10.0.0.5:8189 --token_file token.txt --output_format jsonl --data_file texts.txt
    python client.py --num_nearest 2 --threshold 0.5 头疼怎么办

Reads   texts from the command line, or --data_file, one per line (-: standard input).
Prints  a block per text: the text, its labels, a line of dashes; or with --output_format jsonl a JSON object per text. A server
        with an index also gives the similarity of each label, and with --num_nearest the texts that were the nearest.
"""

import json
from argparse import Namespace
from http.client import responses

from textcls.common.errors import UserError, run_script
from textcls.common.options import positive_int, read_token_file
from textcls.runtime.client import Ask, make_client_parser, post_json, run_client

EXPECTED = "the address of a running server.py"


def make_ask(args: Namespace) -> Ask:
    """Make the function that `run_client` wants; it returns per text the server's answer, a dict."""
    headers = {"Authorization": f"Bearer {read_token_file(args.token_file)}"} if args.token_file else {}
    wanted = {name: getattr(args, name) for name in ("top_k", "num_nearest", "threshold", "least_known")}
    parameters = {name: value for name, value in wanted.items() if value is not None}

    def ask(texts):
        request = {"data": {"text": texts}, "parameters": parameters}
        status, content = post_json(args, request, EXPECTED, "/predict", headers)
        if status != 200:
            raise UserError(f"{args.url}: refused with status {status} ({read_reason(status, content)}), expected what README.md "
                            "says")
        try:
            results = json.loads(content)["result"]
            for result in results:
                make_block("", result)
            return results
        except (ValueError, KeyError, TypeError) as error:  # another kind of server
            raise UserError(f"{args.url}: no answer ({error}), expected {EXPECTED}") from None

    return ask


def read_reason(status: int, content: bytes) -> str:
    """Return what a refusal says, in one line."""
    try:
        return "; ".join(f"{item['field']}: {item['message']}".lstrip(": ") for item in json.loads(content)["errors"])
    except (ValueError, KeyError, TypeError):  # not from our server
        return responses.get(status, "unknown")


def make_block(text: str, result: dict) -> list[str]:
    """Make the lines of a block. result: the server's answer."""
    best, *others = result["top_k"]
    labels = [{**best, "label": result["label"]}, *others]  # the text may be undecided
    lines = [f"data: {text}", "label: " + ", ".join(f"{top['label']} ({top['confidence']:.6f})" for top in labels)]
    if "similarity" in best:
        lines.append("similarity: " + ", ".join(f"{top['similarity']:.6f}" for top in labels))
    elif "known" in result:
        lines.append(f"known: {result['known']:.6f}")
    return lines + [f"near: {near['text']} ({near['label']}, {near['similarity']:.6f})" for near in result.get("nearest", [])]


def make_row(text: str, result: dict) -> dict:
    """Make the JSON object of a text."""
    return {"text": text, **result}


def main():
    parser = make_client_parser(__doc__, "http://127.0.0.1:8189", batch_size=64)
    parser.add_argument("--token_file", help="file with the server's token")
    parser.add_argument("--num_nearest", type=positive_int, help="how many of the nearest texts a server with an index gives")
    run_client(parser, make_ask, make_block, make_row)


if __name__ == "__main__":
    run_script(main)
