"""A conversation in a terminal: what each line that a person types does to it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from llava_fn.data.templates import template_of
from llava_fn.errors import BadRecord
from llava_fn.generate import conversation
from llava_fn.generate.assistant import Assistant
from llava_fn.generate.conversation import Chat, Picture
from llava_fn.generate.options import Decoding

COMMANDS = "/image, /undo, /clear, /save, /help and /exit"


@dataclass(frozen=True)
class Session:
    """A conversation, and the pictures that wait for the next question. names: paths of all pictures, in order."""

    chat: Chat = Chat()
    waiting: tuple[Picture, ...] = ()
    names: tuple[str, ...] = ()


def turn(a: Assistant, s: Session, line: str, d: Decoding) -> Session:
    """The session after a question or a command. Raises BadRecord, ValueError or OSError, and then nothing changed."""
    command, _, path = line.strip().partition(" ")
    path = path.strip()
    if command in ("/image", "/save") and not path:
        raise BadRecord(f"{command} wants the path of a file behind it")
    match command:
        case "/image":
            return add_image(a, s, path)
        case "/undo":
            return undo(s)
        case "/clear":
            return Session(Chat(feats=s.chat.feats))
        case "/save":
            return save(s, path)
    if command.startswith("/"):
        raise BadRecord(f"no command {command!r}; there are {COMMANDS}")
    return answer(a, s, line.strip(), d) if line.strip() or s.waiting else s


def add_image(a: Assistant, s: Session, path: str) -> Session:
    """One more picture waits. A model that writes captions takes one, so there it begins a new conversation."""
    new = conversation.picture(Path(path), a)
    if template_of(a.form.template).caption:
        return Session(replace(s.chat, turns=(), pictures=()), (new,), (path,))
    return replace(s, waiting=(*s.waiting, new), names=(*s.names, path))


def answer(a: Assistant, s: Session, question: str, d: Decoding) -> Session:
    """Ask, print the answer as it comes, and keep what is printed, after Ctrl-C too."""
    if template_of(a.form.template).caption and not s.waiting:
        raise BadRecord("this model writes a caption for an image; /image PATH gives it one")
    chat = conversation.ask(s.chat, question, s.waiting)
    try:
        for part in conversation.reply(a, chat, d):
            print(part.new, end="", flush=True)
            chat = part.chat
    except KeyboardInterrupt:
        print(" [stopped]", end="")
        if chat.turns[-1][0] == "human":  # the cache holds half this question and half what it held before
            chat = replace(chat, cache=None, cached=())
    print()
    if not chat.turns[-1][1].strip() or chat.turns[-1][0] == "human":
        print("(no answer; the question is taken back)", file=sys.stderr)
        return replace(s, chat=replace(chat, turns=s.chat.turns, pictures=s.chat.pictures))
    return replace(s, chat=chat, waiting=())


def undo(s: Session) -> Session:
    """Without the last question and its answer; pictures that wait go too."""
    chat = conversation.undo(s.chat)
    return Session(chat, (), s.names[: len(chat.pictures)])


def save(s: Session, path: str) -> Session:
    """Write the conversation as a record of LLaVA's schema. OSError if that fails; ValueError if the file exists."""
    turns = [{"from": role, "value": text} for role, text in s.chat.turns]
    record = {"id": Path(path).stem, "image": list(s.names[: len(s.chat.pictures)]), "conversations": turns}
    if Path(path).exists():
        raise ValueError(f"{path} exists; name another file")
    Path(path).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path}: {len(turns)} turns")
    return s
