"""What the two clients know of service.py's requests and answers."""

import json
from argparse import Namespace
from typing import Union

from textcls.common.errors import UserError
from textcls.runtime.client import Top


def make_request(args: Namespace, texts: list[str]) -> tuple[list[str], list[Union[list[str], str]]]:
    """Make the keys and values of a request."""
    threshold = {} if args.threshold is None else {"threshold": str(args.threshold)}
    request = {"sentence": texts, "top_k": str(args.top_k), **threshold}
    return list(request), list(request.values())


def read_answer(args: Namespace, number: int, message: str, answer: dict[str, str]) -> list[Top]:
    """Read what an answer says of each text. number, message: its err_no and err_msg. UserError where it is a refusal."""
    if number != 0:
        raise UserError(f"{args.url}: request refused (err_no {number}): {message}")
    try:
        return [list(zip(*pair)) for pair in zip(json.loads(answer["label"]), json.loads(answer["confidence"]))]
    except (KeyError, TypeError, ValueError):
        return []
