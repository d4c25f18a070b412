"""Serve a model with Paddle Serving 0.9 (pipeline mode, local_predictor): gRPC and HTTP.

    python build_model.py --export_dir ../../export
    python service.py
    python service.py --config config.yml --rpc_port 18091 --http_port 9879 --log_dir log

Reads   config.yml and the folder that its model_config names, made by build_model.py.
Writes  log_dir/PipelineServingLogs/ (no texts of requests) and log_dir/ProcessInfo.json.
Serves  gRPC on rpc_port, HTTP on http_port, path /seq_cls/prediction, until Ctrl-C or SIGTERM. Requests and answers: README.md.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from concurrent import futures
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from build_model import MARKER, sha256
from utils import pad_batch, read_json, softmax, sorted_batches
from textcls.errors import UserError, exit_on_sigterm, run_script
from textcls.exported import read_export, read_tokenizer
from textcls.options import positive_int
from http_gateway import start_gateway
from request_check import BAD_REQUEST, FAILED, INTERNAL_ERROR, Limits, RequestError, check_request
from settings import NAME, check_device, check_ports, read_config

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DRAIN_SECONDS = 10  # at the end, for requests in work
logger = logging.getLogger(NAME)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", default="config.yml", help="settings: ports, device, threads")
    parser.add_argument("--host", help="address to listen on; None: as in the config")
    parser.add_argument("--rpc_port", type=positive_int, help="gRPC port; None: as in the config")
    parser.add_argument("--http_port", type=positive_int, help="HTTP port; None: as in the config")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch of the model")
    parser.add_argument("--max_texts", type=positive_int, default=1024, help="texts per request at most")
    parser.add_argument("--max_characters", type=positive_int, default=20000, help="characters per text at most")
    parser.add_argument("--max_bytes", type=positive_int, default=8 * 2**20, help="bytes per request at most")
    parser.add_argument("--log_dir", default="log", help="folder of the log files")
    return parser.parse_args()


# ---------------------------------------------------------------- the pipeline


@contextlib.contextmanager
def output_to(log_dir):
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


def import_pipeline(log_dir, stderr):
    """Import Paddle Serving, its logs and ProcessInfo.json in log_dir; returns its module `pipeline`."""
    os.environ["SERVING_LOG_PATH"] = os.environ["SERVING_HOME"] = os.path.abspath(log_dir)
    # Paddle takes SIGTERM over, Paddle Serving SIGINT: they wait until both are taken back
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        import paddle_serving_server.util

        # Paddle Serving 0.9.0 kills the whole process group where a start fails: with it the shell that started the service
        paddle_serving_server.util.kill_stop_process_by_pid = lambda *_: end_at_once(log_dir, stderr)
        import paddle  # noqa: F401
        from paddle_serving_server import pipeline
    except ImportError as error:
        raise UserError(f"{error}, expected an environment of its own (README.md, section 1)") from None
    exit_on_sigterm()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    logging.getLogger("paddle_serving_server").setLevel(logging.WARNING)  # six lines per request otherwise
    for handler in logging.getLogger().handlers:
        handler.maxBytes, handler.backupCount = 10 * 2**20, 3  # of each log file; 10 GB otherwise
    return pipeline


def end_at_once(log_dir, stderr):
    """End the process with exit code 2, whichever of its threads is running. stderr: file descriptor."""
    os.write(stderr, f"Paddle Serving cannot start, expected what {log_dir}/start.log says to be mended\n".encode())
    os._exit(2)


def make_steps(pipeline, export, limits, batch_size):
    """Returns the last of the pipeline's steps, which labels the texts of requests.

    export: the Export that is served. batch_size: texts per batch of the model.
    """
    tokenizer = read_tokenizer(export)
    tokenizer.enable_truncation(export.max_seq_length)

    class Request(pipeline.RequestOp):
        """Paddle Serving's own step unpickles what clients send as tensors, and answers with its exceptions."""

        def unpack_request_package(self, request):
            try:
                texts, top_k = check_request(list(request.key), list(request.value), len(request.tensors) > 0, limits)
            except RequestError as error:
                return {}, request.logid, BAD_REQUEST, str(error)
            return {"texts": texts, "top_k": top_k}, request.logid, None, ""

    class Classify(pipeline.Op):
        """Texts to labels. No method may raise: Paddle Serving would send the exception to the client."""

        def _auto_batching_generator(self, input_channel, op_name, batch_size, timeout, op_info_prefix):
            """Yield lists of the requests that wait, at most batch_size. Paddle Serving's own way lets each request wait for
            others until a timeout, and wakes up at each timeout even if there is none."""
            while True:
                batch = [input_channel.front(op_name)]
                while len(batch) < batch_size and input_channel.size():
                    batch.append(input_channel.front(op_name))
                yield batch

        def preprocess(self, input_dicts, data_id=0, log_id=0):
            """{"rows": object array [texts] of lists of token ids}: arrays of requests in work at once are joined to one."""
            try:
                [request] = input_dicts.values()
                rows = np.empty(len(request["texts"]), object)
                rows[:] = [encoding.ids for encoding in tokenizer.encode_batch_fast(request["texts"])]
            except Exception:
                logger.exception("tokenizing failed")
                return None, False, INTERNAL_ERROR, FAILED
            return {"rows": rows}, False, None, ""

        def process(self, feed_batch, typical_logid=0):
            """{"probs": float32 [texts, classes]}, NaN where the model failed. Batches are of like length."""
            rows = feed_batch[0]["rows"]
            probs = np.full((len(rows), len(export.labels)), np.nan, np.float32)
            try:
                for indices in sorted_batches([len(row) for row in rows], batch_size):
                    batch = pad_batch([rows[index] for index in indices], export.pad_id)
                    feed = {name: batch if name == "input_ids" else np.zeros_like(batch) for name in export.input_names}
                    [logits] = self.client.predict(feed=feed, fetch=self.client.fetch_names_, batch=True).values()
                    probs[indices] = softmax(logits)
            except Exception:
                logger.exception("the model failed")
            return {"probs": probs}, 0, ""

        def postprocess(self, input_dicts, fetch_data, data_id=0, log_id=0):
            """{"label": JSON list of str, "confidence": JSON list of numbers}; lists of lists for requests with top_k."""
            try:
                [request], probs = input_dicts.values(), fetch_data["probs"]
                if np.isnan(probs).any():
                    return {}, INTERNAL_ERROR, FAILED
                top = np.argsort(-probs, axis=1, kind="stable")[:, :request["top_k"] or 1]
                labels = [[export.labels[index] for index in row] for row in top]
                confidences = [[round(value, 6) for value in row] for row in np.take_along_axis(probs, top, axis=1).tolist()]
                if request["top_k"] is None:
                    labels, confidences = [row[0] for row in labels], [row[0] for row in confidences]
                return {"label": json.dumps(labels, ensure_ascii=False), "confidence": json.dumps(confidences)}, None, ""
            except Exception:
                logger.exception("the answer could not be written")
                return {}, INTERNAL_ERROR, FAILED

    return Classify(name=NAME, input_ops=[Request()])


