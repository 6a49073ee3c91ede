"""From a request's JSON, in OpenAI's form, to the answers that it asks for, or to the reason why it is refused.

Every field is understood, or refused by its name: none is ignored. A field that is `null` counts as left out. Images
come inside the request, as data URLs; no path is opened and no address is called.
Source: OpenAI's API reference, "Create chat completion".
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from llava_fn.data import image
from llava_fn.data.templates import MARK, template_of
from llava_fn.errors import BadRecord
from llava_fn.generate import conversation
from llava_fn.generate.assistant import Assistant, with_stop
from llava_fn.generate.conversation import Chat, Picture
from llava_fn.generate.family import Family
from llava_fn.generate.options import Decoding
from llava_fn.serve.engine import AnswerRequest
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
class ChatRequest:
    """What a request asks for. usage: whether a stream ends with a chunk that counts tokens."""

    answers: tuple[AnswerRequest, ...]
    stream: bool
    usage: bool
    logprobs: bool
    model: str  # as the request names it

    @property
    def name(self) -> str:
        """Of the request, in each of its answers."""
        return self.answers[0].name[0]


@dataclass(frozen=True)
class Fields:
    """The fields of a request's JSON, and what one that is left out means."""

    model: str
    messages: list[object]
    stream: bool = False
    stream_options: bool | None = None  # include_usage
    n: int = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None  # a random one
    logprobs: bool = False


