"""HTTP in front of the pipeline: POST /seq_cls/prediction with Paddle Serving's JSON form of requests and answers.

It stands in the place of the gateway that Paddle Serving 0.9.0 brings, which refuses `"value": [["a", "b"]]`, answers wrong
types with messages of its Go library that name no field, turns invalid UTF-8 silently into U+FFFD, and binds all interfaces.
"""

import json
import logging
import select
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6

from request_check import BAD_REQUEST, FAILED, INTERNAL_ERROR, RequestError, read_http_body

QUIET_SECONDS = 0.5  # when ending, for requests that are on their way
IDLE_SECONDS = 60  # after which a connection that sends nothing is closed
BLOCK, MOST_DISCARDED = 1 << 16, 1 << 27  # bytes of a request body that is too large
logger = logging.getLogger("seq_cls")


class Gateway(ThreadingHTTPServer):
    """The server; each connection has a thread. Call drain() at the end. OSError: port in use.

    address: (host, port). path: of the one resource. answer: function of (keys, values, has_tensors, logid) -> (HTTP status,
    dict), which worker_num threads may call at once. max_bytes: of a request body.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, path, answer, max_bytes, worker_num):
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        self.path, self.answer, self.max_bytes = path, answer, max_bytes
        self.slots, self.changed = threading.BoundedSemaphore(worker_num), threading.Condition()
        self.busy, self.is_closing = 0, False  # number of requests; whether each answer is the last of its connection
        super().__init__(address, Handler)

    def drain(self, seconds):
        """Take no more connections and wait until what has come has been answered, for so long at most."""
        self.is_closing = True
        self.shutdown()
        while select.select([self.socket], [], [], 0)[0]:  # connections that the system has made already
            self.handle_request()
        self.server_close()
        time.sleep(QUIET_SECONDS)
        with self.changed:
            self.changed.wait_for(lambda: self.busy == 0, seconds)

    def count_busy(self, change):
        """Count a request that begins (1) or ends (-1)."""
        with self.changed:
            self.busy += change
            self.changed.notify_all()

    def handle_error(self, request, client_address):
        pass  # the client has gone; what goes wrong in an answer is answered


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection to a Gateway, `self.server`."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "seq_cls", ""
    timeout, wbufsize = IDLE_SECONDS, -1  # buffered: head and body in one packet, else each answer takes 40 ms

    def do_POST(self):
        self.server.count_busy(1)
        try:
            self.answer_request()
            self.wfile.flush()
        finally:
            self.server.count_busy(-1)

    def answer_request(self):
        keep_alive, self.close_connection = not self.close_connection, True  # until the body is read to its end
        refusal = self.check_head()
        if refusal:
            return self.reply(*refusal)
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:
            return self.reply(400, error(f"request body: {len(body)} bytes, expected the {length} of Content-Length"))
        try:
            with self.server.slots:
                status, content = self.server.answer(*read_http_body(body))
        except RequestError as refused:
            status, content = 400, error(str(refused))
        except Exception:
            logger.exception("an HTTP request failed")
            status, content = 500, error(FAILED, INTERNAL_ERROR)
        self.close_connection = self.server.is_closing or not keep_alive
        self.reply(status, content)

    def check_head(self):
        """(HTTP status, dict) of a refusal, or None. A body that is too large is read and thrown away, up to MOST_DISCARDED."""
        if self.path != self.server.path:
            return 404, error(f"path: unknown, expected {self.server.path}")
        if "Transfer-Encoding" in self.headers or len(self.headers.get_all("Content-Length", [])) > 1:  # smuggling
            return 400, error("Content-Length: given twice or beside Transfer-Encoding, expected it alone")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and len(length) < 19):
            return 411, error("Content-Length: missing or no number, expected the bytes of the request body")
        if int(length) > self.server.max_bytes:
            for _ in range(min(int(length), MOST_DISCARDED) // BLOCK):  # a client that is still sending would not see it
                self.rfile.read(BLOCK)
            return 413, error(f"request body: {length} bytes, expected at most {self.server.max_bytes}")
        return None

    def reply(self, status, content):
        body = (json.dumps(content, ensure_ascii=False) + "\n").encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code, message=None, explain=None):  # by the base class: other methods, malformed requests
        self.close_connection = True
        self.reply(code, error(f"request: not understood, expected POST {self.server.path}"))

    def log_message(self, format, *args):
        pass


def start_gateway(address, path, answer, max_bytes, worker_num):
    """Serve HTTP in threads of this process. Returns the Gateway, whose arguments these are. OSError: port in use."""
    gateway = Gateway(address, path, answer, max_bytes, worker_num)
    threading.Thread(target=gateway.serve_forever, name="http", daemon=True).start()
    return gateway


def error(message, number=BAD_REQUEST):
    """A refusal in Paddle Serving's JSON form of answers."""
    return {"err_no": number, "err_msg": message, "key": [], "value": [], "tensors": []}
