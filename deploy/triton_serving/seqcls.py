"""What the two clients know of the model that build_repository.py makes: its name, blocks, messages."""

from textcls.common.errors import UserError
from textcls.runtime.client import label_lines

MODEL = "seqcls"  # the ensemble
EXPECTED = "the address of a running server, and a longer --timeout or a smaller --batch_size where it is busy"


def make_block(text, top):
    return [f"text: {text}", *label_lines(top)]


def refused(args, reason):
    """The UserError where the server answered with an error."""
    return UserError(f"{args.url}: refused ({reason}), expected what deploy/triton_serving/README.md says")


def no_table(args, texts):
    """The UserError where an answer is not that of MODEL."""
    return UserError(f"{args.url}: not an answer of {MODEL}, expected label and confidence of {len(texts)} texts")