def _is(kind: type | tuple[type, ...], what: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadRecord(f"must be {what}, not {_short(value)}")
        return value

    return check


def _within(kind: type | tuple[type, ...], low: float, high: float, what: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        _is(kind, what)(value)
        if not isinstance(value, int | float) or not low <= value <= high:
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
    return bool(_is(bool, "true or false")(value.get("include_usage", False)))


_COUNT = _within(int, 1, 2**62, "a whole number of at least 1")
FIELDS: Mapping[str, Callable[[object], object]] = MappingProxyType(
    {
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
    }
)
# Fields of OpenAI's that this server has nothing for: they may say so, and nothing else.
OFF: Mapping[str, object] = MappingProxyType({
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "top_logprobs": 0, "store": False, "tools": [],
    "response_format": {"type": "text"}, "modalities": ["text"],
})  # fmt: skip


def fields(body: bytes) -> Fields:
    """The fields of a request, each checked by itself. Raises Refused."""
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise Refused(400, f"the body is an object with 'model' and 'messages', not {_short(values)}")
    checked: dict[str, Any] = {}  # of JSON; each has passed the check of its field
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
    return Fields(**checked)


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


def chat_request(body: bytes, f: Family, served: str, limits: Limits, name: str) -> ChatRequest:
    """What the body of a request asks for. served: the base's name; name: the request's. Raises Refused."""
    values = fields(body)
    adapter = adapter_of(f, served, values.model)
    a = f.member(adapter)
    if values.stream_options is not None and not values.stream:
        raise Refused(400, "stream_options goes with stream; leave it out", "stream_options")
    try:
        answers = _answers(a, chat_of(values.messages, a, limits), values, limits, name)
        answers = tuple(_of(answer, adapter) for answer in answers)
    except BadRecord as error:
        raise Refused(400, str(error), "messages") from error
    return ChatRequest(answers, values.stream, bool(values.stream_options), values.logprobs, values.model)


def adapter_of(f: Family, served: str, wanted: str) -> str:
    """The adapter that a model's name means; "" for the base, whose name is `served`. Raises Refused."""
    if wanted != served and wanted not in f.adapters:
        names = ", ".join(map(repr, (served, *f.adapters)))
        raise Refused(404, f"no model {wanted!r}; this server has {names}", "model", "model_not_found")
    return "" if wanted == served else wanted


def _of(answer: AnswerRequest, adapter: str) -> AnswerRequest:
    """An answer by an adapter. Its keys and its pictures' keys tell its features and its cache from those of others."""
    if not adapter:
        return answer
    tag = f"{adapter}:"
    keys = [tag + key if isinstance(key, str) else key for key in answer.keys]
    pictures = tuple(replace(p, key=tag + p.key) for p in answer.pictures)
    return replace(answer, adapter=adapter, keys=(f"{tag}{keys[0]}", *keys[1:]), pictures=pictures)


def chat_of(messages: Sequence[object], a: Assistant, limits: Limits) -> Chat:
    """The conversation in messages of the roles system (or developer), user and assistant. Raises BadRecord."""
    chat = Chat()
    room = limits.prompt // a.config.vision.patches
    for i, message in enumerate(messages):
        role, content = _message(message, f"messages[{i}]")
        texts = [value for kind, value in content if kind == "text"]
        if role == "user":
            urls = [value for kind, value in content if kind == "image_url"]
            if len(chat.pictures) + len(urls) > room:
                raise BadRecord(f"messages[{i}]: more than the {room} images that a prompt has room for; send fewer")
            pictures = [_picture(url, a, limits, f"messages[{i}], image {j}") for j, url in enumerate(urls)]
            chat = conversation.ask(chat, _marked(content, f"messages[{i}]"), pictures)
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
    if isinstance(part, dict):
        kind, keys = part.get("type"), part.keys()
        if kind == "text" and keys == {"type", "text"} and isinstance(part["text"], str):
            return "text", part["text"]
        if kind == "image_url" and keys == {"type", "image_url"} and isinstance(part["image_url"], dict):
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
    return conversation.picture(image.from_base64(url, where, limits.pixels), a, where)


def _marked(content: Sequence[tuple[str, str]], where: str) -> str:
    """The text of a question, with marks for several images; `ask` puts a single image in front, as in training."""
    if any(kind == "text" and MARK in value for kind, value in content):
        raise BadRecord(f"{where}: the text holds {MARK!r}; send the image as a part, and leave the mark out")
    several = sum(kind == "image_url" for kind, _ in content) > 1
    parts = [MARK if kind == "image_url" else value for kind, value in content if several or kind == "text"]
    return "\n".join(parts)


def _answers(a: Assistant, chat: Chat, values: Fields, limits: Limits, name: str) -> tuple[AnswerRequest, ...]:
    empty = a.model.embed[:0]
    chat = replace(chat, feats={p.key: empty for p in chat.pictures})  # the engine computes the features
    tokens, n = _length(values, limits), values.n
    if n > limits.samples:
        raise Refused(400, f"n={n}: this server gives at most {limits.samples} answers to a request", "n")
    prompt, keys = conversation.prompt(a, chat, Decoding(tokens=tokens or 1))
    if len(keys) > limits.prompt:
        raise BadRecord(f"the prompt has {len(keys)} tokens, over this server's limit of {limits.prompt}; shorten it")
    d = _decoding(values, tokens or min(limits.tokens, a.context - len(keys)))
    d = with_stop(a, replace(d, samples=1))
    return tuple(
        AnswerRequest((name, j), prompt.ids, keys, chat.pictures, replace(d, seed=d.seed + j)) for j in range(n)
    )


def _length(values: Fields, limits: Limits) -> int | None:
    """The limit of tokens that the request sets, if any."""
    if values.max_tokens and values.max_completion_tokens:
        raise Refused(400, "max_tokens and max_completion_tokens are one and the same; give one", "max_tokens")
    name = "max_tokens" if values.max_tokens else "max_completion_tokens"
    tokens = values.max_tokens or values.max_completion_tokens
    if tokens and tokens > limits.tokens:
        raise Refused(400, f"{name}={tokens}: this server writes at most {limits.tokens}", name)
    return tokens


def _decoding(values: Fields, tokens: int) -> Decoding:
    seed = values.seed if values.seed is not None else secrets.randbelow(2**62)
    try:
        return Decoding(
            tokens=tokens, temperature=values.temperature, top_p=values.top_p, samples=values.n, seed=seed,
            stop=values.stop, logprobs=values.logprobs,
        )  # fmt: skip
    except ValueError as error:
        raise Refused(400, str(error)) from error
