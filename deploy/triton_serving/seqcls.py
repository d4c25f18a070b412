"""What the two clients know of the model that build_repository.py makes: its name, blocks, messages."""

from argparse import Namespace
from functools import partial
from typing import Union

from textcls.common.errors import UserError
from textcls.runtime.client import make_block

MODEL = "seqcls"  # the ensemble
EXPECTED = "the address of a running server, and a longer --timeout or a smaller --batch_size where it is busy"
make_block = partial(make_block, name="text")


def make_parameters(args: Namespace) -> dict[str, Union[int, str]]:
    """Make the parameters of a request. Bounds are texts: gRPC knows no parameters that are fractions."""
    bounds = {"threshold": args.threshold, "least_known": args.least_known}
    return {"top_k": args.top_k, **{name: str(value) for name, value in bounds.items() if value is not None}}


def refused(args: Namespace, reason: str) -> UserError:
    """Make the error where the server answered with one."""
    return UserError(f"{args.url}: refused ({reason}), expected what deploy/triton_serving/README.md says")
