"""The messages of a chat request, and the conversation that they are.

Images come inside the request, as data URLs: no path is opened and no address is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_fn.data import image
from llava_fn.data.templates import MARK, template_of
from llava_fn.errors import BadRecord
from llava_fn.generate import conversation
from llava_fn.generate.assistant import Assistant
from llava_fn.generate.conversation import Chat, Picture
from llava_fn.serve import fields
from llava_fn.serve.fields import PARTS, short
from llava_fn.serve.options import Limits

ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """where: its place in the request. parts: ("text", text) and ("image", data URL). unknown: fields of no table."""

    where: str
    role: str
    parts: tuple[tuple[str, str], ...]
    unknown: tuple[str, ...] = ()

    def all(self, kind: str) -> list[str]:
        """The texts or the data URLs."""
        return [value for found, value in self.parts if found == kind]


def read(messages: Sequence[object], limits: Limits) -> list[Message]:
    """Each message, checked by itself. Raises BadRecord or Refused."""
    if len(messages) > limits.prompt:  # each has a token at least
        raise BadRecord(f"{len(messages)} messages, more than a prompt of {limits.prompt} tokens can hold; send fewer")
    read = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    check_text([text for message in read for text in message.all("text")], limits)
    return read


def check_text(texts: Sequence[str], limits: Limits) -> None:
    """Raises BadRecord if the texts of a prompt are so long that they need not be tokenized to know it."""
    characters = sum(map(len, texts))
    if characters > limits.characters:
        raise BadRecord(
            f"the prompt has {characters} characters, over what {limits.prompt} tokens can hold; shorten it"
        )


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise BadRecord(f"{where} is an object with 'role' and 'content', not {short(message)}")
    values, unknown = fields.read(message, fields.MESSAGE, where)
    role, content = values.get("role"), values.get("content")
    if role not in ROLES:
        raise BadRecord(f"{where}: role {short(role)}; there are: {', '.join(ROLES)}")
    if isinstance(content, str):
        return Message(where, role, (("text", content),), tuple(unknown))
    if not isinstance(content, list):
        raise BadRecord(f"{where}: content is a text or a list of parts, not {short(content)}")
    parts = []
    for j, part in enumerate(content):
        kind, value, more = _part(part, f"{where}.content[{j}]")
        parts.append((kind, value))
        unknown += [f"content.{name}" for name in more]
    if role != "user" and any(kind == "image" for kind, _ in parts):
        raise BadRecord(f"{where}: an image in a message of role {role}; images belong to the user's")
    return Message(where, role, tuple(parts), tuple(unknown))


def _part(part: object, where: str) -> tuple[str, str, list[str]]:
    """Its kind, its text or data URL, and its unknown fields."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in PARTS:
        raise BadRecord(
            f'{where}: a part is {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": {{"url": ...'
            f"}}}}, not {short(part)}"
        )
    values, unknown = fields.read(part, PARTS[kind], where)
    name = "text" if PARTS[kind] is fields.TEXT_PART else "image_url"
    if name not in values:
        raise BadRecord(f"{where}: a part of type {kind} has a field {name}; this one has {', '.join(part)}")
    if name == "text":
        return "text", values["text"], unknown
    url = values["image_url"]
    if isinstance(url, dict):
        values, more = fields.read(url, fields.IMAGE_URL, f"{where}.image_url")
        url, unknown = values.get("url"), unknown + [f"image_url.{name}" for name in more]
    if not isinstance(url, str) or url[:5].lower() != "data:":
        raise BadRecord(
            f"{where}: a data URL only (data:image/png;base64,...), not {short(url)}; this server opens no path and "
            "fetches no address"
        )
    return "image", url, unknown


def chat_of(messages: Sequence[Message], a: Assistant, limits: Limits) -> Chat:
    """The conversation of these messages. Raises BadRecord."""
    chat = Chat()
    room = limits.prompt // a.config.vision.patches
    for i, message in enumerate(messages):
        if message.role == "user":
            urls = message.all("image")
            if len(chat.pictures) + len(urls) > room:
                raise BadRecord(f"{message.where}: more than the {room} images that a prompt has room for; send fewer")
            pictures = [_picture(url, a, limits, f"{message.where}, image {j}") for j, url in enumerate(urls)]
            chat = conversation.ask(chat, _marked(message), pictures)
        elif message.role == "assistant":
            chat = replace(chat, turns=(*chat.turns, ("gpt", "".join(message.all("text")))))
        elif i:
            raise BadRecord(f"{message.where}: a {message.role} message is the first one, and there is only one")
        else:
            chat = replace(chat, system="\n".join(message.all("text")))
    if template_of(a.form.template).caption and (len(chat.turns) > 2 or len(chat.pictures) != 1):
        raise BadRecord("this model writes a caption for an image: send one image, and no earlier turns")
    return chat


def _picture(url: str, a: Assistant, limits: Limits, where: str) -> Picture:
    return conversation.picture(image.from_base64(url, where, limits.pixels, a.form.image_reading), a, where)


def _marked(message: Message) -> str:
    """The text of a question, with marks for several images; `ask` puts a single image in front, as in training."""
    if any(MARK in text for text in message.all("text")):
        raise BadRecord(f"{message.where}: the text holds {MARK!r}; send the image as a part, and leave the mark out")
    several = len(message.all("image")) > 1
    return "\n".join(MARK if kind == "image" else text for kind, text in message.parts if several or kind == "text")
