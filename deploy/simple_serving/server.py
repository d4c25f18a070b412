"""Serve an exported model by HTTP, with ONNX Runtime; no Paddle is needed.

    python server.py --export_dir ../../export
    python server.py --export_dir ../../export --use_quantize --calibration_file ../../data/dev.txt
    python server.py --export_dir ../../export --host 0.0.0.0 --port 8189 --token_file token.txt
    python server.py --export_dir ../../export --workers 4
    python server.py --export_dir ../../export --device gpu --use_fp16
    python server.py --export_dir ../../output --index_dir ../../index

Reads   export_dir, written by export_model.py --onnx or prune.py --onnx, or a sentence encoder by retrieval_based/
        export_model.py, with index_dir by build_index.py there; token_file, one line. A change of the index is noticed.
Serves  POST /predict and /taskflow/cls, GET /health/live, /health/ready, /metrics, /docs, /openapi.json.
Writes  a JSON object per event and request to standard error. SIGTERM or Ctrl-C: it takes no new connections, answers what
        it has accepted, and ends with code 0; a second one ends it at once. A worker that dies is started again.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Optional

from textcls.common.errors import UserError, needs_packages, run_script
from textcls.common.options import make_parser, positive_int, read_token_file, thread_count
from textcls.runtime.exported import read_export, threshold_or_reason
from textcls.runtime.listening import BODY_SECONDS, HEAD_SECONDS, IDLE_SECONDS, MAX_TEXT_LENGTH, listen, listen_together, url_host
from textcls.runtime.quantize import add_device_options, check_calibration, check_device, refuse_calibration

with needs_packages("deploy/simple_serving/requirements.txt"):
    import uvicorn
    from app import encode_json, make_app
    from batching import MicroBatcher
    from kinds import Kind, classifier, search
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    from workers import Workers

    from textcls.retrieval.predictor import SearchPredictor
    from textcls.runtime.onnx_model import count_threads
    from textcls.runtime.predictor import Predictor

MOST_OVERHEAD = 1 << 19  # a network read is up to half of it, and may hold several small requests
UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)  # a header
BATCH_SIZE = {"cpu": 16, "gpu": 32}  # texts, at most
BATCH_COST = {"cpu": 24, "gpu": 1000}  # of MicroBatcher, tokens; measured on a CPU, on a GPU all that waits is worth a batch
QUIET_SECONDS = 1.0  # when shutting down, for requests that are on their way
logger = logging.getLogger("serving")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--export_dir", default="../../export", help="exported folder")
    parser.add_argument("--index_dir", help="index of a sentence encoder; None: the folder index in export_dir")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of the machine")
    parser.add_argument("--port", type=int, default=8189, help="0: any free one, which the log names")
    parser.add_argument("--workers", type=positive_int, default=1, help="processes that share the port")
    parser.add_argument("--token_file", help="file with a token that requests must bring: Authorization: Bearer <token>")
    model = parser.add_argument_group("model")
    add_device_options(model)
    model.add_argument("--num_threads", type=thread_count, help="CPU threads of each worker; None: usable cores / workers")
    model.add_argument("--batch_size", type=positive_int, help="texts per batch; None: 16 on a CPU, 32 on a GPU")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max_texts", type=positive_int, default=256, help="texts per request")
    limits.add_argument("--max_text_length", type=positive_int, default=MAX_TEXT_LENGTH, help="characters per text")
    limits.add_argument("--max_body_bytes", type=positive_int, default=1 << 20, help="bytes per request")
    limits.add_argument("--max_queue", type=positive_int, default=2048, help="texts that may wait; beyond: status 503")
    limits.add_argument("--max_connections", type=positive_int, default=500, help="open connections; beyond: status 503")
    limits.add_argument("--body_seconds", type=positive_int, default=BODY_SECONDS, help="a request's body must come within these")
    limits.add_argument("--drain_seconds", type=positive_int, default=30, help="accepted requests may take so long at the end")
    args = parser.parse_args()
    if not args.host:
        parser.error("--host: empty, expected an address of this machine, or 0.0.0.0 for all")
    check_calibration(parser, args)
    if args.max_queue < args.max_texts:
        parser.error(f"--max_queue {args.max_queue}: expected at least --max_texts, {args.max_texts}")
    return args


class JsonLines(logging.Formatter):
    """A record as one line of JSON; texts of requests are never logged."""

    def format(self, record):
        entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
                 "level": record.levelname, "message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return encode_json(entry)


def set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("serving", "predictor"):
        logging.getLogger(name).setLevel(logging.INFO)


class Protocol(HttpToolsProtocol):
    """uvicorn's, with limits for the head of a request, too: of time, else silent connections stay for ever, and of bytes.

    A connection that ends ends the work on its requests.
    """

    timer, overhead = None, 0  # bytes of a request but for its body: head, marks of chunks, trailers

    def connection_made(self, transport):
        super().connection_made(transport)
        self.cycles = []  # uvicorn's objects of the requests that are not answered yet; it knows the last one only
        self.expect_head()

    def on_message_begin(self):
        super().on_message_begin()
        self.expect_head()

    def expect_head(self):
        self.stop_timer()
        self.timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def data_received(self, data):
        if not self.overhead:
            # Java's HTTP client asks for HTTP/2 in each request, as Spring's does: httptools 0.9 with uvicorn 0.54 then loses
            # the body. To go when https://github.com/Kludex/uvicorn/issues/2722 is closed.
            head, end, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"", head) + end + rest
        self.overhead += len(data)
        super().data_received(data)
        if self.overhead > MOST_OVERHEAD and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_body(self, body):
        self.overhead -= len(body)
        super().on_body(body)

    def on_message_complete(self):
        self.overhead = 0
        self.cycle.scope["state"]["body_is_here"] = True
        super().on_message_complete()

    def stop_timer(self):
        if self.timer is not None:
            self.timer.cancel()

    def on_headers_complete(self):
        self.stop_timer()
        super().on_headers_complete()
        self.cycles = [cycle for cycle in self.cycles if not cycle.response_complete] + [self.cycle]

    def connection_lost(self, error):
        self.stop_timer()
        for cycle in self.cycles:
            cycle.disconnected = not cycle.response_complete
            if cycle.disconnected and "work" in cycle.scope["state"]:
                cycle.scope["state"]["work"].cancel()
        super().connection_lost(error)


class Server(uvicorn.Server):
    """uvicorn's server; ends without losing a request. draining: whether it is about to end."""

    draining = False

    def handle_exit(self, sig, frame):
        self.force_exit, self.should_exit = self.should_exit, True  # uvicorn would raise the signal again at the end

    async def shutdown(self, sockets=None):
        """Stop listening, let each open connection bring its next answer as the last one, then end as uvicorn does.

        Closing the socket would reset connections that the system has made and uvicorn has not seen yet: they are taken
        first. Without the pause connections on which a request is on its way would be reset.
        """
        logger.info("shutting down: answering what was accepted")
        self.draining = True
        taken = []
        for listening in sockets:
            with contextlib.suppress(BlockingIOError):
                while True:
                    taken.append(listening.accept()[0])
            listening.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: self.config.http_protocol_class(
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state), connection)
        for server in self.servers:
            server.close()
        end = time.monotonic() + QUIET_SECONDS
        while self.server_state.connections and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)


