"""What a request may hold: everything that a client sends is checked here, before Paddle Serving sees it. Needs no Paddle.

Texts are parsed as JSON and never evaluated. RequestError names the field that is wrong and goes to the client as it is.
"""

import itertools
import json
from argparse import ArgumentTypeError
from typing import Any, NamedTuple, Optional, Union

from settings import NAME

from textcls.common.errors import UserError
from textcls.common.options import probability
from textcls.common.texts import TEXT, has_lone_surrogate
from textcls.runtime.predictions import check_least_known, check_threshold

BAD_REQUEST, INTERNAL_ERROR, BUSY = 51, 52, 53  # err_no of the answers; Paddle Serving leaves 51 to 99 to the application
FAILED = "internal error, expected the cause in the server's log"
KEYS = ("sentence", "top_k", "threshold", "least_known")
HTTP_FIELDS = ("key", "value", "tensors", "logid", "clientip", "name", "method")  # of Paddle Serving's Request message


class Limits(NamedTuple):
    """The largest request that is answered."""

    max_texts: int
    max_characters: int  # of one text
    max_bytes: int  # of a whole request
    max_connections: int  # of HTTP; of gRPC: requests at once
    labels: list[str]  # as many as the largest top_k
    threshold: Union[float, str]  # for requests that want it: of `threshold_or_reason`
    tells_unknown: bool  # whether the model says how known texts are


class Wanted(NamedTuple):
    """What a request asks for."""

    texts: list[str]
    top_k: Optional[int]  # None: not asked for
    threshold: float  # 0 without one
    least_known: float  # 0 without one


class RequestError(Exception):
    """The request cannot be answered as it is; the message is for the client."""


