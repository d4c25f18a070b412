"""What the two clients know of service.py's requests and answers."""

import json
from argparse import Namespace
from typing import Union

from textcls.common.errors import UserError
from textcls.runtime.client import Prediction


def make_request(args: Namespace, texts: list[str]) -> tuple[list[str], list[Union[list[str], str]]]:
    """Make the keys and values of a request."""
    bounds = {"threshold": args.threshold, "least_known": args.least_known}
    request = {"sentence": texts, "top_k": str(args.top_k),
               **{name: str(value) for name, value in bounds.items() if value is not None}}
    return list(request), list(request.values())


def read_answer(args: Namespace, number: int, message: str, answer: dict[str, str]) -> list[Prediction]:
    """Read what an answer says of each text. number, message: its err_no and err_msg. UserError where it is a refusal."""
    if number != 0:
        raise UserError(f"{args.url}: request refused (err_no {number}): {message}")
    try:
        tops = [list(zip(*pair)) for pair in zip(json.loads(answer["label"]), json.loads(answer["confidence"]))]
        known = json.loads(answer["known"]) if "known" in answer else [None] * len(tops)
        return [Prediction(top, own) for top, own in zip(tops, known)]
    except (KeyError, TypeError, ValueError):
        return []
