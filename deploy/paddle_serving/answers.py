"""What the two clients know of service.py's requests and answers."""

import json

from textcls.common.errors import UserError
from textcls.runtime.client import label_lines


def make_block(text, top):
    return [f"data: {text}", *label_lines(top)]


def make_request(args, texts):
    """(keys, values) of a request: list of str, list of a list of str and the str of --top_k."""
    return ["sentence", "top_k"], [texts, str(args.top_k)]


def read_answer(args, texts, number, message, answer):
    """Per text the list of (label, confidence). number, message: err_no and err_msg; answer: dict of str. UserError."""
    if number != 0:
        raise UserError(f"{args.url}: request refused (err_no {number}): {message}")
    try:
        predictions = [list(zip(*pair)) for pair in zip(json.loads(answer["label"]), json.loads(answer["confidence"]))]
    except (KeyError, TypeError, ValueError):
        predictions = []
    if len(predictions) != len(texts):
        raise UserError(f"{args.url}: not an answer of this service, expected label and confidence of {len(texts)} texts")
    return predictions