def start_pipeline(pipeline, last_step, config, log_dir):
    """Load the model and start the pipeline. Returns Paddle Serving's servicer: its inference(request, None) answers."""
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


def read_model(folder):
    """The Export of a folder that build_model.py wrote. UserError; Paddle ends with a segmentation fault on a damaged graph."""
    if not os.path.isfile(os.path.join(folder, MARKER)):
        raise UserError(f"{folder}: {MARKER} is missing, expected the folder (model_config) that "
                        "`python build_model.py --export_dir ../../export` makes")
    export = read_export(folder, with_onnx=False)
    hashes = read_json(os.path.join(folder, "deploy.json")).get("sha256")
    for path in (export.model_path, export.params_path):
        if not isinstance(hashes, dict) or hashes.get(os.path.basename(path)) != sha256(path):
            raise UserError(f"{path}: damaged or of another model, expected the file that build_model.py wrote")
    return export


def check_answer(servicer, messages, folder, limits):
    """UserError where the pipeline cannot answer a request: the model does not fit the other files, or cannot run."""
    texts = ["疼" * limits.max_characters, "头"][:limits.max_texts]  # of all positions that there can be, and one that is padded
    response = servicer.inference(messages.Request(key=["sentence"], value=[json.dumps(texts)]), None)
    if response.err_no != 0:
        raise UserError(f"{folder}: the model cannot label a text, expected the folder as build_model.py wrote it; the cause is "
                        "in the log, PipelineServingLogs/pipeline.log in --log_dir")


