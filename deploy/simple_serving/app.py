"""The HTTP interface: request and answer schemas with their limits, routes, error answers, metrics, authorization, logs."""

import contextlib
import hmac
import html
import json
import logging
import os
import re
import secrets
import time
from argparse import Namespace
from pathlib import Path
from typing import Annotated, Any, Callable, Optional, Union

import anyio
from batching import MicroBatcher, QueueFull
from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from kinds import Conflict, Figure, Kind, Status, Strict
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from workers import METRICS_FOLDER

from textcls.common.texts import TEXT, TEXT_PATTERN
from textcls.runtime.listening import DISCARDED_BYTES

HEALTH = ("/health/live", "/health/ready")  # are not logged
STATIC = "/static-offline-docs"  # what the page /docs loads
PAGE = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("page.css", "text/css")}
PAGE_HEADERS = {  # the page loads and asks this server only, runs no other script, and stands in no other page
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
OPEN = (*HEALTH, *PAGE, "/docs", "/openapi.json")  # need no token, as do the files of STATIC; everything else does
CLIENT_GONE = 499  # what log and metrics say of a request whose client has gone before it had an answer
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)  # upper bounds of the histogram of latencies
JSON_TYPE = re.compile(rb"application/([\w.-]+\+)?json\s*(;|$)", re.IGNORECASE)
Predictions = dict[str, tuple[type[BaseModel], Callable]]  # path -> class of its requests, async function from one to a Response
encode_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one each time
logger = logging.getLogger("serving")


class TaskflowPrediction(BaseModel):
    label: str
    score: float


class TaskflowAnswer(BaseModel):
    predictions: list[TaskflowPrediction]
    text: str


class TaskflowPredicted(BaseModel):
    result: list[TaskflowAnswer]


class Problem(BaseModel):
    field: str = Field(description="where in the request, e.g. data.text.0; empty: the request as a whole")
    message: str


class Refused(BaseModel):
    errors: list[Problem]


REFUSALS = {code: {"model": Refused, "description": meaning} for code, meaning in (
    (400, "not HTTP or JSON that can be read"), (401, "no token, or a wrong one"), (408, "the body did not come in time"),
    (413, "the body is too large"),
    (422, "a field is wrong"), (500, "the model failed"), (503, "too many texts are waiting; come back later"))}


def check_text(text: str) -> str:
    """Return a text as it is, for pydantic. PydanticCustomError where it is none."""
    if problem := TEXT.problem(text):
        raise PydanticCustomError("no_text", f"{problem}, expected {TEXT.expected}")
    return text


def request_schemas(kind: Kind, limits: Namespace) -> tuple[type[BaseModel], type[BaseModel]]:
    """Make the classes of the two requests, of /predict and of /taskflow/cls, with the limits in them."""
    Parameters = kind.Parameters
    schema = {"minLength": 1, "pattern": TEXT_PATTERN}
    one_text = Annotated[str, Field(max_length=limits.max_text_length, json_schema_extra=schema), AfterValidator(check_text)]
    some_texts = Annotated[list[one_text], Field(min_length=1, max_length=limits.max_texts)]

    class Data(Strict):
        text: some_texts

    class PredictRequest(Strict):
        data: Data
        parameters: Parameters = Parameters()
        model_config = ConfigDict(json_schema_extra={"examples": [
            {"data": {"text": ["头疼怎么办", "拔牙多少钱"]}, "parameters": kind.example}]})

    class TaskflowData(Strict):
        text: Annotated[Union[Annotated[one_text, Tag("one")], Annotated[some_texts, Tag("several")]],
                        Discriminator(lambda value: "several" if isinstance(value, list) else "one")]

    class TaskflowRequest(Strict):
        data: TaskflowData
        parameters: dict = Field({}, description="taken for old clients, and without effect")
        model_config = ConfigDict(json_schema_extra={"examples": [{"data": {"text": ["头疼怎么办", "拔牙多少钱"]}}]})

    return PredictRequest, TaskflowRequest


