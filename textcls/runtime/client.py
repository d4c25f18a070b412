"""What the clients of the three servers share: options, texts in, answers out, JSON over HTTP. Needs nothing but numpy."""

import http.client
import json
import sys
import urllib.error
import urllib.request

from textcls.common.errors import Problems, UserError
from textcls.common.options import make_parser, positive_int
from textcls.common.probabilities import DECIMALS
from textcls.common.texts import TEXT
from textcls.data.files import read_texts

LINE = "-" * 29  # ends the block of a text


def make_client_parser(doc, url, batch_size):
    """A parser with the options of all clients. doc: the client's docstring; url, batch_size: the defaults."""
    parser = make_parser(doc)
    parser.add_argument("texts", nargs="*", help="texts to label")
    parser.add_argument("--data_file", help="file of texts, one per line; -: standard input")
    parser.add_argument("--top_k", type=positive_int, default=1, help="how many labels per text")
    parser.add_argument("--url", default=url, help="where the server listens")
    parser.add_argument("--batch_size", type=positive_int, default=batch_size,
                        help="texts per request, at most as many as the server takes")
    parser.add_argument("--timeout", type=positive_int, default=60, help="seconds to wait for an answer")
    parser.add_argument("--output_format", default="txt", choices=["txt", "jsonl"])
    return parser


def read_input(args):
    """The texts of the command line or of --data_file: list of str. UserError."""
    if args.data_file:
        from_stdin = args.data_file == "-"
        if from_stdin and sys.stdin is None:
            raise UserError("standard input is closed, expected texts, one per line")
        problems = Problems()
        texts = list(read_texts("standard input" if from_stdin else args.data_file, problems,
                                sys.stdin.buffer if from_stdin else None))
        problems.report()
        return texts
    for number, text in enumerate(args.texts, 1):
        if problem := TEXT.problem(text):
            raise UserError(f"text {number}: {problem}, expected {TEXT.expected}")
    return args.texts


def make_row(text, top):
    """The JSON object of a text. top: list of (label, confidence), best first."""
    top = [{"label": label, "confidence": round(confidence, DECIMALS)} for label, confidence in top]
    return {"text": text, **top[0], "top_k": top}


def run_client(parser, make_ask, make_block, make_row=make_row):
    """Read the command line, label the texts, --batch_size at a time, and print a block, or with --output_format jsonl a JSON
    object, per text.

    parser: of `make_client_parser`. make_ask: function of the parsed options that returns a function of a list of str, which
    sends one request and returns per text the list of (label, confidence), best first; it raises UserError where it gets no
    answer, or a refusal. make_block: function of (text, that list) that returns the lines of a block but for its last; make_row:
    one that returns the JSON object.
    """
    args = parser.parse_args()
    if bool(args.texts) == bool(args.data_file):
        parser.error("expected either texts or --data_file")
    ask = make_ask(args)
    texts = read_input(args)
    sys.stdout.reconfigure(encoding="utf-8")
    for start in range(0, len(texts), args.batch_size):
        batch = texts[start:start + args.batch_size]
        try:
            predictions = ask(batch)
        except UserError as error:
            place = f"texts {start + 1} to {start + len(batch)}: " if len(batch) < len(texts) else ""
            raise UserError(f"{place}{error}") from None
        for text, prediction in zip(batch, predictions):
            if args.output_format == "jsonl":
                print(json.dumps(make_row(text, prediction), ensure_ascii=False))
            else:
                print(*make_block(text, prediction), LINE, sep="\n")


def label_lines(top):
    """The lines `label` and `confidence` of a block. top: list of (label, confidence)."""
    labels, confidences = zip(*top)
    return [f"label: {', '.join(labels)}", f"confidence: {', '.join(f'{value:.6f}' for value in confidences)}"]


def post_json(args, content, expected, path="", headers=()):
    """Post an object as JSON to args.url + path; returns (status: int, body: bytes), refusals included.

    expected: what messages say was expected at args.url. headers: dict, or nothing. UserError where nothing answers.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would look for 127.0.0.1 on itself
    body, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **dict(headers)}
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
