"""A request's JSON, in OpenAI's form, to the answers that are to be written, or why not.

Every field is understood, or refused by its name: nothing is left unread. `null` is a field that is not there. Images
come inside the request, as data URLs; no path is opened and no address is called.
Source: OpenAI's API reference, "Create chat completion".
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from llava_fn.data import image
from llava_fn.data.templates import MARK, template_of
from llava_fn.errors import BadRecord
from llava_fn.generate import assistant
from llava_fn.generate.assistant import Assistant, Chat, Picture
from llava_fn.generate.options import Decoding
from llava_fn.serve.engine import Job
from llava_fn.serve.options import Limits


class Refused(Exception):
    """A request that cannot be answered. status: of HTTP. param: the field. code: for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        """The error as OpenAI's API writes it."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Question:
    """What a request asks for. usage: a last chunk of a stream that counts tokens."""

    jobs: tuple[Job, ...]
    stream: bool
    usage: bool
    logprobs: bool


def _is(kind: type | tuple[type, ...], what: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadRecord(f"must be {what}, not {_short(value)}")
        return value

    return check


def _within(kind: type | tuple[type, ...], low: float, high: float, what: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if not low <= _is(kind, what)(value) <= high:
            raise BadRecord(f"must be {what}, not {_short(value)}")
        return value

    return check


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 4 or not all(isinstance(s, str) and s for s in texts):
        raise BadRecord(f"must be a text or up to 4 of them, none empty, not {_short(value)}")
    return tuple(texts)


def _stream_options(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"include_usage"}:
        raise BadRecord(f"must be an object with include_usage and nothing else, not {_short(value)}")
    return _is(bool, "true or false")(value.get("include_usage", False))


_COUNT = _within(int, 1, 2**62, "a whole number of at least 1")
FIELDS: Mapping[str, Callable[[object], object]] = MappingProxyType({
    "model": _is(str, "a text"),
    "messages": _is(list, "a list"),
    "stream": _is(bool, "true or false"),
    "stream_options": _stream_options,
    "n": _COUNT,
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "temperature": _within((int, float), 0, 2, "from 0 to 2"),
    "top_p": _within((int, float), 1e-6, 1, "above 0 and at most 1"),
    "stop": _stop,
    "seed": _within(int, 0, 2**62, "a whole number from 0 to 2**62"),
    "logprobs": _is(bool, "true or false"),
})
# Fields of OpenAI's that this server has nothing for: they may say so, and nothing else.
OFF: Mapping[str, object] = MappingProxyType({
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "top_logprobs": 0, "store": False, "tools": [],
    "response_format": {"type": "text"}, "modalities": ["text"],
})  # fmt: skip


def fields(body: bytes) -> dict[str, object]:
    """The fields of a request, each checked for itself. Raises Refused."""
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise Refused(400, f"the body is an object with 'model' and 'messages', not {_short(values)}")
    checked = {}
    for name, value in values.items():
        if value is None or (name in OFF and value == OFF[name]):
            continue
        if name in OFF:
            raise Refused(400, f"{name} is not supported; leave it out, or give {json.dumps(OFF[name])}", name)
        if name not in FIELDS:
            raise Refused(400, f"unknown field {name!r}; there are: {', '.join(FIELDS)}", name)
        checked[name] = _named(name, FIELDS[name], value)
    for name in ("model", "messages"):
        if name not in checked:
            raise Refused(400, f"{name} is missing", name)
    return checked


def _named(name: str, check: Callable[[object], object], value: object) -> object:
    try:
        return check(value)
    except BadRecord as error:
        raise Refused(400, f"{name} {error}", name) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _short(value: object) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "what is nested so deeply"
    return text if len(text) <= 60 else text[:57] + "..."


def question(body: bytes, a: Assistant, served: str, limits: Limits, name: str) -> Question:
    """What the body of a request asks for. Raises Refused, which says what is wrong with it."""
    values = fields(body)
    if values["model"] != served:
        raise Refused(404, f"no model {values['model']!r}; this server has {served!r}", "model", "model_not_found")
    if "stream_options" in values and not values.get("stream"):
        raise Refused(400, "stream_options goes with stream; leave it out", "stream_options")
    try:
        chat = conversation(values["messages"], a, limits)
        jobs = _jobs(a, chat, values, limits, name)
    except BadRecord as error:
        raise Refused(400, str(error), "messages") from error
    return Question(
        jobs, values.get("stream", False), values.get("stream_options", False), values.get("logprobs", False)
    )


def conversation(messages: Sequence[object], a: Assistant, limits: Limits) -> Chat:
    """A conversation from messages of the roles system (or developer), user and assistant. Raises BadRecord."""
    chat = Chat()
    room = limits.prompt // a.model.vision.patches
    for i, message in enumerate(messages):
        role, content = _message(message, f"messages[{i}]")
        texts = [value for kind, value in content if kind == "text"]
        if role == "user":
            urls = [value for kind, value in content if kind == "image_url"]
            if len(chat.pictures) + len(urls) > room:
                raise BadRecord(f"messages[{i}]: more than the {room} images that a prompt has room for; send fewer")
            pictures = [_picture(url, a, limits, f"messages[{i}], image {j}") for j, url in enumerate(urls)]
            chat = assistant.ask(chat, _marked(content, f"messages[{i}]"), pictures)
        elif role == "assistant":
            chat = replace(chat, turns=(*chat.turns, ("gpt", "".join(texts))))
        elif i:
            raise BadRecord(f"messages[{i}]: a {role} message is the first one, and there is only one")
        else:
            chat = replace(chat, system="\n".join(texts))
    if template_of(a.form.template).caption and (len(chat.turns) > 1 or len(chat.pictures) != 1):
        raise BadRecord("this model writes a caption for an image: send one image, and no earlier turns")
    return chat


def _message(message: object, where: str) -> tuple[str, list[tuple[str, str]]]:
    """Role and parts, ("text", text) or ("image_url", data URL)."""
    if not isinstance(message, dict):
        raise BadRecord(f"{where} is an object with 'role' and 'content', not {_short(message)}")
    more = [key for key, value in message.items() if key not in ("role", "content") and value not in (None, [])]
    if more:
        raise BadRecord(f"{where}: {', '.join(more)} is not supported; there are: role, content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise BadRecord(f"{where}: role {_short(role)}; there are: system, developer, user, assistant")
    if isinstance(content, str):
        return role, [("text", content)]
    if not isinstance(content, list):
        raise BadRecord(f"{where}: content is a text or a list of parts, not {_short(content)}")
    parts = [_part(part, f"{where}.content[{j}]") for j, part in enumerate(content)]
    if role != "user" and any(kind != "text" for kind, _ in parts):
        raise BadRecord(f"{where}: an image in a message of role {role}; images belong to the user's")
    return role, parts


def _part(part: object, where: str) -> tuple[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and part.keys() == {"type", "text"} and isinstance(part["text"], str):
        return "text", part["text"]
    if kind == "image_url" and part.keys() == {"type", "image_url"} and isinstance(part["image_url"], dict):
        return "image_url", _url(part["image_url"], where)
    raise BadRecord(
        f'{where}: a part is {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": {{"url": ...}}}}, '
        f"not {_short(part)}"
    )


def _url(image_url: Mapping[str, object], where: str) -> str:
    url, detail = image_url.get("url"), image_url.get("detail")
    if not image_url.keys() <= {"url", "detail"} or detail not in (None, "auto"):
        raise BadRecord(f"{where}: image_url has a url, and detail is 'auto' or left out: one size is all there is")
    if not isinstance(url, str) or not url.startswith("data:"):
        raise BadRecord(
            f"{where}: a data URL only (data:image/png;base64,...), not {_short(url)}; this server opens no path and "
            "fetches no address"
        )
    return url


def _picture(url: str, a: Assistant, limits: Limits, where: str) -> Picture:
    return assistant.picture(image.from_base64(url, where, limits.pixels), a, where)


def _marked(content: Sequence[tuple[str, str]], where: str) -> str:
    """The question, with marks where several images stand; a single one goes to its front, as LLaVA was trained."""
    if any(kind == "text" and MARK in value for kind, value in content):
        raise BadRecord(f"{where}: the text holds {MARK!r}; send the image as a part, and leave the mark out")
    several = sum(kind == "image_url" for kind, _ in content) > 1
    parts = [MARK if kind == "image_url" else value for kind, value in content if several or kind == "text"]
    return "\n".join(parts)


def _jobs(a: Assistant, chat: Chat, values: Mapping[str, object], limits: Limits, name: str) -> tuple[Job, ...]:
    """One job for each answer asked for."""
    nothing = a.params["llama"]["embed"][:0]
    unseen = replace(chat, feats={p.key: nothing for p in chat.pictures})  # the engine computes them
    given, n = _length(values, limits), values.get("n", 1)
    if n > limits.samples:
        raise Refused(400, f"n={n}: this server gives at most {limits.samples} answers to a request", "n")
    prompt, keys = assistant.prompt(a, unseen, Decoding(tokens=given or 1))
    if len(keys) > limits.prompt:
        raise BadRecord(f"the prompt has {len(keys)} tokens, over this server's limit of {limits.prompt}; shorten it")
    d = _decoding(values, given or min(limits.tokens, a.context - len(keys)), n)
    d = assistant.stops(a, replace(d, samples=1))
    return tuple(Job((name, j), prompt.ids, keys, chat.pictures, replace(d, seed=d.seed + j)) for j in range(n))


def _length(values: Mapping[str, object], limits: Limits) -> int | None:
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in values]
    if len(names) > 1:
        raise Refused(400, "max_tokens and max_completion_tokens are one and the same; give one", names[0])
    if names and values[names[0]] > limits.tokens:
        raise Refused(400, f"{names[0]}={values[names[0]]}: this server writes at most {limits.tokens}", names[0])
    return values[names[0]] if names else None


def _decoding(values: Mapping[str, object], tokens: int, n: int) -> Decoding:
    """Temperature 1 and a seed of chance unless given, as OpenAI's API has it."""
    try:
        return Decoding(
            tokens=tokens,
            temperature=values.get("temperature", 1.0),
            top_p=values.get("top_p", 1.0),
            samples=n,
            seed=values.get("seed", secrets.randbelow(2**62)),
            stop=values.get("stop", ()),
            logprobs=values.get("logprobs", False),
        )
    except ValueError as error:
        raise Refused(400, str(error)) from error
