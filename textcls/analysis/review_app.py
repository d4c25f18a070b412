"""The HTTP side of review.py: the page, its requests, and who is refused. Needs no Paddle."""

import hmac
import re
import secrets
from pathlib import Path
from typing import Any, Optional

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from textcls.analysis.review_journal import Entry
from textcls.analysis.review_session import Review, Stale
from textcls.common.errors import UserError

PAGE = Path(__file__).resolve().parent / "review_page.html"
HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")  # with any port: that of an ssh tunnel is another one
MOST_BYTES = 1 << 16  # of a request: it holds no text but names
POLICY = ("default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
WHO = Field(min_length=1, max_length=40, pattern=r"^[^\s\x00-\x1f]([^\x00-\x1f]*[^\s\x00-\x1f])?$")  # a person's name
KIND = Field("all", pattern="^(all|train|duplicates|dev|data|people|skipped)$")


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")
    who: str = WHO


class CardRequest(Request):
    kind: str = KIND


class DecideRequest(CardRequest):
    key: str = Field(max_length=40)
    action: str = Field(max_length=10)
    label: Optional[int] = None
    seen: int = 0
    seconds: float = Field(0.0, ge=0, le=1e6)
    final: bool = False


class LabelRequest(Request):
    name: str = Field(max_length=100)
    label: Optional[int] = None


class ApplyRequest(Request):
    overwrite: bool = False


class KeyRequest(Request):
    key: str = Field(max_length=40)


def refuse(status: int, message: str, **content: Any) -> JSONResponse:
    return JSONResponse({"error": message, **content}, status)


def make_app(review: Review, token: str) -> "Guard":
    """Make the ASGI application. Each request but that for the page has to bring the token, which the page has in its address."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/")
    def show_page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(page.replace("{{ nonce }}", nonce), headers={
            "Content-Security-Policy": POLICY.format(nonce=nonce), "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff"})

    add_requests(app, review)

    @app.exception_handler(UserError)
    async def wrong(request: Any, error: UserError) -> JSONResponse:
        return refuse(409, str(error), stale=isinstance(error, Stale))

    @app.exception_handler(OSError)
    async def failed(request: Any, error: OSError) -> JSONResponse:
        return refuse(507, f"{error.filename or review.journal.path}: {error.strerror}: not saved")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Any, error: RequestValidationError) -> JSONResponse:
        return refuse(422, "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in error.errors()[:5]))

    return Guard(app, token)


def add_requests(app: FastAPI, review: Review) -> None:
    """Add the requests of the page. FastAPI runs each in a thread."""
    def answer(who: str, card: Optional[Entry]) -> dict[str, Any]:
        return {"card": card, **review.figures(who)}

    @app.post("/api/state")
    def state(request: Request) -> dict[str, Any]:
        return review.state(request.who)

    @app.post("/api/card")
    def card(request: CardRequest) -> dict[str, Any]:
        with review.lock:
            return answer(request.who, review.next_card(request.who, request.kind))

    @app.post("/api/decide")
    def decide(request: DecideRequest) -> dict[str, Any]:
        with review.lock:
            review.decide(request.who, request.key, request.action, request.label, request.seen, request.seconds, request.final)
            return answer(request.who, review.next_card(request.who, request.kind))

    @app.post("/api/undo")
    def undo(request: Request) -> dict[str, Any]:
        with review.lock:
            return answer(request.who, review.undo(request.who))

    @app.post("/api/label")
    def label(request: LabelRequest) -> dict[str, Any]:
        with review.lock:
            review.change_label(request.who, request.name, request.label)
            return review.state(request.who)

    @app.post("/api/words")
    def words(request: KeyRequest) -> dict[str, Any]:
        return review.explain(request.who, request.key)

    @app.post("/api/compare")
    def compare(request: Request) -> dict[str, Any]:
        return {"splits": review.comparison()}

    @app.post("/api/apply")
    def apply(request: ApplyRequest) -> dict[str, Any]:
        return review.apply(request.overwrite)


class Guard:
    """What is asked of each request before the application sees it.

    Host: a page of another site whose name was made to lead here (DNS rebinding) names itself. Origin: that of the page itself,
    where the browser gives one. Token: a site that makes the browser send requests (CSRF), and other users of the machine, have
    none. So a body is read only where all is in order, and it is small.
    """

    def __init__(self, app: FastAPI, token: str) -> None:
        self.app, self.token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self.check(scope)) is not None:
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def check(self, scope: Scope) -> Optional[JSONResponse]:
        """Return the answer that refuses a request, None for one that is welcome."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not HOSTS.fullmatch(host):
            return refuse(403, "Host: expected 127.0.0.1 or localhost")
        if origin is not None and origin != f"http://{host}":
            return refuse(403, "Origin: expected the page itself")
        if scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            return None
        if not hmac.compare_digest(headers.get(b"x-review-token", "").encode(), self.token):
            return refuse(401, "no token, or a wrong one, expected the address that review.py printed")
        if not headers.get(b"content-length", "").isdecimal() or int(headers[b"content-length"]) > MOST_BYTES:
            return refuse(413, f"expected a body of at most {MOST_BYTES} bytes and its length")
        return None