def open_model(args: argparse.Namespace) -> Kind:
    """Open the model that --export_dir names: a classifier, or an encoder with the index that it searches. UserError."""
    check_device(args.device, args.dtype)
    options = {"device": args.device, "device_id": args.device_id, "dtype": args.dtype, "num_threads": args.num_threads}
    if not read_export(args.export_dir, output=None).labels:
        refuse_calibration(args)
        folder = args.export_dir if os.path.isdir(args.export_dir) else os.path.dirname(args.export_dir)
        return search(SearchPredictor(folder, args.index_dir or os.path.join(folder, "index"), **options))
    if args.index_dir:
        raise UserError(f"--index_dir {args.index_dir}: {args.export_dir} is a classifier, which searches nothing, expected a "
                        "sentence encoder that retrieval_based/export_model.py wrote")
    predictor = Predictor(args.export_dir, **options, calibration_file=args.calibration_file,
                          allow_accuracy_drop=args.allow_accuracy_drop)
    return classifier(predictor, threshold_or_reason(read_export(args.export_dir)))


def warm_up(kind: Kind, args: argparse.Namespace, batch_size: int, slots: int) -> None:
    """Run the largest batches that can come, on all threads: memory is laid out once, nothing is slow later."""
    texts = ["暖" * args.max_text_length] + ["暖" * min(args.max_text_length, kind.max_seq_length)] * (batch_size - 1)
    with ThreadPoolExecutor(slots) as pool:
        list(pool.map(kind.run, [texts] * slots * 4, [[kind.Parameters()] * batch_size] * slots * 4))


def make_server(args: argparse.Namespace) -> Server:
    """Make the server, still without its application."""
    return Server(uvicorn.Config(
        None, http=Protocol, log_config=None, access_log=False, lifespan="off", server_header=False,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=args.drain_seconds,
        limit_concurrency=args.max_connections))


def serve(on_ready: Callable[[dict[str, Any]], None], listening: Optional[socket.socket], args: argparse.Namespace,
          token: Optional[str]) -> None:
    """Open the model and serve it until a signal comes. listening: None: made when the model is ready. on_ready: called then,
    with what the log says of the server."""
    set_up_logging()
    kind, num_threads = open_model(args), count_threads(args.device, args.num_threads)
    batch_size = args.batch_size or BATCH_SIZE[args.device]
    # one batch more than threads where it can wait for something else: for the GPU, or for a changed index to be opened
    slots = num_threads + (args.device == "gpu" or kind.refresh is not None)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each batch in its own thread: a pool more costs memory
    warm_up(kind, args, batch_size, slots)
    listening = listening or listen(args.host, args.port, "--port")
    batcher = MicroBatcher(kind.run, batch_size, BATCH_COST[args.device], kind.max_seq_length, slots, args.max_queue)
    server = make_server(args)
    server.config.app = make_app(batcher, kind, args, token, lambda: server.draining)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, server.handle_exit)
    on_ready({"url": f"http://{url_host(args.host)}:{listening.getsockname()[1]}", "labels": len(kind.predictor.labels),
              "max_seq_length": kind.max_seq_length, "threads": num_threads, "batch_size": batch_size})
    server.run(sockets=[listening])


def main():
    args = parse_arguments()
    set_up_logging()
    token = read_token_file(args.token_file, shortest=16) if args.token_file is not None else None

    def on_ready(figures):
        if token is None and args.host not in ("127.0.0.1", "::1", "localhost"):
            logger.warning("everyone who reaches %s can use this server, expected --token_file, or a guarded network", args.host)
        logger.info("listening", extra={"fields": figures})

    if args.workers == 1:
        serve(on_ready, None, args, token)
        return
    args.num_threads = args.num_threads or max(1, count_threads(args.device) // args.workers)
    sockets = listen_together(args.host, args.port, "--port", args.workers)
    code = Workers(serve, sockets, args, token).run(lambda figures: on_ready({**figures, "workers": args.workers}))
    sys.exit(code)


if __name__ == "__main__":
    run_script(main)