def parse_json(text: str) -> Any:
    """Read JSON; whole numbers of many digits, which Python would take minutes to convert, become floats. ValueError."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_request(keys: list[str], values: list[str], has_tensors: bool, limits: Limits) -> Wanted:
    """Read a request. RequestError."""
    if has_tensors:
        raise RequestError("tensors: not accepted, expected the texts in key and value")
    if len(keys) != len(values):
        raise RequestError(f"value: {len(values)} values for {len(keys)} keys, expected one value for each key")
    for key in keys:
        if key not in KEYS:
            raise RequestError(f"key: {shorten(key)} is unknown, expected {', '.join(KEYS)}")
        if keys.count(key) > 1:
            raise RequestError(f"key: {key} is there more than once, expected it once")
    request = dict(zip(keys, values))
    if "sentence" not in request:
        raise RequestError("key: sentence is missing, expected the texts under this name")
    top_k = read_top_k(request["top_k"], limits) if "top_k" in request else None
    return Wanted(read_texts(request["sentence"], limits), top_k, read_threshold(request.get("threshold", "0"), limits),
                  read_least_known(request.get("least_known", "0"), limits))


def read_texts(value: str, limits: Limits) -> list[str]:
    """Read the texts of the value of `sentence`: a JSON list of texts, else the value itself is the one text. RequestError."""
    texts = None
    if value.lstrip().startswith("["):
        try:
            texts = parse_json(value)
        except ValueError:
            pass  # a text that merely begins with [
    if texts is None:
        check_text("sentence", value, limits)
        return [value]
    if not texts:
        raise RequestError("sentence: an empty list, expected at least one text")
    if len(texts) > limits.max_texts:
        raise RequestError(f"sentence: {len(texts)} texts, expected at most {limits.max_texts}")
    for position, text in enumerate(texts):
        check_text(f"sentence[{position}]", text, limits)
    return texts


def check_text(field: str, text: Any, limits: Limits) -> None:
    """Raise RequestError where a JSON value is no text, or too long."""
    if not isinstance(text, str):
        raise RequestError(f"{field}: {describe(text)}, expected a text")
    if len(text) > limits.max_characters:
        raise RequestError(f"{field}: {len(text)} characters, expected at most {limits.max_characters}")
    if problem := TEXT.problem(text):
        raise RequestError(f"{field}: {problem}, expected {TEXT.expected}")


def check_unicode(field: str, text: str) -> None:
    """Raise RequestError where protobuf could not take a text."""
    if has_lone_surrogate(text):
        raise RequestError(f"{field}: a lone surrogate, expected Unicode text")


def read_top_k(value: str, limits: Limits) -> int:
    """Read the number of labels per text that the value of `top_k` asks for. RequestError."""
    if not (value.isascii() and value.isdecimal() and len(value) < 9 and 1 <= int(value) <= len(limits.labels)):
        raise RequestError(f"top_k: {shorten(value)}, expected a whole number, 1 to {len(limits.labels)}")
    return int(value)


def read_threshold(value: str, limits: Limits) -> float:
    """Read the threshold that the value of `threshold` asks for: a number, or auto. RequestError."""
    if value == "auto":
        if isinstance(limits.threshold, str):
            raise RequestError(f"threshold: {limits.threshold}")
        threshold = limits.threshold
    else:
        try:
            threshold = probability(value)
        except ArgumentTypeError:
            raise RequestError(f"threshold: {shorten(value)}, expected a number, 0 to 1, or auto") from None
    try:
        check_threshold(threshold, limits.labels)
    except UserError as error:
        raise RequestError(str(error)) from None
    return threshold


def read_least_known(value: str, limits: Limits) -> float:
    """Read how known a text has to be at least by the value of `least_known`, a number. RequestError."""
    try:
        least_known = probability(value)
    except ArgumentTypeError:
        raise RequestError(f"least_known: {shorten(value)}, expected a number, 0 to 1") from None
    try:
        check_least_known(least_known, limits.tells_unknown, limits.labels)
    except UserError as error:
        raise RequestError(str(error)) from None
    return least_known


def read_http_body(body: bytes) -> tuple[list[str], list[str], bool, int]:
    """Read the JSON body of an HTTP request: its keys, its values as gRPC has them, whether it has tensors, and its logid.

    Lists and numbers may stand among the values as they are; they become their JSON text. RequestError.
    """
    try:
        request = parse_json(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"request body: invalid UTF-8 at byte {error.start + 1}, expected JSON in UTF-8") from None
    except ValueError:
        raise RequestError('request body: not JSON, expected {"key": ["sentence"], "value": [["text", ...]]}') from None
    if not isinstance(request, dict):
        raise RequestError(f"request body: {describe(request)}, expected an object with key and value")
    for name in request:
        if name not in HTTP_FIELDS:
            raise RequestError(f"request body: {shorten(name)} is unknown, expected key and value")
    for name in ("key", "value"):
        if not isinstance(request.get(name), list):
            wrong = describe(request[name]) if name in request else "missing"
            raise RequestError(f"{name}: {wrong}, expected a list")
    for position, key in enumerate(request["key"]):
        if not isinstance(key, str):
            raise RequestError(f"key[{position}]: {describe(key)}, expected a text")
        check_unicode(f"key[{position}]", key)
    keys = itertools.chain(request["key"], itertools.repeat(None))  # that there is one for each value is checked later
    values = [as_text(f"value[{position}]", key, value) for position, (key, value) in enumerate(zip(keys, request["value"]))]
    if request.get("name", "") not in ("", NAME):
        raise RequestError(f"name: not of this service, expected {NAME}")
    logid = request.get("logid") or 0
    if type(logid) is not int or not 0 <= logid < 2**63:
        raise RequestError("logid: expected a whole number")
    return request["key"], values, request.get("tensors") not in (None, []), logid


def as_text(field: str, key: Optional[str], value: Any) -> str:
    """Return a JSON value as gRPC has it: lists, and the numbers of other keys, become their JSON text. RequestError."""
    if isinstance(value, str):
        check_unicode(field, value)
        return value
    kinds = {"top_k": (int,), "threshold": (int, float), "least_known": (int, float)}
    if isinstance(value, list) or type(value) in kinds.get(key, ()):
        return json.dumps(value)
    raise RequestError(f"{field}: {describe(value)}, expected a text or a list of texts")


def describe(value: Any) -> str:
    """Say in words what kind of JSON value this is."""
    kinds = {str: "a text", bool: "true or false", type(None): "null", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def shorten(text: str, length: int = 40) -> str:
    """Make a client's own word fit for a message: quoted, cut, without lone surrogates and control characters."""
    text = text if len(text) <= length else text[:length] + "..."
    return json.dumps(text.encode("utf-8", "replace").decode("utf-8"), ensure_ascii=False)
