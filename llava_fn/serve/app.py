"""The web side: routes, the key, limits of size and time, and what stands around them.

The event loop never computes: two threads parse bodies, and the Worker's deltas come by one queue for each request.
When a client disconnects, its slots are freed at once.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import resources

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_fn.data.templates import template_of
from llava_fn.generate import assistant
from llava_fn.serve import answer, ask, reply
from llava_fn.serve.answer import ApiForm
from llava_fn.serve.ask import Asked, Offer
from llava_fn.serve.metrics import ServerMetrics, Timed
from llava_fn.serve.options import Limits, Web
from llava_fn.serve.refused import Refused
from llava_fn.serve.reply import UNKNOWN, Deltas, HttpReply
from llava_fn.serve.worker import Ticket, Worker

SENDING = 10.0  # seconds after the deadline in which a client may read the rest of an answer
CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Read = Callable[[bytes, Offer, str], Asked]


@dataclass(frozen=True)
class Service:
    """What the routes share. key: the API key that requests must bring, if any."""

    offer: Offer
    worker: Worker
    key: str | None = None
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    started: int = field(default_factory=lambda: int(time.time()))
    reading: dict[str, int] = field(default_factory=dict)  # name of a request that is being read -> bytes of it
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "ask"))  # limits images in memory

    @property
    def limits(self) -> Limits:
        """Of its requests."""
        return self.offer.limits


def build(s: Service, web: Web) -> Starlette:
    """The application."""
    routes = [
        Route("/", partial(page, s)),
        Route("/health", partial(health, s)),
        Route("/metrics", partial(metrics, s)),
        Route("/v1/models", partial(models, s)),
        Route("/v1/models/{name:path}", partial(one_model, s)),
        Route("/v1/chat/completions", partial(complete, s, ask.chat, answer.CHAT), methods=["POST"]),
        Route("/v1/completions", partial(complete, s, ask.completion, answer.COMPLETION), methods=["POST"]),
    ]
    middleware = [Middleware(_below, root=web.root_path.rstrip("/"))] if web.root_path else []
    if web.allowed_hosts:  # against DNS rebinding: a page of another site whose name is made to point here
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(web.allowed_hosts)))
    if web.cors:
        middleware.append(Middleware(
            CORSMiddleware, allow_origins=web.cors, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=[UNKNOWN],
        ))  # fmt: skip
    handlers = {Refused: _refused, HTTPException: _no_route, Exception: _failed}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _below(app: ASGIApp, root: str) -> ASGIApp:
    """The application behind a proxy that gives it what is below a path, whether it cuts the path off or not."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": root}, receive, send)

    return call


async def page(s: Service, request: Request) -> Response:
    """The chat page."""
    html = resources.files("llava_fn.serve").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(html, headers={"Content-Security-Policy": CSP, "Referrer-Policy": "no-referrer"})


async def health(s: Service, request: Request) -> Response:
    """Whether the model's thread lives, and how busy it is. Status 503 if the thread has failed."""
    alive = s.worker.error is None
    return JSONResponse({"status": "ok" if alive else "failed"} | s.worker.figures(), 200 if alive else 503)


