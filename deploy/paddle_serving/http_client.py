"""Label texts by the service's HTTP interface; needs nothing but numpy (for utils.py).

    python http_client.py 头疼怎么办 拔牙多少钱
    python http_client.py --top_k 3 --data_file ../../data/data.txt
    python http_client.py --url http://127.0.0.1:9878/seq_cls/prediction 头疼怎么办
"""

import json
import sys
from pathlib import Path
import urllib.error
import urllib.request
from http.client import HTTPException

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from client import label_texts, parse_arguments
from textcls.errors import UserError, run_script


def make_ask(args):
    """The function that `label_texts` wants, by HTTP."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would look for 127.0.0.1 on itself

    def ask(keys, values):
        try:
            body = json.dumps({"key": keys, "value": values}).encode()
            request = urllib.request.Request(args.url, body, {"Content-Type": "application/json"})
            try:
                with opener.open(request, timeout=args.timeout) as response:
                    content = response.read()
            except urllib.error.HTTPError as error:
                content = error.read()  # a refusal has the same form
        except (OSError, ValueError) as error:  # ValueError: the URL is none
            raise UserError(f"{args.url}: no answer ({getattr(error, 'reason', error)}), expected the address of a running "
                            "service.py, or a longer --timeout") from None
        except HTTPException:
            raise UserError(f"{args.url}: what answers there is no HTTP, expected the address of a running service.py") from None
        try:
            answer = json.loads(content)
            return answer["err_no"], answer["err_msg"], dict(zip(answer["key"], answer["value"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{args.url}: the answer is not that of service.py, expected its address") from None

    return ask


def main():
    args = parse_arguments(__doc__.splitlines()[0], "http://127.0.0.1:9878/seq_cls/prediction")
    label_texts(args, make_ask(args))


if __name__ == "__main__":
    run_script(main)
