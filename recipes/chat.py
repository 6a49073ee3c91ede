"""Talk to a model about pictures, in a terminal.

    python recipes/chat.py --weights llava-1.5-7b-hf --image cat.jpg

What you type is a question, or one of these commands:
    /image PATH   a picture for the next question, where it says "<image>" or else in front of it
    /undo         take back the last question and its answer
    /clear        begin a new conversation
    /save FILE    write the conversation as a record of LLaVA's schema
    /help, /exit
Ctrl-C stops an answer and keeps the part that is shown; at the prompt it ends the program.
"""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llava_fn.generate.options import ChatOptions, Decoding
from llava_fn.launch import cli


@dataclass(frozen=True)
class Talk:
    """Whom to talk to, and how it answers."""

    model: Annotated[ChatOptions, tyro.conf.arg(name="")]
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()
    image: tuple[Path, ...] = ()  # for the first question


def main(c: Talk) -> None:
    """Read lines and answer them until the input ends."""
    # imports stand where they are used: torch takes seconds, and --help does without
    from llava_fn.generate import assistant, session

    if c.decoding.beams > 1 or c.decoding.samples > 1 or c.decoding.logprobs:
        raise ValueError("a conversation is one answer at a time, as text; leave beams, samples and logprobs out")
    if sys.stdin is None:
        raise ValueError("what you say is read from the standard input, which is closed")
    with contextlib.suppress(ImportError):  # not every Python has it; with it, lines can be edited and come back
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is no text is refused, and the next one is read
        sys.stdin.reconfigure(errors="surrogateescape")
    a = assistant.load(c.model)
    if warning := assistant.warning(a):
        print(warning, file=sys.stderr)
    s = session.Session()
    for path in c.image:
        s = session.add_image(a, s, str(path))
    while (line := read_line()) is not None and line != "/exit":
        if line == "/help":
            print(__doc__)
            continue
        try:
            s = session.turn(a, s, line, c.decoding)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)


def read_line() -> str | None:
    """The next line; None at the end of the input, and after Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if sys.stdin.isatty() else "")
        return None


if __name__ == "__main__":
    cli.run(main, cli.command(Talk, __doc__))
