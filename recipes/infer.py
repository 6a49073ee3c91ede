"""Ask a model about pictures: one question, answered as it is written, or JSON lines in batches.

    python recipes/infer.py --weights runs/emoji --image cat.jpg --prompt "What is shown?"
    python recipes/infer.py --weights runs/emoji --json questions.jsonl --out answers.jsonl

A line holds {"prompt": text, "image": path, data URL or list of them, "id": anything}; image and id may be left out,
and "conversations" in LLaVA's schema, ending with a question, may stand for prompt. Each answer is a line too. A bad
line is named by its number and left out, and the exit status is 1. The same command goes on where it was stopped.

A model too large for one device: `--quantise int8`, or several devices that share it,

    torchrun --nproc-per-node 2 recipes/infer.py --tp 2 --weights runs/emoji --image cat.jpg --prompt "What is shown?"
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from llava_fn.checkpoint.folder import newest
from llava_fn.config import differences, plain
from llava_fn.errors import BadRecord
from llava_fn.generate import assistant, options
from llava_fn.generate.assistant import Assistant, Chat, Text
from llava_fn.generate.options import Decoding
from llava_fn.launch import cli, processes
from llava_fn.launch.device import pick_device
from llava_fn.parallel.collectives import agree
from llava_fn.runs.progress import Progress

BEGIN = b'{"line": '  # of each line of answers


@dataclass(frozen=True)
class Infer:
    """What is asked of which model."""

    model: Annotated[options.ChatOptions, tyro.conf.arg(name="")]
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()
    prompt: str = ""  # "<image>" in it places an image; without it, images stand in front
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


@dataclass(frozen=True)
class Line:
    """One question of a file. number: from 1. digest: of its text."""

    number: int
    text: bytes

    @property
    def digest(self) -> str:
        """To know it again in the file of answers."""
        return hashlib.sha256(self.text).hexdigest()[:12]


def record(line: Line) -> dict:
    """The object of a line, checked. Raises BadRecord."""
    try:
        values = json.loads(line.text)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # an answer repeats the id
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON ({error})") from error
    if not isinstance(values, dict) or ("prompt" in values) == ("conversations" in values):
        raise BadRecord("a line is an object with 'prompt', or else with 'conversations'")
    turns, images = values.get("conversations", []), values.get("image") or []
    images = images if isinstance(images, list) else [images]
    if not isinstance(values.get("prompt", ""), str):
        raise BadRecord(f"'prompt' is {values['prompt']!r}; give a text")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise BadRecord("'conversations' is no list of objects with 'from' and a text 'value'")
    if not all(isinstance(s, str) for s in images):
        raise BadRecord(f"'image' is {values['image']!r}; give a path, a data URL of base64, or a list of them")
    return values | {"image": images}


def conversation(line: Line, a: Assistant, folder: Path) -> Chat:
    """The conversation that a line asks to go on with. Raises BadRecord."""
    values = record(line)
    sources = [s if s.startswith("data:") else folder / s for s in values["image"]]
    pictures = [assistant.picture(s, a) for s in sources]
    if "prompt" in values:
        return assistant.ask(Chat(), values["prompt"], pictures)
    return Chat(tuple((turn.get("from"), turn["value"]) for turn in values["conversations"]), tuple(pictures))


def ready(
    lines: Sequence[Line], a: Assistant, c: Infer, known: dict[str, Tensor]
) -> tuple[dict[Line, Chat], dict[Line, str], dict[str, Tensor]]:
    """The lines that can be answered, what is wrong with the others, and the features of their pictures."""
    chats, bad = {}, {}
    for line in lines:
        try:
            chats[line] = conversation(line, a, c.images)
        except BadRecord as error:
            bad[line] = str(error)
    known = assistant.features(a, [s for chat in chats.values() for s in chat.pictures], known)
    for line, chat in list(chats.items()):
        chats[line] = replace(chat, feats=known)
        try:
            assistant.prompt(a, chats[line], c.decoding)
        except BadRecord as error:
            bad[line] = str(error)
            del chats[line]
    return chats, bad, known


def row(line: Line, texts: Sequence[Text], d: Decoding) -> dict:
    """The line of answers: the first one's text, and with several samples or log-probabilities all of them."""
    out = {"line": line.number, "digest": line.digest, "answer": texts[0].text, "ended": texts[0].ended}
    if "id" in (values := json.loads(line.text)):
        out["id"] = values["id"]
    if d.samples > 1 or d.logprobs or d.beams > 1:
        out["answers"] = [dataclasses.asdict(text) for text in texts]
    return out


