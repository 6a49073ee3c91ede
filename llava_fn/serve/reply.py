"""Answers on their way out: whole or as a stream of events, until they end, their time is over, or the client is gone.

A client that never reads fills only its own queue, which holds no more than its answers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from urllib.parse import quote

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llava_fn.data.tokenizer import Tokenizer
from llava_fn.serve import answer
from llava_fn.serve.answer import ApiForm
from llava_fn.serve.ask import Asked
from llava_fn.serve.refused import Refused
from llava_fn.serve.seat import Delta

UNKNOWN = "X-Ignored-Fields"  # the header that names the fields of a request that nobody here knows
GONE = 499  # the status of a request whose client does not read its answer
Deltas = asyncio.Queue[Delta | Refused]


@dataclass(frozen=True)
class HttpReply:
    """A request that is being answered."""

    asked: Asked
    form: ApiForm
    deltas: Deltas
    tokenizer: Tokenizer

    @property
    def headers(self) -> dict[str, str]:
        """Names the unknown fields of the request, if any, each as in a URL."""
        names = [quote(name, errors="surrogatepass") for name in self.asked.unknown]
        return {UNKNOWN: ", ".join(names)} if names else {}


def refused(error: Refused) -> Response:
    """A request that is not answered."""
    more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status, {})
    body = json.dumps(error.body())  # in ASCII, because it may quote half a surrogate pair, which UTF-8 cannot hold
    return Response(body, error.status, more, "application/json")


async def send_all(r: HttpReply, seconds: float, scope: Scope, receive: Receive, send: Send) -> int:
    """Send the answers, for `seconds` at most. Returns the status in which the request has ended."""
    work = _stream(r, send) if r.asked.stream else _whole(r, scope, receive, send)
    return await _while_connected(receive, work, seconds)


async def _while_connected(receive: Receive, work: Coroutine[None, None, int], seconds: float) -> int:
    """Do the work, until the client disconnects or the time is over."""
    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, disconnect}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else GONE
    finally:
        task.cancel()
        disconnect.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _each(r: HttpReply) -> AsyncIterator[Delta]:
    """The deltas of all answers of a request. Raises Refused if the worker gives up."""
    unfinished = len(r.asked.answers)
    while unfinished:
        delta = await r.deltas.get()
        if isinstance(delta, Refused):
            raise delta
        unfinished -= delta.finish is not None
        yield delta


async def _whole(r: HttpReply, scope: Scope, receive: Receive, send: Send) -> int:
    """One JSON object with all answers."""
    answers: list[list[Delta]] = [[] for _ in r.asked.answers]
    try:
        async for delta in _each(r):
            answers[delta.name[1]].append(delta)
    except Refused as error:
        await refused(error)(scope, receive, send)
        return error.status
    body = await asyncio.to_thread(answer.whole, r.form, r.tokenizer, r.asked, answers)  # logprobs may be many
    response = JSONResponse(body, headers=r.headers)
    await response(scope, receive, send)
    return response.status_code


async def _stream(r: HttpReply, send: Send) -> int:
    """Server-sent events, one or two for each delta. An error after the first event is an event too."""
    head = answer.head(r.asked, r.form.chunk) | ({"usage": None} if r.asked.usage else {})
    headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"} | r.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
    status = 200
    try:
        async for choice in _choices(r):
            await _event(send, head | choice)
        await _send(send, b"data: [DONE]\n\n")
    except Refused as error:
        await _event(send, error.body())
        status = error.status
    await send({"type": "http.response.body", "body": b""})
    return status


async def _choices(r: HttpReply) -> AsyncIterator[dict]:
    """What the events of a stream hold beside their head."""
    tokens, offsets = 0, [0] * len(r.asked.answers)
    for j in range(len(offsets)):
        for choice in r.form.opening(j):
            yield {"choices": [choice]}
    async for delta in _each(r):
        j = delta.name[1]
        for choice in answer.pieces(r.form, r.tokenizer, r.asked, delta, offsets[j]):
            yield {"choices": [choice]}
        tokens += len(delta.ids)
        offsets[j] += sum(len(answer.spelled(r.tokenizer, token)) for token in delta.ids)
    if r.asked.usage:
        yield {"choices": [], "usage": answer.usage(r.asked, tokens)}


async def _event(send: Send, values: dict) -> None:
    await _send(send, b"data: %s\n\n" % json.dumps(values).encode())


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
