"""HTTP in front of the pipeline: POST /seq_cls/prediction with Paddle Serving's JSON form of requests and answers.

It stands in the place of the gateway that Paddle Serving 0.9.0 brings, which refuses `"value": [["a", "b"]]`, answers wrong
types with messages of its Go library that name no field, turns invalid UTF-8 silently into U+FFFD, and binds all interfaces.
"""

import io
import json
import logging
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Optional

from request_check import BAD_REQUEST, BUSY, FAILED, INTERNAL_ERROR, Limits, RequestError, read_http_body

from textcls.runtime.listening import BODY_SECONDS, DISCARDED_BYTES, HEAD_SECONDS, IDLE_SECONDS

QUIET_SECONDS = 0.5  # when ending, for requests that are on their way
LINGER_SECONDS, BLOCK = 5, 1 << 16  # bytes at a time, after the last answer: what the client still sends
MOST_REFUSING = 50  # connections beyond the limit that are told so; further ones are closed at once
logger = logging.getLogger("seq_cls")
Answer = Callable[[list[str], list[str], bool, int], tuple[int, dict[str, Any]]]


class Gateway(ThreadingHTTPServer):
    """The server; each connection has a thread. Call drain() at the end. OSError: port in use.

    address: (host, port). path: of the one resource. answer: function of (keys, values, has_tensors, logid) -> (HTTP status,
    dict), which worker_num threads may call at once. limits: its max_connections and max_bytes (of a request body) hold here.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], path: str, answer: Answer, limits: Limits, worker_num: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.path, self.answer, self.limits = path, answer, limits
        self.slots, self.changed = threading.BoundedSemaphore(worker_num), threading.Condition()
        self.connections = self.busy = 0  # open connections, requests on them
        self.is_closing = False  # whether each answer is the last of its connection
        super().__init__(address, Handler)

    def drain(self, seconds: float) -> None:
        """Take no more connections and wait until what has come has been answered, for so long at most."""
        self.is_closing = True
        self.shutdown()
        while select.select([self.socket], [], [], 0)[0]:  # connections that the system has made already
            self.handle_request()
        self.server_close()
        time.sleep(QUIET_SECONDS)
        with self.changed:
            self.changed.wait_for(lambda: self.busy == 0, seconds)

    def count(self, connections: int = 0, busy: int = 0) -> None:
        """Count connections and requests that begin (1) or end (-1)."""
        with self.changed:
            self.connections += connections
            self.busy += busy
            self.changed.notify_all()

    def process_request(self, request, client_address):
        if self.connections >= self.limits.max_connections + MOST_REFUSING:
            return self.shutdown_request(request)
        self.count(connections=1)
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        super().process_request_thread(request, client_address)
        self.count(connections=-1)

    def handle_error(self, request, client_address):
        pass  # the client has gone, or is too slow; what goes wrong in an answer is answered


class TimedReader(io.RawIOBase):
    """Reads from a socket, until a deadline in time.monotonic()'s seconds: then socket.timeout."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.deadline = connection, time.monotonic() + HEAD_SECONDS

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("too slow")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection to a Gateway, `self.server`."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "seq_cls", ""
    wbufsize = -1  # buffered: head and body in one packet, else each answer takes 40 ms

    def setup(self):
        super().setup()
        self.reader = TimedReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)
        self.is_refused = self.server.connections > self.server.limits.max_connections

    def allow(self, seconds: float) -> None:
        """Let what is read and written from now on take so long at most."""
        self.reader.deadline = time.monotonic() + seconds
        self.connection.settimeout(seconds)

    def handle(self):
        super().handle()
        self.allow(LINGER_SECONDS)  # a client that is still sending would see a reset and not the answer
        self.connection.shutdown(socket.SHUT_WR)
        for _ in range(DISCARDED_BYTES // BLOCK):
            if not self.rfile.read1(BLOCK):
                break

    def handle_one_request(self):
        self.rfile.peek(1)  # the first byte, which may be long in coming
        self.allow(HEAD_SECONDS)
        super().handle_one_request()
        self.allow(IDLE_SECONDS)

    def handle_expect_100(self):
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def do_POST(self):
        self.server.count(busy=1)
        try:
            self.allow(BODY_SECONDS)
            keep_alive, self.close_connection = not self.close_connection, True  # until the body is read to its end
            status, content = self.check_head() or self.answer_body()
            self.close_connection = self.close_connection or self.server.is_closing or not keep_alive
            self.allow(BODY_SECONDS)
            self.reply(status, content)
        finally:
            self.server.count(busy=-1)

    def check_head(self) -> Optional[tuple[int, dict]]:
        """(HTTP status, dict) of a refusal, or None. The body is not read."""
        lengths = self.headers.get_all("Content-Length", [])
        length = lengths[0] if lengths else ""
        if self.is_refused:
            return 503, error("too many connections, come back later", BUSY)
        if self.path != self.server.path:
            return 404, error(f"path: unknown, expected {self.server.path}")
        if len(lengths) > 1 or (lengths and "Transfer-Encoding" in self.headers):  # smuggling
            return 400, error("Content-Length: given twice or beside Transfer-Encoding, expected it alone")
        if not (length.isascii() and length.isdecimal() and len(length) < 19):
            return 411, error("Content-Length: missing or no number, expected the bytes of the request body")
        if int(length) > self.server.limits.max_bytes:
            return 413, error(f"request body: {length} bytes, expected at most {self.server.limits.max_bytes}")
        return None

    def answer_body(self) -> tuple[int, dict]:
        """(HTTP status, dict) of the answer to a request whose head is right. close_connection: False where its body was read."""
        length = int(self.headers["Content-Length"])
        try:
            body = self.rfile.read(length)
        except socket.timeout:
            return 408, error(f"request body: not there within {BODY_SECONDS} seconds, expected {length} bytes")
        if len(body) < length:
            return 400, error(f"request body: {len(body)} bytes, expected the {length} of Content-Length")
        self.close_connection = False
        try:
            with self.server.slots:
                return self.server.answer(*read_http_body(body))
        except RequestError as refused:
            return 400, error(str(refused))
        except Exception:
            logger.exception("an HTTP request failed")
            return 500, error(FAILED, INTERNAL_ERROR)

    def reply(self, status: int, content: dict) -> None:
        body = (json.dumps(content, ensure_ascii=False) + "\n").encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def send_error(self, code, message=None, explain=None):  # by the base class: other methods, malformed requests
        self.close_connection, self.request_version = True, self.protocol_version  # without the latter no status line is sent
        self.reply(code, error(f"request: not understood, expected POST {self.server.path}"))

    def log_message(self, format, *args):
        pass


def start_gateway(address: tuple[str, int], path: str, answer: Answer, limits: Limits, worker_num: int) -> Gateway:
    """Serve HTTP in threads of this process. Returns the Gateway, whose arguments these are. OSError: port in use."""
    gateway = Gateway(address, path, answer, limits, worker_num)
    threading.Thread(target=gateway.serve_forever, name="http", daemon=True).start()
    return gateway


def error(message: str, number: int = BAD_REQUEST) -> dict[str, Any]:
    """A refusal in Paddle Serving's JSON form of answers."""
    return {"err_no": number, "err_msg": message, "key": [], "value": [], "tensors": []}
