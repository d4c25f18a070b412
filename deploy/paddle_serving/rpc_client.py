"""Label texts by the service's gRPC interface; runs in the environment of service.py.

    python rpc_client.py 头疼怎么办 拔牙多少钱
    python rpc_client.py --top_k 3 --data_file ../../data/data.txt
    python rpc_client.py --url 127.0.0.1:18090 头疼怎么办

Reads   texts from the command line, or --data_file, one per line (-: standard input).
Prints  a block per text: text, label, confidence, and known where the model tells unknown texts; or with --output_format jsonl
        a JSON object per text.
"""

import importlib.machinery
import importlib.util
import json
import os
from argparse import Namespace
from types import ModuleType

from answers import make_request, read_answer

from textcls.common.errors import UserError, run_script
from textcls.runtime.client import Ask, make_client_parser, run_client

METHOD = "/baidu.paddle_serving.pipeline_serving.PipelineService/inference"


def import_messages() -> ModuleType:
    """Import Paddle Serving's messages without its package, which loads Paddle and makes folders for logs. UserError."""
    package = importlib.util.find_spec("paddle_serving_server")
    if package is None:
        raise UserError("paddle_serving_server is missing, expected the environment of service.py (README.md, section 1)")
    folder = os.path.join(package.submodule_search_locations[0], "pipeline", "proto")
    spec = importlib.machinery.PathFinder.find_spec("pipeline_service_pb2", [folder])
    messages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(messages)
    return messages


def make_ask(args: Namespace) -> Ask:
    """Make the function that `run_client` wants, by gRPC."""
    messages = import_messages()
    import grpc

    channel = grpc.insecure_channel(args.url, [("grpc.enable_http_proxy", 0)])
    inference = channel.unary_unary(METHOD, messages.Request.SerializeToString, messages.Response.FromString)

    def ask(texts):
        keys, values = make_request(args, texts)
        values = [value if isinstance(value, str) else json.dumps(value) for value in values]  # a list as JSON
        try:
            answer = inference(messages.Request(key=keys, value=values), timeout=args.timeout)
        except grpc.RpcError as error:
            raise UserError(f"{args.url}: no answer ({error.code().name}: {error.details()}), expected the address of a running "
                            "service.py, a smaller --batch_size or a longer --timeout") from None
        return read_answer(args, answer.err_no, answer.err_msg, dict(zip(answer.key, answer.value)))

    return ask


def main():
    run_client(make_client_parser(__doc__, "127.0.0.1:18090", batch_size=100), make_ask)


if __name__ == "__main__":
    run_script(main)
