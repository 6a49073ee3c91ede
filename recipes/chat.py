"""Talk to a model about pictures, in a terminal.

    python recipes/chat.py --weights llava-1.5-7b-hf --image cat.jpg

What you type is a question, or one of these commands:
    /image PATH   a picture for the next question, where it says "<image>" or else in front of it
    /undo         take back the last question and its answer
    /clear        begin a new conversation
    /save FILE    write the conversation as a record of LLaVA's schema
    /help, /exit
Ctrl-C stops an answer and keeps what was said; at the prompt it ends the program.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from llava_fn.data.templates import template_of
from llava_fn.errors import BadRecord
from llava_fn.generate import assistant, options
from llava_fn.generate.assistant import Assistant, Chat, Picture
from llava_fn.generate.options import Decoding
from llava_fn.launch import cli


@dataclass(frozen=True)
class Talk:
    """Whom to talk to, and how it answers."""

    model: Annotated[options.ChatOptions, tyro.conf.arg(name="")]
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()
    image: tuple[Path, ...] = ()  # for the first question


@dataclass(frozen=True)
class Session:
    """A conversation, and the pictures that wait for the next question. names: paths of all pictures, in order."""

    chat: Chat = Chat()
    waiting: tuple[Picture, ...] = ()
    names: tuple[str, ...] = ()


def add_image(a: Assistant, s: Session, path: str) -> Session:
    """With a picture more. A model that writes captions takes one, so there it begins a new conversation."""
    shot = assistant.picture(Path(path), a)
    if template_of(a.form.template).caption:
        return Session(replace(s.chat, turns=(), pictures=()), (shot,), (path,))
    return replace(s, waiting=(*s.waiting, shot), names=(*s.names, path))


def question(a: Assistant, s: Session, line: str, d: Decoding) -> Session:
    """Ask, print the answer as it comes, and keep what was said, after Ctrl-C too."""
    if template_of(a.form.template).caption and not s.waiting:
        raise BadRecord("this model writes a caption for an image; /image PATH gives it one")
    chat = assistant.ask(s.chat, line, s.waiting)
    try:
        for said in assistant.reply(a, chat, d):
            print(said.new, end="", flush=True)
            chat = said.chat
    except KeyboardInterrupt:
        print(" [stopped]", end="")
        if chat.turns[-1][0] == "human":  # what the cache holds is half this question and half what it held before
            chat = replace(chat, cache=None, held=())
    print()
    if not chat.turns[-1][1].strip() or chat.turns[-1][0] == "human":
        print("(no answer; the question is taken back)", file=sys.stderr)
        return replace(s, chat=replace(chat, turns=s.chat.turns, pictures=s.chat.pictures))
    return replace(s, chat=chat, waiting=())


def undo(s: Session) -> Session:
    """Without the last question; pictures that wait go too."""
    chat = assistant.undo(s.chat)
    return Session(chat, (), s.names[: len(chat.pictures)])


def save(s: Session, path: str) -> Session:
    """Write the conversation. OSError if that fails; ValueError if the file exists."""
    turns = [{"from": role, "value": said} for role, said in s.chat.turns]
    record = {"id": Path(path).stem, "image": list(s.names[: len(s.chat.pictures)]), "conversations": turns}
    if Path(path).exists():
        raise ValueError(f"{path} exists; name another file")
    Path(path).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path}: {len(turns)} turns")
    return s


def turn(a: Assistant, s: Session, line: str, d: Decoding) -> Session:
    """What one line does. Raises BadRecord, ValueError or OSError, and then nothing has changed."""
    command, _, rest = line.strip().partition(" ")
    commands: dict[str, Callable[[], Session]] = {
        "/image": lambda: add_image(a, s, rest.strip()),
        "/undo": lambda: undo(s),
        "/clear": lambda: Session(Chat(feats=s.chat.feats)),
        "/save": lambda: save(s, rest.strip()),
        "/help": lambda: print(__doc__) or s,
    }
    if command in ("/image", "/save") and not rest.strip():
        raise BadRecord(f"{command} wants the path of a file behind it")
    if command in commands:
        return commands[command]()
    if command.startswith("/"):
        raise BadRecord(f"no command {command!r}; there are {', '.join(commands)} and /exit")
    return question(a, s, line.strip(), d) if line.strip() or s.waiting else s


def main(c: Talk) -> None:
    """Read lines and answer them until the input ends."""
    if c.decoding.beams > 1 or c.decoding.samples > 1 or c.decoding.logprobs:
        raise ValueError("a conversation is one answer at a time, as text; leave beams, samples and logprobs out")
    if sys.stdin is None:
        raise ValueError("what you say is read from the standard input, which is closed")
    with contextlib.suppress(ImportError):  # not every Python has it; with it, lines can be edited and come back
        import readline  # noqa: F401
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused, and the next one is read
    a = assistant.load(c.model)
    print(assistant.warning(a), end="\n" if assistant.warning(a) else "", file=sys.stderr)
    s = Session()
    for path in c.image:
        s = add_image(a, s, str(path))
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return print() if sys.stdin.isatty() else None
        if line.strip() == "/exit":
            return
        try:
            s = turn(a, s, line, c.decoding)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, cli.command(Talk, __doc__))
