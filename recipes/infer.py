"""Ask a model about pictures: one question, answered as it is written, or JSON lines in batches.

    python recipes/infer.py --weights runs/emoji --image cat.jpg --prompt "What is shown?"
    python recipes/infer.py --weights runs/emoji --json questions.jsonl --out answers.jsonl

A line holds {"prompt": text, "image": path, data URL or list of them, "id": anything}. image and id are optional;
"conversations" in LLaVA's schema, ending with a question, may replace prompt. Each answer is a line too. A bad line is
reported by its number and gets no answer, and the exit status is 1. The same command resumes a stopped one.

A model too large for one device: `--quantise int8`, or several devices that share it,

    torchrun --nproc-per-node 2 recipes/infer.py --tp 2 --weights runs/emoji --image cat.jpg --prompt "What is shown?"
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llava_fn.config import plain
from llava_fn.generate.options import ChatOptions, Decoding
from llava_fn.launch import cli

if TYPE_CHECKING:
    from llava_fn.generate.assistant import Assistant


@dataclass(frozen=True)
class Infer:
    """What is asked of which model."""

    model: Annotated[ChatOptions, tyro.conf.arg(name="")]
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()
    prompt: str = ""  # "<image>" in it places an image; without one, images stand in front
    image: tuple[Path, ...] = ()
    json: Path | None = None  # lines of questions instead; "-" is the standard input, read to its end
    images: Path = Path()  # the folder that paths in the lines are relative to
    out: Path | None = None  # where answers to lines go; else to the standard output
    batch: int = 8  # lines at a time
    tp: int = 1  # devices that share the model, one process each, which torchrun starts

    def __post_init__(self) -> None:
        if self.json and (self.prompt or self.image):
            raise ValueError("give --json, or --prompt and --image; not both")
        if self.out and not self.json:
            raise ValueError("--out goes with --json")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: must be at least 1")
        if self.tp < 1:
            raise ValueError(f"tp={self.tp}: must be at least 1")
        if self.tp > 1 and str(self.json) == "-":
            raise ValueError("--json - cannot be read by several processes; put the lines into a file")


def main(c: Infer) -> None:
    """Load the model, warn if it was never trained to follow questions, and answer."""
    # imports stand where they are used: torch takes seconds, and --help does without
    from llava_fn.generate import assistant
    from llava_fn.launch.device import pick_device
    from llava_fn.launch.processes import processes
    from llava_fn.runs.guard import lock

    if not (c.json or c.prompt.strip() or c.image):
        raise ValueError("nothing is asked; give --prompt, --image or both, or --json")
    if c.decoding.logprobs and not c.json:
        raise ValueError("--logprobs goes with --json: a line has room for them")
    with processes(c.tp, pick_device(c.model.device), alone=True) as world, ExitStack() as stack:
        if c.out:
            stack.enter_context(lock(c.out, c.out.with_name(c.out.name + ".lock"), world))
        a = assistant.load(c.model, world.mesh)
        if warning := assistant.warning(a):
            print(warning, file=sys.stderr)
        try:
            answer_lines(a, c, c.json) if c.json else answer_prompt(a, c)
        except KeyboardInterrupt:
            kept = f"{c.out} keeps what is done" if c.out else "what is shown is kept"
            print(f"\nstopped; {kept}", file=sys.stderr)
            sys.exit(130)


def answer_prompt(a: Assistant, c: Infer) -> None:
    """Answer one question, as it is written where there is a single answer."""
    from llava_fn.generate import conversation

    chat = conversation.ask(conversation.Chat(), c.prompt, [conversation.picture(path, a) for path in c.image])
    if c.decoding.samples == c.decoding.beams == 1:
        for part in conversation.reply(a, chat, c.decoding):
            print(part.new, end="", flush=True)
        print()
    else:
        for answer in conversation.answers(a, [chat], c.decoding)[0]:
            print(answer.text)


def answer_lines(a: Assistant, c: Infer, path: Path) -> None:
    """Answer the lines that have no answer yet. ValueError at the end if some were bad."""
    from llava_fn.generate import lines
    from llava_fn.runs.progress import Progress

    questions, wrong = lines.split(standard_input() if str(path) == "-" else path.read_bytes()), 0
    done = lines.resume(a, c.out, questions, settings(c)) if c.out else set()
    left = [line for line in questions if line.number not in done]
    step = len(done)
    with Progress(step, len(questions)) as progress:
        for batch in lines.batches(a, left, c.decoding, c.images, c.batch):
            if a.model.tp.axis.rank == 0:
                lines.write(c.out, batch.answers)
            for line, reason in batch.bad.items():
                print(f"{path}, line {line.number}: {reason}", file=sys.stderr)
            step, wrong = step + len(batch.lines), wrong + len(batch.bad)
            progress.show(step, f"lines {wrong} bad")
    if wrong:
        raise ValueError(f"{wrong} of {len(left)} lines are bad and have no answer")


def standard_input() -> bytes:
    """The standard input to its end. ValueError if there is none."""
    if sys.stdin is None:
        raise ValueError("--json - reads the standard input, which is closed")
    return sys.stdin.buffer.read()


def settings(c: Infer) -> dict:
    """What answers depend on. A run that has trained on since is another model, and so is one of another precision."""
    from llava_fn.checkpoint.folder import newest
    from llava_fn.generate.assistant import Placement

    dtype = Placement.of(c.model).precision
    model = replace(c.model, weights=tuple(map(newest, c.model.weights)), device="auto", dtype=dtype)
    return plain(replace(c, batch=1, tp=1, out=None, json=None, model=model))


if __name__ == "__main__":
    cli.run(main, cli.command(Infer, __doc__))
