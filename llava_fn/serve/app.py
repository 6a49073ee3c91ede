"""The web side: routes, the key, limits of size and time, and answers in OpenAI's forms, whole or as a stream.

It never computes: bodies are read in two threads of their own, pieces of answers come from the Worker by a queue for
each request. A client that has gone is noticed at once and its slots are freed; one that never reads fills nobody
else's queue, and its own holds one answer at most.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_fn.data.templates import template_of
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.generate import assistant
from llava_fn.generate.assistant import Assistant
from llava_fn.serve import ask
from llava_fn.serve.ask import Question, Refused
from llava_fn.serve.engine import Piece
from llava_fn.serve.options import Limits
from llava_fn.serve.worker import Ticket, Worker

LOOPBACK = ("127.0.0.1", "localhost")
SENDING = 10.0  # seconds that a client may take for what is left of an answer when its time is over
CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Pieces = asyncio.Queue[Piece | Refused]


@dataclass(frozen=True)
class Service:
    """What the routes share. name: of the model. key: that requests must bring, if any."""

    a: Assistant
    name: str
    worker: Worker
    limits: Limits
    key: str | None = None
    began: int = field(default_factory=lambda: int(time.time()))
    reading: set[str] = field(default_factory=set)  # requests whose bodies are on their way
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "ask"))  # few images at a time


def build(s: Service, host: str) -> Starlette:
    """The application. host: that it is bound to; on a loopback address only requests to one are answered."""
    routes = [
        Route("/", partial(page, s)),
        Route("/health", partial(health, s)),
        Route("/v1/models", partial(models, s)),
        Route("/v1/models/{name:path}", partial(one_model, s)),
        Route("/v1/chat/completions", partial(complete, s), methods=["POST"]),
    ]
    # Against pages of other sites whose name is made to point here.
    here = [Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))] if host in LOOPBACK else []
    handlers = {Refused: _refused, HTTPException: _no_route, Exception: _failed}
    return Starlette(routes=routes, middleware=here, exception_handlers=handlers)


async def page(s: Service, request: Request) -> Response:
    """The chat page."""
    html = resources.files("llava_fn.serve").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(html, headers={"Content-Security-Policy": CSP, "Referrer-Policy": "no-referrer"})


async def health(s: Service, request: Request) -> Response:
    """Whether the model's thread lives, and how busy it is. 503 if it does not."""
    good = s.worker.error is None
    return JSONResponse({"status": "ok" if good else "failed"} | s.worker.figures(), 200 if good else 503)


def _model(s: Service) -> dict:
    """OpenAI's fields, and what the chat page wants to know."""
    caption = template_of(s.a.form.template).caption
    own = {"warning": assistant.warning(s.a), "caption": caption, "max_tokens": s.limits.tokens}
    return {"id": s.name, "object": "model", "created": s.began, "owned_by": "llava_fn"} | own


async def models(s: Service, request: Request) -> Response:
    """The one model."""
    _authorise(s, request)
    return JSONResponse({"object": "list", "data": [_model(s)]})


async def one_model(s: Service, request: Request) -> Response:
    """The model of this name."""
    _authorise(s, request)
    name = request.path_params["name"]
    if name != s.name:
        raise Refused(404, f"no model {name!r}; this server has {s.name!r}", "model", "model_not_found")
    return JSONResponse(_model(s))


async def complete(s: Service, request: Request) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Answer a conversation."""
    _authorise(s, request)
    name, loop, pieces = f"chatcmpl-{uuid.uuid4().hex}", asyncio.get_running_loop(), Pieces()
    q = await _read(s, request, name)
    s.worker.submit(
        Ticket.of(name, q.jobs, lambda x: loop.call_soon_threadsafe(pieces.put_nowait, x), s.limits.seconds)
    )
    return partial(_answer, s, q, pieces)


async def _read(s: Service, request: Request, name: str) -> Question:
    """The question of a request, if there are not too many being read, each of which may hold a body and images."""
    if len(s.reading) >= s.limits.queue:
        raise Refused(429, f"{len(s.reading)} requests are being read already; try again later", code="busy")
    s.reading.add(name)
    try:
        body = await _body(request, s.limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(s.pool, ask.question, body, s.a, s.name, s.limits, name)
    finally:
        s.reading.discard(name)


def _authorise(s: Service, request: Request) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if s.key is not None and not hmac.compare_digest(given.encode("latin-1"), s.key.encode()):
        raise Refused(401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key")


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, of the right type and size, in time. JSON's type is one that other sites' pages may not send."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body is JSON: send it with Content-Type: application/json")
    large = Refused(413, f"the body is over this server's limit of {limits.body} bytes; send smaller or fewer images")
    if int(request.headers.get("content-length", 0)) > limits.body:
        raise large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limits.body:
                    raise large
    except TimeoutError as error:
        raise Refused(408, f"the body did not come within {limits.seconds:g} seconds") from error
    except ClientDisconnect as error:
        raise Refused(499, "the client has gone") from error
    return b"".join(parts)


async def _answer(s: Service, q: Question, pieces: Pieces, scope: Scope, receive: Receive, send: Send) -> None:
    name = q.jobs[0].name[0]
    work = _stream(s, q, pieces, send) if q.stream else _whole(s, q, pieces, scope, receive, send)
    try:
        await _while_there(receive, work, s.limits.seconds + SENDING)
    finally:
        s.worker.cancel(name)


async def _while_there(receive: Receive, work: Coroutine, seconds: float) -> None:
    """Do the work, until the client has gone or its time is over."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _each(q: Question, pieces: Pieces) -> AsyncIterator[Piece]:
    """The pieces of all answers of a request. Raises Refused if the worker gives up."""
    left = len(q.jobs)
    while left:
        piece = await pieces.get()
        if isinstance(piece, Refused):
            raise piece
        left -= piece.finish is not None
        yield piece


