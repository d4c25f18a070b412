"""Serve a model with Paddle Serving 0.9 (pipeline mode, local_predictor): gRPC and HTTP.

    python build_model.py --export_dir ../../export
    python service.py
    python service.py --config config.yml --rpc_port 18091 --http_port 9879 --log_dir log

Reads   config.yml and the folder that its model_config names, made by build_model.py.
Writes  log_dir/PipelineServingLogs/ (no texts of requests) and log_dir/ProcessInfo.json.
Serves  gRPC on rpc_port, HTTP on http_port, path /seq_cls/prediction, until Ctrl-C or SIGTERM. Requests and answers: README.md.
"""

import contextlib
import json
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from concurrent import futures
from types import ModuleType
from typing import TYPE_CHECKING, Any

from http_gateway import Answer, start_gateway
from request_check import BAD_REQUEST, Limits
from settings import NAME, check_device, read_config, read_model

from textcls.common.errors import UserError, run_script
from textcls.common.options import make_parser, positive_int
from textcls.runtime.exported import read_encoder, threshold_or_reason
from textcls.runtime.listening import listen, url_host

if TYPE_CHECKING:
    import grpc
    from paddle_serving_server.pipeline.pipeline_server import PipelineServicer
    from steps import Classify

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DRAIN_SECONDS = 10  # at the end, for requests in work
logger = logging.getLogger(NAME)


def parse_arguments() -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="config.yml", help="settings: ports, device, threads")
    parser.add_argument("--host", help="address to listen on; None: as in the config")
    parser.add_argument("--rpc_port", type=positive_int, help="gRPC port; None: as in the config")
    parser.add_argument("--http_port", type=positive_int, help="HTTP port; None: as in the config")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch of the model")
    parser.add_argument("--max_texts", type=positive_int, default=1024, help="texts per request at most")
    parser.add_argument("--max_characters", type=positive_int, default=20000, help="characters per text at most")
    parser.add_argument("--max_bytes", type=positive_int, default=8 * 2**20, help="bytes per request at most")
    parser.add_argument("--max_connections", type=positive_int, default=128,
                        help="open HTTP connections, and gRPC requests at once; beyond: status 503, RESOURCE_EXHAUSTED")
    parser.add_argument("--log_dir", default="log", help="folder of the log files")
    return parser.parse_args()


# ---------------------------------------------------------------- the pipeline


@contextlib.contextmanager
def output_to(log_dir: str) -> Iterator[int]:
    """Send all that the process prints, C++ included, to log_dir/start.log: Paddle lists each step of its graph optimization.

    Yields the file descriptor of standard error as it was.
    """
    try:
        os.makedirs(log_dir, exist_ok=True)
        with open(os.path.join(log_dir, "ProcessInfo.json"), "w"):
            pass  # empty: Paddle Serving adds an entry at each start
        log = os.open(os.path.join(log_dir, "start.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        raise UserError(f"--log_dir {log_dir}: cannot be written ({error.strerror}), expected a writable folder") from None
    before = [os.dup(1), os.dup(2)]
    try:
        for number in (1, 2):
            os.dup2(log, number)
        yield before[1]
    finally:
        sys.stdout.flush()
        for number in (1, 2):
            os.dup2(before[number - 1], number)


def import_pipeline(log_dir: str, stderr: int) -> ModuleType:
    """Import Paddle Serving, its logs and ProcessInfo.json in log_dir; returns its module `pipeline`. UserError."""
    os.environ["SERVING_LOG_PATH"] = os.environ["SERVING_HOME"] = os.path.abspath(log_dir)
    # Paddle takes SIGTERM over, Paddle Serving SIGINT: they wait until both are taken back
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        import paddle_serving_server.util

        import textcls.models.paddle_setup  # noqa: F401  first: it prepares the process for Paddle, and takes SIGTERM back

        # Paddle Serving 0.9.0 kills the whole process group where a start fails: with it the shell that started the service
        paddle_serving_server.util.kill_stop_process_by_pid = lambda *_: end_at_once(log_dir, stderr)
        from paddle_serving_server import pipeline
    except ImportError as error:
        raise UserError(f"{error}, expected an environment of its own (README.md, section 1)") from None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    logging.getLogger("paddle_serving_server").setLevel(logging.WARNING)  # six lines per request otherwise
    for handler in logging.getLogger().handlers:
        handler.maxBytes, handler.backupCount = 10 * 2**20, 3  # of each log file; 10 GB otherwise
    return pipeline


def end_at_once(log_dir: str, stderr: int) -> None:
    """End the process with exit code 2, whichever of its threads is running. stderr: file descriptor."""
    os.write(stderr, f"Paddle Serving cannot start, expected what {log_dir}/start.log says to be mended\n".encode())
    os._exit(2)


def start_pipeline(pipeline: ModuleType, last_step: "Classify", config: dict[str, Any], log_dir: str) -> "PipelineServicer":
    """Load the model and start the pipeline. Returns Paddle Serving's servicer: its inference(request, None) answers.

    UserError; the cause is then in the logs.
    """
    from paddle_serving_server.pipeline.pipeline_server import PipelineServicer

    step = config["op"][NAME]
    step = {**step, "concurrency": 1, "retry": 1, "timeout": -1,  # one thread: the predictor is not made for more
            "local_service_conf": {**step["local_service_conf"], "client_type": "local_predictor", "ir_optim": True}}
    full = {**config, "build_dag_each_worker": False, "dag": {"is_thread_op": True, "retry": 1, "use_profile": False},
            "op": {NAME: step}}
    server = pipeline.PipelineServer(NAME)
    server.set_response_op(pipeline.ResponseOp([last_step]))
    server.prepare_server(yml_dict=full)
    try:
        return PipelineServicer(NAME, server._response_op, server._conf)
    except Exception:  # its own is a CustomException, which says nothing
        logger.exception("the pipeline cannot start")
        raise UserError(f"Paddle Serving cannot start, expected what {log_dir}/PipelineServingLogs/pipeline.log says to be "
                        "mended") from None


def check_answer(servicer: "PipelineServicer", messages: ModuleType, folder: str, limits: Limits) -> None:
    """Raise UserError where the pipeline cannot answer a request: the model does not fit the other files, or cannot run."""
    texts = ["疼" * limits.max_characters, "头"][:limits.max_texts]  # of all positions that there can be, and one that is padded
    response = servicer.inference(messages.Request(key=["sentence"], value=[json.dumps(texts)]), None)
    if response.err_no != 0:
        raise UserError(f"{folder}: the model cannot label a text, expected the folder as build_model.py wrote it; the cause is "
                        "in the log, PipelineServingLogs/pipeline.log in --log_dir")


def start_rpc(config: dict[str, Any], servicer: "PipelineServicer", messages: ModuleType, limits: Limits) -> "grpc.Server":
    """Make a gRPC server that answers by a servicer, ready to be started. RuntimeError where the port is taken.

    Paddle Serving's own run_server binds all interfaces and takes 256 MB.
    """
    import grpc
    from google.protobuf.message import DecodeError

    def parse(serialized):
        """The Request, or the Response that refuses it."""
        message = "request: damaged, or invalid UTF-8 in key or value, expected Paddle Serving's Request message"
        try:
            request = messages.Request.FromString(serialized)
            if request.name in ("", NAME):
                return request
            message = f"name: not of this service, expected {NAME}"
        except DecodeError:
            pass
        return messages.Response(err_no=BAD_REQUEST, err_msg=message)

    def answer(request, context):
        return request if isinstance(request, messages.Response) else servicer.inference(request, context)

    server = grpc.server(futures.ThreadPoolExecutor(config["worker_num"]), maximum_concurrent_rpcs=limits.max_connections,
                         options=[("grpc.max_receive_message_length", limits.max_bytes), ("grpc.so_reuseport", 0)])
    inference = grpc.unary_unary_rpc_method_handler(answer, parse, messages.Response.SerializeToString)
    service = messages.DESCRIPTOR.services_by_name["PipelineService"].full_name
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"inference": inference})])
    server.add_insecure_port(f"{url_host(config['host'])}:{config['rpc_port']}")
    return server