class Metrics:
    """What /metrics shows, for Prometheus; of several workers together where the environment names METRICS_FOLDER."""

    def __init__(self, waiting: Callable[[], int], figures: dict[str, Figure]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("serving_requests", "Requests answered", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("serving_request_seconds", "Time from the request to its answer", ["path"], buckets=SECONDS,
                                 registry=self.registry)
        self.texts = Counter("serving_texts", "Texts labelled", registry=self.registry)
        self.batches = Histogram("serving_batch_size", "Texts per batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
                                 registry=self.registry)
        self.waiting = Gauge("serving_queue_texts", "Texts that wait for a batch", registry=self.registry,
                             multiprocess_mode="livesum")
        self.count_waiting = waiting
        self.figures = [(figure, Gauge(f"serving_{name}", meaning, registry=self.registry, multiprocess_mode="livemostrecent"))
                        for name, (meaning, figure) in figures.items()]

    def note_batch(self, size: int) -> None:
        """Count a batch of so many texts."""
        self.batches.observe(size)
        self.waiting.set(self.count_waiting())

    def show(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        self.waiting.set(self.count_waiting())
        for figure, gauge in self.figures:
            gauge.set(figure())
        registry = self.registry
        if METRICS_FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)


def json_response(content: dict[str, Any], status: int = 200, headers: Optional[dict[str, str]] = None) -> Response:
    return Response(encode_json(content).encode(), status, headers, "application/json")


def refuse(status: int, message: str, field: str = "", headers: Optional[dict[str, str]] = None) -> Response:
    return json_response({"errors": [{"field": field, "message": message}]}, status, headers)


def make_app(batcher: MicroBatcher, kind: Kind, limits: Namespace, token: Optional[str],
             is_draining: Callable[[], bool]) -> "Guard":
    """Make the ASGI application.

    batcher: one of kind.run; its on_batch is set here. limits: with max_texts, max_text_length (characters), max_body_bytes and
    body_seconds. token: None: no authorization. is_draining: whether the server is shutting down.
    """
    app = FastAPIOffline(title="Text classification", version="1", redoc_url=None, redirect_slashes=False, static_url=STATIC,
                         separate_input_output_schemas=False,
                         description="Single-label classification of texts. All errors have the form of `Refused`.")
    metrics = Metrics(lambda: batcher.waiting, kind.figures)
    batcher.on_batch = metrics.note_batch
    bearer = [Depends(HTTPBearer(auto_error=False))] if token else []  # for the OpenAPI page; `Guard` checks
    predictions = add_predictions(app, batcher, kind, limits, bearer, metrics)
    add_page(app, kind, limits, bool(token))
    add_health(app, batcher, kind, is_draining)
    add_metrics(app, kind, bearer, metrics)
    add_refusals(app)
    known = {route.path for route in app.routes if hasattr(route, "path")}
    return Guard(app, predictions, known, limits, token, is_draining, metrics)


def add_predictions(app: FastAPI, batcher: MicroBatcher, kind: Kind, limits: Namespace, bearer: list,
                    metrics: Metrics) -> "Predictions":
    """Add /predict and /taskflow/cls, so that FastAPI describes them; `Guard` calls the Predictions itself."""
    PredictRequest, TaskflowRequest = request_schemas(kind, limits)

    async def answer(texts, parameters):
        """Return per text its answer, a dict."""
        items = await batcher(texts, parameters)
        metrics.texts.inc(len(texts))
        return kind.answer(items, parameters)

    refusals = {**REFUSALS, **{code: {"model": Refused, "description": meaning} for code, meaning in kind.refusals.items()}}

    @app.post("/predict", response_model=kind.Predicted, responses=refusals, dependencies=bearer)
    async def predict(request: PredictRequest):
        """Label texts; confidences are probabilities."""
        return json_response({"result": await answer(request.data.text, request.parameters)})

    @app.post("/taskflow/cls", response_model=TaskflowPredicted, responses=REFUSALS, dependencies=bearer)
    async def taskflow(request: TaskflowRequest):
        """The form of PaddleNLP's SimpleServer with a Taskflow."""
        texts = [request.data.text] if isinstance(request.data.text, str) else request.data.text
        answers = await answer(texts, kind.Parameters())
        return json_response({"result": [{"predictions": [{"label": best["label"], "score": best["confidence"]}], "text": text}
                                         for text, best in zip(texts, answers)]})

    return {"/predict": (PredictRequest, predict), "/taskflow/cls": (TaskflowRequest, taskflow)}


async def call_prediction(content_type: bytes, body: bytes, Wanted: type[BaseModel], predict: Callable) -> Response:
    """Check a request's body and answer it by one of the Predictions, or by the refusal that it deserves.

    It takes the place of the layers that FastAPI puts around each request, which took a quarter of the event loop's time.
    """
    if not JSON_TYPE.match(content_type):
        return refuse(422, "expected application/json", "Content-Type")
    try:
        return await predict(Wanted.model_validate(json.loads(body)))
    except RecursionError:
        return refuse(400, "the body is not UTF-8 or not JSON")
    except ValidationError as error:
        return json_response({"errors": [
            {"field": ".".join(str(part) for part in item["loc"] if part not in ("one", "several")), "message": item["msg"]}
            for item in error.errors(include_url=False, include_context=False, include_input=False)[:20]]}, 422)
    except json.JSONDecodeError:
        return refuse(422, "the body is not JSON")
    except Conflict as error:
        field, message = error.args
        return refuse(409, message, field)
    except QueueFull:
        return refuse(503, "too many texts are waiting, come back later", headers={"Retry-After": "1"})


def add_page(app: FastAPI, kind: Kind, limits: Namespace, needs_token: bool) -> None:
    """Add the page at / for people who want to try the model: what it asks is in page.js."""
    settings = html.escape(json.dumps({"parameters": kind.example, "max_texts": limits.max_texts, "needs_token": needs_token}))
    for path, (name, media_type) in PAGE.items():
        content = Path(__file__).with_name("page").joinpath(name).read_text(encoding="utf-8").replace("$settings", settings)
        app.add_route(path, show_file(content, media_type), include_in_schema=False)


def show_file(content: str, media_type: str) -> Callable:
    """Make the function that answers a request for a file of the page."""
    async def show(request: Request):
        return Response(content, headers=PAGE_HEADERS, media_type=media_type)
    return show


async def refresh(kind: Kind) -> None:
    """Let the figures of a Kind be those of now."""
    if kind.refresh:
        await anyio.to_thread.run_sync(kind.refresh)


def add_health(app: FastAPI, batcher: MicroBatcher, kind: Kind, is_draining: Callable[[], bool]) -> None:
    """Add the two routes of HEALTH."""
    @app.get("/health/live", response_model=Status)
    async def live():
        """The process runs."""
        return json_response({"status": "live"})

    @app.get("/health/ready", response_model=kind.Status, responses={503: {"model": Refused}})
    async def ready():
        """Requests are welcome: not while the server is shutting down or its queue is full."""
        if is_draining():
            return refuse(503, "shutting down")
        if batcher.waiting >= batcher.max_queue:
            return refuse(503, "the queue is full")
        await refresh(kind)
        return json_response({"status": "ready", **{name: figure() for name, (_, figure) in kind.figures.items()}})


def add_metrics(app: FastAPI, kind: Kind, bearer: list, metrics: Metrics) -> None:
    """Add /metrics."""
    @app.get("/metrics", dependencies=bearer, responses={200: {"content": {"text/plain": {}}}, 401: REFUSALS[401]},
             response_class=Response)
    async def show_metrics():
        """Figures in Prometheus's text format."""
        await refresh(kind)
        return Response(metrics.show(), media_type=CONTENT_TYPE_LATEST)


def add_refusals(app: FastAPI) -> None:
    """Give all errors the form of Refused."""
    @app.exception_handler(HTTPException)
    async def failed(request: Request, error):
        return refuse(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error):
        return refuse(500, "internal error, see the server's log")


class Guard:
    """What holds for every request, around the application: request id, token, size of the body, metrics, a line of log.

    The body is read here, bounded, before anything is parsed. While draining, each answer ends its connection. A request whose
    client has gone is dropped: server.Protocol cancels the scope that is put into scope["state"] here.
    """

    def __init__(self, app: FastAPI, predictions: Predictions, known: set[str], limits: Namespace, token: Optional[str],
                 is_draining: Callable[[], bool], metrics: Metrics) -> None:
        self.app, self.predictions, self.known, self.limits = app, predictions, known, limits
        self.is_draining, self.metrics = is_draining, metrics
        self.token = token.encode() if token else None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, headers, status = time.perf_counter(), dict(scope["headers"]), None
        wanted = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = wanted if re.fullmatch(r"[\w.-]{1,64}", wanted, re.ASCII) else secrets.token_hex(8)

        async def answer(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode())] + [(b"connection", b"close")] * self.is_draining()
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            with anyio.CancelScope() as scope["state"]["work"]:
                refusal, body = await self.check(scope, headers, receive)
                if scope["path"] in self.predictions and scope["method"] == "POST" and not refusal:
                    refusal = await call_prediction(headers.get(b"content-type", b""), body, *self.predictions[scope["path"]])
                if refusal:
                    await refusal(scope, receive, answer)
                else:
                    await self.app(scope, replay(body, receive), answer)
        except Exception:  # the client gets a neutral answer (here, or before by `broken`), the log the traceback
            logger.exception("request %s failed", request_id)
            if status is None:
                await refuse(500, "internal error, see the server's log")(scope, receive, answer)
        path, seconds = scope["path"] if scope["path"] in self.known else "other", time.perf_counter() - start
        status = status or CLIENT_GONE
        self.metrics.requests.labels(path, status).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        if path not in HEALTH or status != 200:
            logger.info("request", extra={"fields": {
                "request_id": request_id, "client": (scope.get("client") or ["-"])[0], "method": scope["method"],
                "path": path, "status": status, "ms": round(seconds * 1000, 2)}})

    async def check(self, scope, headers, receive) -> tuple[Optional[Response], Optional[bytes]]:
        """Read the body. Returns it, or the response that refuses the request.

        What is refused is read to its end, too, within reason: where a connection is closed on a client that still sends, the
        client sees a reset and not the answer.
        """
        declared = int(headers.get(b"content-length", b"0"))  # the HTTP parser takes digits only
        limit, most = self.limits.max_body_bytes, max(self.limits.max_body_bytes, DISCARDED_BYTES)
        too_large = refuse(413, f"the body has more than {limit} bytes", headers={"Connection": "close"})
        refusal, body, size, more = None, bytearray(), 0, True
        if self.token and needs_token(scope["path"]) and not hmac.compare_digest(given_token(headers), self.token):
            refusal = refuse(401, "the header Authorization: Bearer <token> is missing or wrong", "Authorization",
                             {"WWW-Authenticate": "Bearer", "Connection": "close"})
        elif declared > limit:
            refusal = too_large
        if declared > most or (refusal and b"expect" in headers):  # nobody has sent the body of the latter yet
            return refusal, None
        # no timer where there is nothing to wait for, which is nearly always
        is_here = "body_is_here" in scope["state"]
        with contextlib.nullcontext() if is_here else anyio.move_on_after(self.limits.body_seconds) as timer:
            while more and size <= most:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return refuse(CLIENT_GONE, "the connection ended before the body"), None
                more, chunk = message.get("more_body", False), message.get("body", b"")
                size += len(chunk)
                refusal = refusal or (too_large if size > limit else None)
                if not refusal:
                    body += chunk
        if timer and timer.cancelled_caught:
            return refuse(408, "the body did not come in time", headers={"Connection": "close"}), None
        if not refusal and not is_utf8(body):
            refusal = refuse(400, "the body is not UTF-8 or not JSON")
        return refusal, bytes(body)


def needs_token(path: str) -> bool:
    """Whether a path is for those who have the token: all are, but for OPEN and what the page /docs loads."""
    return path not in OPEN and not path.startswith(f"{STATIC}/")


def given_token(headers: dict[bytes, bytes]) -> bytes:
    """Return the token that a request brings, b"" without one."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token if scheme.lower() == b"bearer" else b""


def is_utf8(body: bytearray) -> bool:
    """Whether bytes are UTF-8 without NUL, which JSON has not, but UTF-16 has."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in body


def replay(body, receive):
    """Make an ASGI receive function that gives the body that was read, then what the server says further."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message():
        return messages.pop() if messages else await receive()
    return next_message
