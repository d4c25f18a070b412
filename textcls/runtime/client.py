"""What the clients of the three servers share: options, texts in, answers out, JSON over HTTP. Needs nothing but numpy."""

import argparse
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Optional

from textcls.common.errors import UserError
from textcls.common.options import make_parser, positive_int, probability, probability_or_auto
from textcls.common.probabilities import DECIMALS
from textcls.common.texts import TEXT
from textcls.runtime.predictions import open_stdout, read_chunks

LINE = "-" * 29  # ends the block of a text
Ask = Callable[[list[str]], list[Any]]  # sends one request of texts; returns what is said of each


class Prediction(NamedTuple):
    """What is said of a text."""

    top: list[tuple[str, float]]  # labels and their confidences, best first
    known: Optional[float] = None  # the probability that it is of a known label at all, where the model says so


def make_client_parser(doc: str, url: str, batch_size: int) -> argparse.ArgumentParser:
    """Make a parser with the options of all clients. doc: the client's docstring; url, batch_size: the defaults."""
    def address(text: str) -> str:
        """Type of --url: http:// may be left out, and is for HTTP only."""
        text = text.rstrip("/")
        if not url.startswith("http://"):
            return text.removeprefix("http://")
        return text if "://" in text else f"http://{text}"

    parser = make_parser(doc)
    parser.add_argument("texts", nargs="*", help="texts to label")
    parser.add_argument("--data_file", help="file of texts, one per line; -: standard input")
    parser.add_argument("--top_k", type=positive_int, default=1, help="how many labels per text")
    parser.add_argument("--threshold", type=probability_or_auto, help="0 to 1, or auto: below it the server answers `undecided`")
    parser.add_argument("--least_known", type=probability, help="0 to 1: a text that is less known is answered with `undecided`; "
                        "for a classifier that tells unknown texts")
    parser.add_argument("--url", type=address, default=url, help="where the server listens")
    parser.add_argument("--batch_size", type=positive_int, default=batch_size,
                        help="texts per request, at most as many as the server takes")
    parser.add_argument("--timeout", type=positive_int, default=60, help="seconds to wait for an answer")
    parser.add_argument("--output_format", default="txt", choices=["txt", "jsonl"])
    return parser


def read_input(args: argparse.Namespace) -> list[str]:
    """Return the texts of the command line or of --data_file. UserError."""
    if args.data_file:
        from_stdin = args.data_file == "-"
        chunks = read_chunks("standard input" if from_stdin else args.data_file, from_stdin)
        return [text for chunk in chunks for text in chunk]
    for number, text in enumerate(args.texts, 1):
        if problem := TEXT.problem(text):
            raise UserError(f"text {number}: {problem}, expected {TEXT.expected}")
    return args.texts


def make_block(text: str, prediction: Prediction, name: str = "data") -> list[str]:
    """Make the lines that are printed of a text. name: what its own line begins with."""
    labels, confidences = zip(*prediction.top)
    lines = [f"{name}: {text}", f"label: {', '.join(labels)}",
             f"confidence: {', '.join(f'{confidence:.6f}' for confidence in confidences)}"]
    return lines if prediction.known is None else [*lines, f"known: {prediction.known:.6f}"]


def make_row(text: str, prediction: Prediction) -> dict[str, Any]:
    """Make the JSON object of a text."""
    rounded = [{"label": label, "confidence": round(confidence, DECIMALS)} for label, confidence in prediction.top]
    known = {} if prediction.known is None else {"known": round(prediction.known, DECIMALS)}
    return {"text": text, **rounded[0], **known, "top_k": rounded}


def run_client(parser: argparse.ArgumentParser, make_ask: Callable[[argparse.Namespace], Ask],
               make_block: Callable[[str, Any], list[str]] = make_block,
               make_row: Callable[[str, Any], dict[str, Any]] = make_row) -> None:
    """Read the command line, label the texts, --batch_size at a time, and print a block, or with --output_format jsonl a JSON
    object, per text.

    parser: of `make_client_parser`. make_ask: function of the parsed options that returns an Ask, which raises UserError where
    it gets no answer, or a refusal, and returns an empty list where what it gets is no answer of this kind of server.
    make_block, make_row: functions of a text and what the Ask says of it, a Prediction unless they are given: the lines of a
    block but for its last, and the JSON object.
    """
    args = parser.parse_args()
    if bool(args.texts) == bool(args.data_file):
        parser.error("expected either texts or --data_file")
    ask = make_ask(args)
    texts, output = read_input(args), open_stdout()
    for start in range(0, len(texts), args.batch_size):
        batch = texts[start:start + args.batch_size]
        try:
            predictions = ask(batch)
            if len(predictions) != len(batch):
                raise UserError(f"{args.url}: not an answer of this kind of server, expected the labels of {len(batch)} texts")
        except UserError as error:
            place = f"texts {start + 1} to {start + len(batch)}: " if len(batch) < len(texts) else ""
            raise UserError(f"{place}{error}") from None
        for text, prediction in zip(batch, predictions):
            if args.output_format == "jsonl":
                print(json.dumps(make_row(text, prediction), ensure_ascii=False), file=output)
            else:
                print(*make_block(text, prediction), LINE, sep="\n", file=output)


def post_json(args: argparse.Namespace, content: Any, expected: str, path: str = "",
              headers: Mapping[str, str] = {}) -> tuple[int, bytes]:
    """Post an object as JSON to args.url + path; returns the status and the body, refusals included.

    expected: what messages say was expected at args.url. UserError where nothing answers.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would look for 127.0.0.1 on itself
    body, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
    try:
        try:
            with opener.open(urllib.request.Request(args.url + path, body, headers), timeout=args.timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
    except (OSError, ValueError) as error:  # ValueError: the URL is none
        raise UserError(f"{args.url}: no answer ({getattr(error, 'reason', error)}), expected {expected}") from None
    except http.client.HTTPException:
        raise UserError(f"{args.url}: what answers there is no HTTP, expected {expected}") from None