def make_http_answer(servicer: "PipelineServicer", messages: ModuleType) -> Answer:
    """Make the function that the HTTP gateway answers with: (keys, values, has_tensors, logid) -> (HTTP status, dict)."""
    def answer(keys, values, has_tensors, logid):
        request = messages.Request(key=keys, value=values, tensors=[messages.Tensor()] if has_tensors else [], logid=logid)
        response = servicer.inference(request, None)
        content = {"err_no": response.err_no, "err_msg": response.err_msg, "key": list(response.key),
                   "value": list(response.value), "tensors": []}
        return {0: 200, BAD_REQUEST: 400}.get(response.err_no, 500), content
    return answer


def serve(config: dict[str, Any], servicer: "PipelineServicer", messages: ModuleType, limits: Limits) -> None:
    """Listen until the process is told to end, then answer what has come, within DRAIN_SECONDS."""
    host, rpc_port, http_port = config["host"], config["rpc_port"], config["http_port"]
    try:
        server = start_rpc(config, servicer, messages, limits)
        gateway = start_gateway((host, http_port), f"/{NAME}/prediction", make_http_answer(servicer, messages), limits,
                                config["worker_num"])
    except (OSError, RuntimeError) as error:  # taken since main() has looked
        raise UserError(f"rpc_port {rpc_port} or http_port {http_port}: cannot be listened on ({error}), expected free ports"
                        ) from None
    server.start()
    address = url_host(host)
    print(f"Ready: http://{address}:{http_port}/{NAME}/prediction and gRPC {address}:{rpc_port}", flush=True)
    try:
        server.wait_for_termination()
    finally:
        stopped = server.stop(grace=DRAIN_SECONDS)
        gateway.drain(DRAIN_SECONDS)
        stopped.wait()


def main():
    args = parse_arguments()
    config = read_config(args)
    folder = config["op"][NAME]["local_service_conf"]["model_config"]
    export = read_model(folder)
    encode = read_encoder(export)
    for name in ("rpc_port", "http_port"):
        listen(config["host"], config[name], name).close()
    with output_to(args.log_dir) as stderr:
        pipeline = import_pipeline(args.log_dir, stderr)
        check_device(config)
        from paddle_serving_server.pipeline.proto import pipeline_service_pb2 as messages
        from steps import Classify, Request

        limits = Limits(args.max_texts, args.max_characters, args.max_bytes, args.max_connections, export.labels,
                        threshold_or_reason(export), export.centres is not None)
        last_step = Classify(Request(limits), export, encode, args.batch_size)
        servicer = start_pipeline(pipeline, last_step, config, args.log_dir)
        check_answer(servicer, messages, folder, limits)
    serve(config, servicer, messages, limits)


if __name__ == "__main__":
    try:
        run_script(main)
    except SystemExit as end:  # not by shutting Python down: the threads of Paddle 2.6.2 may abort the process meanwhile
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)