async def _whole(s: Service, q: Question, pieces: Pieces, scope: Scope, receive: Receive, send: Send) -> None:
    """One JSON object with all answers."""
    got: list[list[Piece]] = [[] for _ in q.jobs]
    try:
        async for piece in _each(q, pieces):
            got[piece.name[1]].append(piece)
    except Refused as refused:
        return await _refused(None, refused)(scope, receive, send)
    body = _head(s, q, "chat.completion") | {
        "choices": [_choice(s.a.tokenizer, j, mine, q.logprobs) for j, mine in enumerate(got)],
        "usage": _usage(q, sum(len(p.ids) for mine in got for p in mine)),
    }
    await JSONResponse(body)(scope, receive, send)


def _choice(tokenizer: Tokenizer, index: int, pieces: Sequence[Piece], logprobs: bool) -> dict:
    message = {"role": "assistant", "content": "".join(p.new for p in pieces), "refusal": None}
    said = _logprobs(tokenizer, pieces) if logprobs else None
    return {"index": index, "message": message, "logprobs": said, "finish_reason": pieces[-1].finish}


async def _stream(s: Service, q: Question, pieces: Pieces, send: Send) -> None:
    """Events as they come; an error after the first one is an event too."""
    head = _head(s, q, "chat.completion.chunk") | ({"usage": None} if q.usage else {})
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    tokens = 0
    try:
        for j in range(len(q.jobs)):
            await _event(send, head | {"choices": [_delta(j, {"role": "assistant", "content": ""})]})
        async for piece in _each(q, pieces):
            tokens += len(piece.ids)
            for choice in _deltas(s.a.tokenizer, piece, q.logprobs):
                await _event(send, head | {"choices": [choice]})
        if q.usage:
            await _event(send, head | {"choices": [], "usage": _usage(q, tokens)})
        await _send(send, b"data: [DONE]\n\n")
    except Refused as refused:
        await _event(send, refused.body())
    await send({"type": "http.response.body", "body": b""})


def _deltas(tokenizer: Tokenizer, piece: Piece, logprobs: bool) -> list[dict]:
    said = _logprobs(tokenizer, [piece]) if logprobs and piece.ids else None
    new = [_delta(piece.name[1], {"content": piece.new}, said)] if piece.new or said else []
    return new + ([_delta(piece.name[1], {}, finish=piece.finish)] if piece.finish else [])


def _delta(index: int, delta: dict, logprobs: dict | None = None, finish: str | None = None) -> dict:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


async def _event(send: Send, values: dict) -> None:
    await _send(send, b"data: %s\n\n" % json.dumps(values).encode())


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _head(s: Service, q: Question, kind: str) -> dict:
    return {"id": q.jobs[0].name[0], "object": kind, "created": int(time.time()), "model": s.name}


def _usage(q: Question, tokens: int) -> dict:
    asked = len(q.jobs[0].ids)
    return {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens}


def _logprobs(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict:
    """In nats, of each token, those of a stop text included. bytes: null for a token that is part of a character."""
    content = []
    for token, logprob in [pair for p in pieces for pair in zip(p.ids, p.logprobs, strict=True)]:
        said = tokenizer.decode([*tokenizer.encode("."), token]).removeprefix(".")  # alone it would lose a space
        spelled = None if "\ufffd" in said else list(said.encode())
        content.append({"token": said, "logprob": logprob, "bytes": spelled, "top_logprobs": []})
    return {"content": content, "refusal": None}


def _refused(request: Request | None, error: Refused) -> Response:
    more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status, {})
    body = json.dumps(error.body())  # in ASCII, for it may name what no encoding holds: half a surrogate pair
    return Response(body, error.status, more, "application/json")


def _no_route(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}: {error.detail}"
    return _refused(request, Refused(error.status_code, f"{where}; see /v1/models and /v1/chat/completions"))


def _failed(request: Request, error: Exception) -> Response:
    return _refused(request, Refused(500, "the server has failed; see its log"))
