"""Questions in lines of JSON, and the file of their answers, with which a stopped command goes on.

recipes/infer.py says what a line of either holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llava_fn.config import differences
from llava_fn.errors import BadRecord
from llava_fn.generate import conversation
from llava_fn.generate.assistant import Assistant
from llava_fn.generate.conversation import Chat, Text
from llava_fn.generate.options import Decoding
from llava_fn.parallel.collectives import agree

BEGIN = b'{"line": '  # how each line of answers begins


@dataclass(frozen=True)
class Line:
    """One question of a file. number: from 1."""

    number: int
    text: bytes

    @property
    def digest(self) -> str:
        """A digest of the text, by which an answer names its question."""
        return hashlib.sha256(self.text).hexdigest()[:12]

    def record(self) -> dict:
        """The object of the line, checked; `image` is a list. Raises BadRecord."""
        try:
            values = json.loads(self.text)
            json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # an answer repeats the id
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not JSON ({error})") from error
        if not isinstance(values, dict) or ("prompt" in values) == ("conversations" in values):
            raise BadRecord("a line is an object with 'prompt', or else with 'conversations'")
        turns, images = values.get("conversations", []), values.get("image") or []
        images = images if isinstance(images, list) else [images]
        if not isinstance(values.get("prompt", ""), str):
            raise BadRecord(f"'prompt' is {values['prompt']!r}; give a text")
        if not isinstance(turns, list) or not all(map(_is_turn, turns)):
            raise BadRecord("'conversations' is no list of objects with 'from' and a text 'value'")
        if not all(isinstance(s, str) for s in images):
            raise BadRecord(f"'image' is {values['image']!r}; give a path, a data URL of base64, or a list of them")
        return values | {"image": images}


@dataclass(frozen=True)
class AnsweredLines:
    """Some lines: one object for each that has an answer, ready for JSON, and the reason for each that has none."""

    lines: Sequence[Line]
    answers: Sequence[dict]
    bad: Mapping[Line, str]


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)


def split(content: bytes) -> list[Line]:
    """The lines of a file of questions that are not blank."""
    return [Line(n, x.strip()) for n, x in enumerate(content.split(b"\n"), 1) if x.strip()]


def batches(a: Assistant, lines: Sequence[Line], d: Decoding, folder: Path, size: int) -> Iterator[AnsweredLines]:
    """Answers to lines, `size` at a time. folder: that paths of images are relative to."""
    known: dict[str, Tensor] = {}
    for i in range(0, len(lines), size):
        batch = lines[i : i + size]
        chats, bad = _chats(a, batch, folder)
        known = conversation.features(a, [s for chat in chats.values() for s in chat.pictures], known)
        for line, chat in list(chats.items()):
            chats[line] = replace(chat, feats=known)
            try:
                conversation.prompt(a, chats[line], d)
            except BadRecord as error:
                bad[line] = str(error)
                del chats[line]
        texts = conversation.answers(a, list(chats.values()), d) if chats else []
        yield AnsweredLines(batch, [_row(line, many, d) for line, many in zip(chats, texts, strict=True)], bad)


def _chats(a: Assistant, lines: Sequence[Line], folder: Path) -> tuple[dict[Line, Chat], dict[Line, str]]:
    """The conversations that lines ask to go on with, and what is wrong with the other lines."""
    chats, bad = {}, {}
    for line in lines:
        try:
            chats[line] = _chat(a, line.record(), folder)
        except BadRecord as error:
            bad[line] = str(error)
    return chats, bad


def _chat(a: Assistant, values: dict, folder: Path) -> Chat:
    pictures = [conversation.picture(s if s.startswith("data:") else folder / s, a) for s in values["image"]]
    if "prompt" in values:
        return conversation.ask(Chat(), values["prompt"], pictures)
    return Chat(tuple((turn.get("from"), turn["value"]) for turn in values["conversations"]), tuple(pictures))


def _row(line: Line, texts: Sequence[Text], d: Decoding) -> dict:
    """The first answer's text, and with several samples, beams or log-probabilities all answers."""
    out = {"line": line.number, "digest": line.digest, "answer": texts[0].text, "ended": texts[0].ended}
    if "id" in (values := json.loads(line.text)):
        out["id"] = values["id"]
    if d.samples > 1 or d.logprobs or d.beams > 1:
        out["answers"] = [dataclasses.asdict(text) for text in texts]
    return out


def write(path: Path | None, answers: Sequence[dict]) -> None:
    """Add answers to their file as lines of JSON, or print them."""
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if path is None:
        print(text, end="", flush=True)
    else:
        with path.open("a", encoding="utf-8") as f:
            f.write(text)


def resume(a: Assistant, path: Path, lines: Sequence[Line], options: dict) -> set[int]:
    """The numbers of the lines that the file of answers at `path` holds already, the same on every rank.

    options: what the answers depend on, ready for JSON. Rank 0 alone touches the file: a last line that a kill cut
    short is removed, and the options are written beside the file. ValueError if the file holds anything else than
    answers to these lines with these options.
    """
    flags, axis = torch.zeros(len(lines), dtype=torch.long), a.model.tp.axis
    if axis.rank == 0:
        numbers = _mended(path, lines)
        _check_options(path, options)
        flags = torch.tensor([line.number in numbers for line in lines]).long()
    flags = agree(flags.to(a.model.embed.device), axis).tolist()
    return {line.number for line, flag in zip(lines, flags, strict=True) if flag}


def _mended(path: Path, lines: Sequence[Line]) -> set[int]:
    """The numbers that a file of answers holds, once a line that was cut short is removed from its end."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        rows = {r["line"]: r["digest"] for r in map(json.loads, whole.splitlines())}
    except (ValueError, KeyError, TypeError):
        rows = None
    rest = content[len(whole) :][: len(BEGIN)]
    if rows is None or rest != BEGIN[: len(rest)]:
        raise ValueError(f"{path} is no file of answers; name another --out")
    digests = {line.number: line.digest for line in lines}
    other = [number for number, digest in rows.items() if digests.get(number) != digest]
    if other:
        raise ValueError(f"{path} answers another line {other[0]} than is asked now; name another --out")
    part = path.with_name(path.name + ".part")
    part.write_bytes(whole)
    part.rename(path)
    return set(rows)


def _check_options(path: Path, options: dict) -> None:
    beside = path.with_name(path.name + ".config.json")
    if path.exists() and beside.exists():
        other = differences(json.loads(beside.read_text()), options)
        if other:
            raise ValueError(f"{path} was made with other options ({'; '.join(other)}); name another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(options, indent=1) + "\n")