def main():
    args = parse_arguments()
    config = read_config(args)
    folder = config["op"][NAME]["local_service_conf"]["model_config"]
    export = read_model(folder)
    check_ports(config)
    with output_to(args.log_dir) as stderr:
        pipeline = import_pipeline(args.log_dir, stderr)
        check_device(config)
        from paddle_serving_server.pipeline.proto import pipeline_service_pb2 as messages

        limits = Limits(args.max_texts, args.max_characters, args.max_bytes, len(export.labels))
        servicer = start_pipeline(pipeline, make_steps(pipeline, export, limits, args.batch_size), config, args.log_dir)
        check_answer(servicer, messages, folder, limits)
    serve(config, servicer, messages, limits)


def serve(config, servicer, messages, limits):
    """Listen until the process is told to end. Paddle Serving's own run_server binds all interfaces and takes 256 MB."""
    import grpc
    from google.protobuf.message import DecodeError

    def answer(keys, values, has_tensors, logid):
        request = messages.Request(key=keys, value=values, tensors=[messages.Tensor()] if has_tensors else [], logid=logid)
        response = servicer.inference(request, None)
        content = {"err_no": response.err_no, "err_msg": response.err_msg, "key": list(response.key),
                   "value": list(response.value), "tensors": []}
        return {0: 200, BAD_REQUEST: 400}.get(response.err_no, 500), content

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

    host, workers = config["host"], config["worker_num"]
    server = grpc.server(futures.ThreadPoolExecutor(workers), options=[("grpc.max_receive_message_length", limits.max_bytes),
                                                                       ("grpc.so_reuseport", 0)])
    inference = grpc.unary_unary_rpc_method_handler(
        lambda request, context: request if isinstance(request, messages.Response) else servicer.inference(request, context),
        request_deserializer=parse, response_serializer=messages.Response.SerializeToString)
    service = messages.DESCRIPTOR.services_by_name["PipelineService"].full_name
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"inference": inference})])
    address = f"[{host}]" if ":" in host else host
    try:
        server.add_insecure_port(f"{address}:{config['rpc_port']}")
        gateway = start_gateway(host, config["http_port"], f"/{NAME}/prediction", answer, limits, workers)
    except (OSError, RuntimeError) as error:  # taken since check_ports
        raise UserError(f"rpc_port {config['rpc_port']} or http_port {config['http_port']}: cannot be listened on ({error}), "
                        "expected free ports") from None
    server.start()
    print(f"Ready: http://{address}:{config['http_port']}/{NAME}/prediction and gRPC {address}:{config['rpc_port']}", flush=True)
    try:
        server.wait_for_termination()
    finally:
        stopped = server.stop(grace=DRAIN_SECONDS)
        gateway.drain(DRAIN_SECONDS)
        stopped.wait()


if __name__ == "__main__":
    try:
        run_script(main)
    except SystemExit as end:  # not by shutting Python down: the threads of Paddle 2.6.2 may abort the process meanwhile
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)
