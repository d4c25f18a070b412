"""What seqcls_grpc_client.py and seqcls_http_client.py share: options, texts in, answers out."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import read_texts
from textcls.errors import Problems, UserError
from textcls.options import positive_int

MODEL = "seqcls"  # the ensemble that build_repository.py makes


def parse_arguments(description, url):
    """Options of both clients. url: the default."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("texts", nargs="*", help="texts to label")
    parser.add_argument("--data_file", help="file of texts, one per line; -: standard input")
    parser.add_argument("--top_k", type=positive_int, default=1, help="how many labels per text")
    parser.add_argument("--url", default=url, help="where the server listens")
    parser.add_argument("--batch_size", type=positive_int, default=32,
                        help="texts per request; at most --max_batch_size of build_repository.py")
    parser.add_argument("--timeout", type=positive_int, default=60, help="seconds to wait for an answer")
    parser.add_argument("--output_format", default="txt", choices=["txt", "jsonl"])
    args = parser.parse_args()
    if bool(args.texts) == bool(args.data_file):
        parser.error("expected either texts or --data_file")
    return args


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
        if any("\ud800" <= char <= "\udfff" for char in text):  # how Python shows bytes that are no text
            raise UserError(f"text {number}: invalid UTF-8, expected UTF-8 text")
    return args.texts


def label_texts(args, ask):
    """Print a block per text: text, label, confidence; or a JSON object. With --top_k above 1 the top labels, best first.

    ask: function of a list of str that sends one request; returns (labels, confidences), each a list of lists, [texts, top_k].
    It raises UserError where it gets no answer, a refusal included.
    """
    texts = read_input(args)
    sys.stdout.reconfigure(encoding="utf-8")
    for start in range(0, len(texts), args.batch_size):
        batch = texts[start:start + args.batch_size]
        try:
            labels, confidences = ask(batch)
        except UserError as error:
            place = f"texts {start + 1} to {start + len(batch)}: " if len(batch) < len(texts) else ""
            raise UserError(f"{place}{error}") from None
        for text, names, values in zip(batch, labels, confidences):
            values = [round(value, 6) for value in values]
            if args.output_format == "jsonl":
                top = [{"label": name, "confidence": value} for name, value in zip(names, values)]
                print(json.dumps({"text": text, **top[0], "top_k": top}, ensure_ascii=False))
            else:
                print(f"text: {text}\nlabel: {', '.join(names)}\nconfidence: {', '.join(f'{value:.6f}' for value in values)}")
                print("-" * 29)


def no_answer(args, reason):
    """The UserError where no server answered."""
    return UserError(f"{args.url}: no answer ({reason}), expected the address of a running server, and a longer --timeout or a "
                     "smaller --batch_size where it is busy")


def refused(args, reason):
    """The UserError where the server answered with an error."""
    return UserError(f"{args.url}: refused ({reason}), expected what deploy/triton_serving/README.md says")
