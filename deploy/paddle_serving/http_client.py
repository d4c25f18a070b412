"""Label texts by the service's HTTP interface; needs nothing but numpy.

    python http_client.py 头疼怎么办 拔牙多少钱
    python http_client.py --top_k 3 --data_file ../../data/data.txt
    python http_client.py --url http://127.0.0.1:9878/seq_cls/prediction 头疼怎么办

Reads   texts from the command line, or --data_file, one per line (-: standard input).
Prints  a block per text: text, label, confidence, and known where the model tells unknown texts; or with --output_format jsonl
        a JSON object per text.
"""

import json
from argparse import Namespace

from answers import make_request, read_answer

from textcls.common.errors import UserError, run_script
from textcls.runtime.client import Ask, make_client_parser, post_json, run_client

EXPECTED = "the address of a running service.py, or a longer --timeout"


def make_ask(args: Namespace) -> Ask:
    """Make the function that `run_client` wants, by HTTP."""
    def ask(texts):
        keys, values = make_request(args, texts)
        _, content = post_json(args, {"key": keys, "value": values}, EXPECTED)  # a refusal has the same form
        try:
            answer = json.loads(content)
            parts = answer["err_no"], answer["err_msg"], dict(zip(answer["key"], answer["value"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{args.url}: the answer is not that of service.py, expected its address") from None
        return read_answer(args, *parts)

    return ask


def main():
    parser = make_client_parser(__doc__, "http://127.0.0.1:9878/seq_cls/prediction", batch_size=100)
    run_client(parser, make_ask)


if __name__ == "__main__":
    run_script(main)
