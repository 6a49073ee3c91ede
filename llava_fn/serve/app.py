"""The web side: routes, the key, limits of size and time, and answers in OpenAI's forms, whole or as a stream.

The event loop never computes: two threads parse bodies, and the Worker's deltas come by one queue for each request.
When a client disconnects, its slots are freed at once. A client that never reads fills only its own queue, which holds
no more than its answers.
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
from llava_fn.generate.family import Family
from llava_fn.serve import ask
from llava_fn.serve.ask import ChatRequest, Refused
from llava_fn.serve.engine import Delta
from llava_fn.serve.options import Limits
from llava_fn.serve.worker import Ticket, Worker

LOOPBACK = ("127.0.0.1", "localhost")
SENDING = 10.0  # seconds after the deadline in which a client may read the rest of an answer
CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Deltas = asyncio.Queue[Delta | Refused]


@dataclass(frozen=True)
class Service:
    """What the routes share. name: of the base. key: the API key that requests must bring, if any."""

    family: Family
    name: str
    worker: Worker
    limits: Limits
    key: str | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    reading: set[str] = field(default_factory=set)  # names of requests whose bodies are being read
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "ask"))  # limits images in memory


def build(s: Service, host: str) -> Starlette:
    """The application. host: the address that it is bound to; on loopback, requests must name a loopback host too."""
    routes = [
        Route("/", partial(page, s)),
        Route("/health", partial(health, s)),
        Route("/v1/models", partial(models, s)),
        Route("/v1/models/{name:path}", partial(one_model, s)),
        Route("/v1/chat/completions", partial(complete, s), methods=["POST"]),
    ]
    # against DNS rebinding: a page of another site whose name is made to point here
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))] if host in LOOPBACK else []
    handlers = {Refused: _refused, HTTPException: _no_route, Exception: _failed}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def page(s: Service, request: Request) -> Response:
    """The chat page."""
    html = resources.files("llava_fn.serve").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(html, headers={"Content-Security-Policy": CSP, "Referrer-Policy": "no-referrer"})


async def health(s: Service, request: Request) -> Response:
    """Whether the model's thread lives, and how busy it is. Status 503 if the thread has failed."""
    alive = s.worker.error is None
    return JSONResponse({"status": "ok" if alive else "failed"} | s.worker.figures(), 200 if alive else 503)


def _model(s: Service, name: str) -> dict:
    """OpenAI's fields, and those that the chat page needs."""
    a = s.family.member(ask.adapter_of(s.family, s.name, name))
    own = {"warning": assistant.warning(a), "caption": template_of(a.form.template).caption}
    return {"id": name, "object": "model", "created": s.started, "owned_by": "llava_fn"} | own | {
        "max_tokens": s.limits.tokens
    }  # fmt: skip


async def models(s: Service, request: Request) -> Response:
    """The list of the base and its adapters."""
    _authorise(s, request)
    return JSONResponse({"object": "list", "data": [_model(s, name) for name in (s.name, *s.family.adapters)]})


async def one_model(s: Service, request: Request) -> Response:
    """A model, by its name."""
    _authorise(s, request)
    return JSONResponse(_model(s, request.path_params["name"]))