async def metrics(s: Service, request: Request) -> Response:
    """What Prometheus collects."""
    return Response(s.metrics.text(s.worker.figures()), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


def _model(s: Service, name: str) -> dict:
    """OpenAI's fields, and those that the chat page needs."""
    a = s.offer.family.member(s.offer.adapter(name))
    own = {"warning": assistant.warning(a), "caption": template_of(a.form.template).caption}
    return {"id": name, "object": "model", "created": s.started, "owned_by": "llava_fn"} | own | {
        "max_tokens": s.limits.tokens
    }  # fmt: skip


async def models(s: Service, request: Request) -> Response:
    """The list of the base and its adapters."""
    _authorise(s, request)
    names = (s.offer.name, *s.offer.family.adapters)
    return JSONResponse({"object": "list", "data": [_model(s, name) for name in names]})


async def one_model(s: Service, request: Request) -> Response:
    """A model, by its name."""
    _authorise(s, request)
    return JSONResponse(_model(s, request.path_params["name"]))


async def complete(
    s: Service, read: Read, form: ApiForm, request: Request
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Answer a conversation, or complete texts."""
    name, deltas, loop = f"{form.prefix}{uuid.uuid4().hex}", Deltas(), asyncio.get_running_loop()
    emit = Timed(s.metrics, partial(loop.call_soon_threadsafe, deltas.put_nowait))
    try:
        _authorise(s, request)
        asked = await _read(s, request, read, name)
        s.worker.submit(Ticket.of(name, asked.answers, emit, s.limits.seconds))
    except Refused as error:
        s.metrics.ended(form.path, error.status)
        raise
    s.metrics.accepted(asked)
    return partial(_answer, s, HttpReply(asked, form, deltas, s.offer.family.base.tokenizer))


async def _answer(s: Service, r: HttpReply, scope: Scope, receive: Receive, send: Send) -> None:
    status = 500
    try:
        status = await reply.send_all(r, s.limits.seconds + SENDING, scope, receive, send)
    finally:
        s.worker.cancel(r.asked.name)
        s.metrics.ended(r.form.path, status)


async def _read(s: Service, request: Request, read: Read, name: str) -> Asked:
    """What a request asks for. Refused if too many are being read: each may hold a body and images in memory."""
    if len(s.reading) >= s.limits.queue:
        raise Refused(429, f"{len(s.reading)} requests are being read already; try again later", code="busy")
    s.reading[name] = 0
    try:
        body = await _body(request, s.limits, partial(_take, s, name))
        asked = await asyncio.get_running_loop().run_in_executor(s.pool, read, body, s.offer, name)
    finally:
        del s.reading[name]
    if asked.unknown:
        logging.getLogger("llava_fn.serve").warning("%s: ignored fields: %s", name, ascii(asked.unknown))
    return asked


def _authorise(s: Service, request: Request) -> None:
    key = request.headers.get("authorization", "").removeprefix("Bearer ")
    if s.key is not None and not hmac.compare_digest(key.encode("latin-1"), s.key.encode()):
        raise Refused(401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key")


def _take(s: Service, name: str, size: int) -> None:
    """Note that a request has so many bytes in memory. Refused if all requests together have too many."""
    s.reading[name] = size
    if sum(s.reading.values()) > s.limits.bodies:
        raise Refused(429, "requests that are being read fill this server's memory; try again later", code="busy")


async def _body(request: Request, limits: Limits, take: Callable[[int], None]) -> bytes:
    """The body. Refused if its type, its size or its time is wrong. take: is told each size that it has reached."""
    # pages of other sites may not send JSON's type without asking first
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body is JSON: send it with Content-Type: application/json")
    excess = Refused(413, f"the body is over this server's limit of {limits.body} bytes; send smaller or fewer images")
    if int(request.headers.get("content-length", 0)) > limits.body:
        raise excess
    parts, size = [], 0

    async def read() -> None:
        nonlocal size
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limits.body:
                raise excess
            take(size)

    try:
        await asyncio.wait_for(read(), limits.seconds)
    except asyncio.TimeoutError as error:  # until Python 3.11 another class than TimeoutError
        raise Refused(408, f"the body did not come within {limits.seconds:g} seconds") from error
    except ClientDisconnect as error:
        raise Refused(reply.GONE, "the client has gone") from error
    return b"".join(parts)


# Starlette gives a handler that is no coroutine a thread of its own.
async def _refused(request: Request, error: Refused) -> Response:
    return reply.refused(error)


async def _no_route(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}: {error.detail}"
    return reply.refused(Refused(error.status_code, f"{where}; see /v1/models and /v1/chat/completions"))


async def _failed(request: Request, error: Exception) -> Response:
    return reply.refused(Refused(500, "the server has failed; see its log"))