def done(path: Path, lines: Sequence[Line]) -> set[int]:
    """The numbers that the file of answers holds; a last line that a kill cut short is removed.

    ValueError if it holds anything else, or an answer to another line.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        rows = {r["line"]: r["digest"] for r in map(json.loads, whole.splitlines())}
    except (ValueError, KeyError, TypeError):
        rows = None
    begun = content[len(whole) :][: len(BEGIN)]
    if rows is None or begun != BEGIN[: len(begun)]:
        raise ValueError(f"{path} is no file of answers; name another --out")
    digests = {line.number: line.digest for line in lines}
    other = [number for number, digest in rows.items() if digests.get(number) != digest]
    if other:
        raise ValueError(f"{path} answers another line {other[0]} than is asked now; name another --out")
    part = path.with_name(path.name + ".part")
    part.write_bytes(whole)
    part.rename(path)
    return set(rows)


def check_same(c: Infer) -> None:
    """ValueError if the file of answers was made with other options; else write down these beside it.

    A run that has trained on since is another model, and so is one of another precision.
    """
    beside = c.out.with_name(c.out.name + ".config.json")
    weights = tuple(map(newest, c.model.weights))
    model = replace(c.model, weights=weights, device="auto", dtype=assistant.Placement.of(c.model).precision)
    now = plain(replace(c, batch=1, tp=1, out=None, json=None, model=model))
    if c.out.exists() and beside.exists():
        other = differences(json.loads(beside.read_text()), now)
        if other:
            raise ValueError(f"{c.out} was made with other options ({'; '.join(other)}); name another --out")
    c.out.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(now, indent=1) + "\n")


def batches(lines: Sequence[Line], a: Assistant, c: Infer) -> Iterator[tuple[int, list[dict], dict[Line, str]]]:
    """How many lines are done after each batch, its answers, and what is wrong with lines that have none."""
    known: dict[str, Tensor] = {}
    for i in range(0, len(lines), c.batch):
        chats, bad, known = ready(lines[i : i + c.batch], a, c, known)
        texts = assistant.answers(a, list(chats.values()), c.decoding) if chats else []
        rows = [row(line, many, c.decoding) for line, many in zip(chats, texts, strict=True)]
        yield i + len(lines[i : i + c.batch]), rows, bad


def many(a: Assistant, c: Infer) -> None:
    """Answer lines. ValueError at the end if some were bad."""
    content = stdin() if str(c.json) == "-" else c.json.read_bytes()
    lines = [Line(n, x.strip()) for n, x in enumerate(content.split(b"\n"), 1) if x.strip()]
    have = answered(a, c, lines) if c.out else set()
    left, wrong = [line for line in lines if line.number not in have], 0
    with Progress(len(have), len(lines)) as progress:
        for n, rows, bad in batches(left, a, c):
            if a.run.tp.axis.rank == 0:
                write(c.out, rows)
            for line, reason in bad.items():
                print(f"{c.json}, line {line.number}: {reason}", file=sys.stderr)
            wrong += len(bad)
            progress.show(len(have) + n, f"lines {wrong} bad")
    if wrong:
        raise ValueError(f"{wrong} of {len(left)} lines are bad and have no answer")


def stdin() -> bytes:
    """The standard input to its end. ValueError if there is none."""
    if sys.stdin is None:
        raise ValueError("--json - reads the standard input, which is closed")
    return sys.stdin.buffer.read()


def answered(a: Assistant, c: Infer, lines: Sequence[Line]) -> set[int]:
    """`done`, as the first rank finds it: it alone touches the file."""
    flags = torch.zeros(len(lines), dtype=torch.long)
    if a.run.tp.axis.rank == 0:
        have = done(c.out, lines)
        check_same(c)
        flags = torch.tensor([line.number in have for line in lines]).long()
    flags = agree(flags.to(a.params["projector"]["w1"].device), a.run.tp.axis).tolist()
    return {line.number for line, flag in zip(lines, flags, strict=True) if flag}


def write(out: Path | None, rows: Sequence[dict]) -> None:
    """Add answers to their file, or print them."""
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if out is None:
        print(text, end="", flush=True)
    else:
        with out.open("a", encoding="utf-8") as f:
            f.write(text)


def one(a: Assistant, c: Infer) -> None:
    """Answer one question, as it is written where there is a single answer."""
    chat = assistant.ask(Chat(), c.prompt, [assistant.picture(path, a) for path in c.image])
    if c.decoding.samples == c.decoding.beams == 1:
        for said in assistant.reply(a, chat, c.decoding):
            print(said.new, end="", flush=True)
        print()
    else:
        for text in assistant.answers(a, [chat], c.decoding)[0]:
            print(text.text)


def main(c: Infer) -> None:
    """Load the model, warn if it is none to talk to, and answer."""
    if not (c.json or c.prompt.strip() or c.image):
        raise ValueError("nothing is asked; give --prompt, --image or both, or --json")
    if c.decoding.logprobs and not c.json:
        raise ValueError("--logprobs goes with --json: a line has room for them")
    with processes.processes(c.tp, pick_device(c.model.device), alone=True) as joined:
        respond(assistant.load(c.model, joined.mesh), c)


def respond(a: Assistant, c: Infer) -> None:
    """Answer what is asked."""
    print(assistant.warning(a), end="\n" if assistant.warning(a) else "", file=sys.stderr)
    try:
        many(a, c) if c.json else one(a, c)
    except KeyboardInterrupt:
        print("\nstopped; " + (f"{c.out} keeps what is done" if c.out else "what is shown is kept"), file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli.run(main, cli.command(Infer, __doc__))
