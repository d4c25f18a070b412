"""Label texts by Triton's gRPC interface; needs tritonclient[grpc] (requirements.txt).

    python seqcls_grpc_client.py 头疼怎么办 拔牙多少钱
    python seqcls_grpc_client.py --top_k 3 --output_format jsonl --data_file ../../data/data.txt
    python seqcls_grpc_client.py --url 127.0.0.1:8001 --timeout 10 头疼怎么办

Reads   texts from the command line, or --data_file, one per line (-: standard input).
Prints  a block per text: text, label, confidence, and known where the model tells unknown texts; or with --output_format jsonl
        a JSON object per text.
"""

from argparse import Namespace

import numpy as np
from seqcls import EXPECTED, MODEL, make_block, make_parameters, refused

from textcls.common.errors import UserError, needs_packages, run_script
from textcls.runtime.client import Ask, Prediction, make_client_parser, run_client

with needs_packages("deploy/triton_serving/requirements.txt"):
    from tritonclient.grpc import InferenceServerClient, InferInput
    from tritonclient.utils import InferenceServerException

SILENT = ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.UNIMPLEMENTED")  # no Triton, or none in time


def make_ask(args: Namespace) -> Ask:
    """Make the function that `run_client` wants, by gRPC."""
    # a proxy of the environment would look for 127.0.0.1 on itself
    server = InferenceServerClient(args.url, channel_args=[("grpc.enable_http_proxy", 0)])

    def ask(texts):
        values = InferInput("INPUT", [len(texts), 1], "BYTES")
        values.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=np.object_))
        try:
            answer = server.infer(MODEL, [values], parameters=make_parameters(args), client_timeout=args.timeout)
        except InferenceServerException as error:
            if error.status() in SILENT:
                raise UserError(f"{args.url}: no answer ({error.message()}), expected {EXPECTED}") from None
            raise refused(args, error.message()) from None
        labels, confidences, known = (answer.as_numpy(name) for name in ("label", "confidence", "known"))
        if labels is None or confidences is None or not labels.shape == confidences.shape == (len(texts), args.top_k):
            return []
        known = [None] * len(texts) if known is None else known.reshape(-1).tolist()
        tops = [[(name.decode(), confidence) for name, confidence in zip(*pair)] for pair in zip(labels, confidences.tolist())]
        return [Prediction(top, own) for top, own in zip(tops, known)]

    return ask


def main():
    run_client(make_client_parser(__doc__, "127.0.0.1:8001", batch_size=32), make_ask, make_block)


if __name__ == "__main__":
    run_script(main)
