"""Questions about the pictures that come with the package: data for fine-tuning, made from their captions alone.

    train.json      conversations of three questions about a picture, and of questions without a picture
    heldout.json    single questions about the held-out pictures, whose compositions no conversation of train.json holds
    heldout.tsv     the same for recipes/evaluate.py

Which questions a conversation has follows from SHA-256 of the picture's name, so that every copy is the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_fn.data.emoji import INSTRUCTION
from llava_fn.data.templates import MARK

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = {"woman": "woman", "girl": "woman", "man": "man", "boy": "man", "person": "person"}
MANY = ("women", "men", "people", "couple", "kiss", "family")  # first words of captions of several people
SHORT = "\nAnswer the question using a single word or phrase."  # as LLaVA's training data ask for short answers
DRAWS = 2  # conversations about each picture
TURNS = 3  # of a conversation

Turn = tuple[str, str, str]  # kind of question, question, answer


@dataclass(frozen=True)
class Person:
    """What a caption says, such as "woman firefighter: medium skin tone"."""

    id: str
    image: str
    caption: str

    @property
    def base(self) -> str:
        """The caption without skin tones."""
        name, _, rest = self.caption.partition(": ")
        others = [part for part in rest.split(", ") if part and not part.endswith("skin tone")]
        return f"{name}: {', '.join(others)}" if others else name

    @property
    def tones(self) -> list[str]:
        """The skin tones."""
        parts = self.caption.partition(": ")[2].split(", ")
        return [part.removesuffix(" skin tone") for part in parts if part.endswith("skin tone")]

    @property
    def gender(self) -> str | None:
        """None for several people."""
        name = self.caption.partition(": ")[0]
        return None if " and " in name or name.startswith(MANY) else GENDERS.get(name.split(" ")[0])

    @property
    def role(self) -> str | None:
        """What a single person is or does, if the caption names it."""
        name = self.caption.partition(": ")[0]
        return (name.partition(" ")[2] or None) if self.gender else None


def questions(p: Person) -> list[Turn]:
    """All questions about one picture that its caption answers."""
    out = [("name", INSTRUCTION.removeprefix(f"{MARK}\n"), p.caption)]
    out.append(("base", "What is it, without the skin tone?", p.base))
    if len(p.tones) == 2:
        out.append(("tones", "What are the skin tones?", " and ".join(p.tones)))
    elif p.tones or p.gender:
        out.append(("tone", "What is the skin tone?", p.tones[0] if p.tones else "none"))
    if p.gender:
        out.append(("gender", "Is it a man, a woman or a person?", p.gender))
    if p.role:
        out.append(("role", "What is the role?", p.role))
    return out


def texts() -> list[Turn]:
    """All questions without a picture."""
    pairs = list(zip(TONES, TONES[1:], strict=False))
    darker = [("text", f"Which skin tone is darker than {light}?", dark) for light, dark in pairs]
    lighter = [("text", f"Which skin tone is lighter than {dark}?", light) for light, dark in pairs]
    return darker + lighter


def pick(n: int, *key: object) -> int:
    """A number below n that follows from the key."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest()[:8], "big") % n


def conversation(name: str, turns: Sequence[Turn], image: str | None, short: bool) -> dict:
    """One record in LLaVA's layout. short: ask for short answers, once, as LLaVA's data do."""
    out = []
    for i, (_, question, answer) in enumerate(turns):
        text = (f"{MARK}\n" if image and not i else "") + question + (SHORT if short and not i else "")
        out += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": out}


def about(p: Person, draw: int) -> dict:
    """One conversation about a picture."""
    all_of_them = questions(p)
    start = pick(len(all_of_them), p.id, draw)
    turns = [all_of_them[(start + i) % len(all_of_them)] for i in range(min(TURNS, len(all_of_them)))]
    return conversation(f"{p.id}-{draw}", turns, p.image, short=pick(2, p.id, draw, "short") == 0)


def without(n: int) -> dict:
    """One conversation without a picture."""
    pool = texts()
    turns = [pool[pick(len(pool), "text", n, i)] for i in range(TURNS)]
    return conversation(f"text-{n}", turns, None, short=pick(2, "text", n, "short") == 0)


def people(records: Path) -> list[Person]:
    """The pictures of a file of the data set and their captions."""
    values = json.loads(records.read_text(encoding="utf-8"))
    return [Person(v["id"], v["image"], v["conversations"][1]["value"]) for v in values]


def write(folder: Path, data: Path) -> Path:
    """Write the three files into `folder` and return it. data: the unpacked data set, whose pictures they name.

    ValueError if a file is there that differs.
    """
    train, heldout = people(data / "train.json"), people(data / "heldout.json")
    single = [(f"{p.id}-{turn[0]}", turn, p) for p in heldout for turn in questions(p)]
    records = {
        "train": [about(p, draw) for draw in range(DRAWS) for p in train]
        + [without(n) for n in range(len(train) // 4)],
        "heldout": [conversation(name, [turn], p.image, short=True) for name, turn, p in single],
    }
    files = {f"{split}.json": "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n" for split, rows in records.items()}
    files["heldout.tsv"] = table([(name, turn, (data / p.image).read_bytes()) for name, turn, p in single])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        _write(folder / name, text)
    return folder


def table(rows: Sequence[tuple[str, Turn, bytes]]) -> str:
    """The questions as a TSV of VLMEvalKit's; a picture that stands above already is named by that row's index."""
    first: dict[bytes, str] = {}
    lines = ["index\tcategory\tquestion\tanswer\timage"]
    for name, (kind, question, answer), picture in rows:
        image = first.setdefault(picture, name)
        cell = base64.b64encode(picture).decode() if image == name else image
        lines.append("\t".join((name, kind, question, answer, cell)))
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} was changed after it was written: keep your own data elsewhere, and delete it")
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