async def complete(s: Service, request: Request) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Answer a conversation."""
    _authorise(s, request)
    name, loop, deltas = f"chatcmpl-{uuid.uuid4().hex}", asyncio.get_running_loop(), Deltas()
    chat = await _read(s, request, name)
    emit = partial(loop.call_soon_threadsafe, deltas.put_nowait)
    s.worker.submit(Ticket.of(name, chat.answers, emit, s.limits.seconds))
    return partial(_answer, s, chat, deltas)


async def _read(s: Service, request: Request, name: str) -> ChatRequest:
    """What a request asks for. Refused if too many are being read: each may hold a body and images in memory."""
    if len(s.reading) >= s.limits.queue:
        raise Refused(429, f"{len(s.reading)} requests are being read already; try again later", code="busy")
    s.reading.add(name)
    try:
        body = await _body(request, s.limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(s.pool, ask.chat_request, body, s.family, s.name, s.limits, name)
    finally:
        s.reading.discard(name)


def _authorise(s: Service, request: Request) -> None:
    key = request.headers.get("authorization", "").removeprefix("Bearer ")
    if s.key is not None and not hmac.compare_digest(key.encode("latin-1"), s.key.encode()):
        raise Refused(401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key")


async def _body(request: Request, limits: Limits) -> bytes:
    """The body. Refused if its type, its size or its time is wrong."""
    # pages of other sites may not send JSON's type without asking first
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body is JSON: send it with Content-Type: application/json")
    excess = Refused(413, f"the body is over this server's limit of {limits.body} bytes; send smaller or fewer images")
    if int(request.headers.get("content-length", 0)) > limits.body:
        raise excess
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limits.body:
                    raise excess
    except TimeoutError as error:
        raise Refused(408, f"the body did not come within {limits.seconds:g} seconds") from error
    except ClientDisconnect as error:
        raise Refused(499, "the client has gone") from error
    return b"".join(parts)


async def _answer(s: Service, chat: ChatRequest, deltas: Deltas, scope: Scope, receive: Receive, send: Send) -> None:
    async def whole() -> None:
        await (await _whole(s, chat, deltas))(scope, receive, send)

    work = _stream(s, chat, deltas, send) if chat.stream else whole()
    try:
        await _while_connected(receive, work, s.limits.seconds + SENDING)
    finally:
        s.worker.cancel(chat.name)


async def _while_connected(receive: Receive, work: Coroutine, seconds: float) -> None:
    """Do the work, until the client disconnects or the time is over."""
    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, disconnect}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        disconnect.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _each(chat: ChatRequest, deltas: Deltas) -> AsyncIterator[Delta]:
    """The deltas of all answers of a request. Raises Refused if the worker gives up."""
    unfinished = len(chat.answers)
    while unfinished:
        delta = await deltas.get()
        if isinstance(delta, Refused):
            raise delta
        unfinished -= delta.finish is not None
        yield delta


async def _whole(s: Service, chat: ChatRequest, deltas: Deltas) -> Response:
    """One JSON object with all answers."""
    answers: list[list[Delta]] = [[] for _ in chat.answers]
    try:
        async for delta in _each(chat, deltas):
            answers[delta.name[1]].append(delta)
    except Refused as refused:
        return _refused(None, refused)
    body = _head(s, chat, "chat.completion") | {
        "choices": [_choice(s.family.base.tokenizer, j, answer, chat.logprobs) for j, answer in enumerate(answers)],
        "usage": _usage(chat, sum(len(delta.ids) for answer in answers for delta in answer)),
    }
    return JSONResponse(body)


def _choice(tokenizer: Tokenizer, index: int, deltas: Sequence[Delta], logprobs: bool) -> dict:
    message = {"role": "assistant", "content": "".join(delta.new for delta in deltas), "refusal": None}
    values = _logprobs(tokenizer, deltas) if logprobs else None
    return {"index": index, "message": message, "logprobs": values, "finish_reason": deltas[-1].finish}


async def _stream(s: Service, chat: ChatRequest, deltas: Deltas, send: Send) -> None:
    """Server-sent events, one or two for each delta. An error after the first event is an event too."""
    head = _head(s, chat, "chat.completion.chunk") | ({"usage": None} if chat.usage else {})
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    tokens = 0
    try:
        for j in range(len(chat.answers)):
            await _event(send, head | {"choices": [_chunk(j, {"role": "assistant", "content": ""})]})
        async for delta in _each(chat, deltas):
            tokens += len(delta.ids)
            for choice in _chunks(s.family.base.tokenizer, delta, chat.logprobs):
                await _event(send, head | {"choices": [choice]})
        if chat.usage:
            await _event(send, head | {"choices": [], "usage": _usage(chat, tokens)})
        await _send(send, b"data: [DONE]\n\n")
    except Refused as refused:
        await _event(send, refused.body())
    await send({"type": "http.response.body", "body": b""})


def _chunks(tokenizer: Tokenizer, delta: Delta, logprobs: bool) -> list[dict]:
    values = _logprobs(tokenizer, [delta]) if logprobs and delta.ids else None
    new = [_chunk(delta.name[1], {"content": delta.new}, values)] if delta.new or values else []
    return new + ([_chunk(delta.name[1], {}, finish=delta.finish)] if delta.finish else [])


def _chunk(index: int, delta: dict, logprobs: dict | None = None, finish: str | None = None) -> dict:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


async def _event(send: Send, values: dict) -> None:
    await _send(send, b"data: %s\n\n" % json.dumps(values).encode())


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _head(s: Service, chat: ChatRequest, kind: str) -> dict:
    return {"id": chat.name, "object": kind, "created": int(time.time()), "model": chat.model}


def _usage(chat: ChatRequest, tokens: int) -> dict:
    prompt = len(chat.answers[0].ids)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _logprobs(tokenizer: Tokenizer, deltas: Sequence[Delta]) -> dict:
    """In nats, of each token, those of a stop text included. bytes: null for a token that is part of a character."""
    content = []
    for token, logprob in [pair for delta in deltas for pair in zip(delta.ids, delta.logprobs, strict=True)]:
        text = tokenizer.decode([*tokenizer.encode("."), token]).removeprefix(".")  # alone it would lose a space
        spelled = None if "\ufffd" in text else list(text.encode())
        content.append({"token": text, "logprob": logprob, "bytes": spelled, "top_logprobs": []})
    return {"content": content, "refusal": None}


def _refused(request: Request | None, error: Refused) -> Response:
    more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status, {})
    body = json.dumps(error.body())  # in ASCII, because it may quote half a surrogate pair, which UTF-8 cannot hold
    return Response(body, error.status, more, "application/json")


def _no_route(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}: {error.detail}"
    return _refused(request, Refused(error.status_code, f"{where}; see /v1/models and /v1/chat/completions"))


def _failed(request: Request, error: Exception) -> Response:
    return _refused(request, Refused(500, "the server has failed; see its log"))
