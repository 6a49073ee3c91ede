"""The folder of a run, which can be stopped at any instant and goes on with any number of processes.

    out/MODEL_DATASET/run.json              what the answers depend on, and what they were made from
    out/MODEL_DATASET/predictions/*.jsonl   one file a process: a line an answer, written when it is there

A line is {"i": index, "h": key, "p": answer, "n": tokens, "t": ms, "st": "ok" or "error", "err": reason}. The key is a
digest of the prompt, its images and the settings, so a line counts only for the very question that it answers: rows of
the TSV that were changed are asked again. Each process writes a new file, so a line that a kill cut short spoils no
other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from llava_fn import fields
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.config import differences, plain, structure
from llava_fn.evaluate.prompts import Style
from llava_fn.evaluate.records import Prediction
from llava_fn.evaluate.results import replacing
from llava_fn.generate.options import Decoding
from llava_fn.runs.progress import Bytes
from llava_fn.weights.source import open_source

BLOCK = 2**22  # bytes hashed at a time


@dataclass(frozen=True)
class Settings:
    """What an answer depends on, besides its question."""

    weights: str  # fingerprint
    style: Style
    decoding: Decoding
    context: int
    dtype: str
    quantise: str | None


@dataclass(frozen=True)
class Provenance:
    """What run.json says. data: name, sha256 and rows of the TSV. versions: of the packages at the first start."""

    settings: Settings
    data: dict
    versions: dict
    format: int = 1


def fingerprint(paths: Sequence[Path]) -> str:
    """One digest for the weights: a checkpoint's own, else that of every byte of the files that make the model.

    These files are those of the tensors, and beside them the JSON files and tokenizer.model.
    """
    each = [_fingerprint(checkpoint.newest(path)) for path in paths]
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def _fingerprint(path: Path) -> str:
    if checkpoint.is_checkpoint(path):
        return checkpoint.fingerprint(path)
    files = {archive.path for archive in open_source(path).archives}
    folders = {file.parent for file in files} if path.is_dir() else set()
    files |= {f for folder in folders for f in (*folder.glob("*.json"), *folder.glob("tokenizer.model"))}
    lines = []
    with Bytes(sum(f.stat().st_size for f in files)) as progress:
        for file in sorted(files):
            digest = hashlib.sha256()
            with file.open("rb") as f:
                while block := f.read(BLOCK):
                    digest.update(block)
                    progress.add(len(block))
            lines.append(f"{digest.hexdigest()}  {file.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def key(s: Settings, prompt: str, images: str) -> str:
    """The key of an answer: a digest of all that it depends on. images: `Question.images`."""
    return hashlib.sha256(json.dumps([plain(s), prompt, images]).encode()).hexdigest()


def begin(folder: Path, provenance: Provenance) -> list[str]:
    """Write run.json, or check that the run in the folder has the same settings. Returns notes for the user.

    ValueError names each setting that differs.
    """
    notes = []
    if (folder / "run.json").exists():
        before = read_provenance(folder)
        other = differences(plain(before.settings), plain(provenance.settings))
        if other:
            raise ValueError(
                f"{folder} holds answers with other settings ({'; '.join(other)}); --fresh moves them aside, or name "
                "another --out or --name"
            )
        if before.data != provenance.data:
            notes.append(f"{folder}: the TSV has changed since; rows that are not as they were are asked again")
        if before.versions != provenance.versions:
            changed = "; ".join(differences(before.versions, provenance.versions))
            notes.append(f"{folder}: earlier answers were made with other versions ({changed})")
        provenance = Provenance(before.settings, provenance.data, before.versions)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run.json; --fresh moves it aside, or name another --out")
    with replacing(folder / "run.json") as part:
        part.write_text(json.dumps(plain(provenance), indent=1) + "\n")
    (folder / "predictions").mkdir(exist_ok=True)
    return notes


def read_provenance(folder: Path) -> Provenance:
    """What run.json says. ValueError if it is not there or of another format."""
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; no run was begun there")
    values = fields.load(path)
    try:
        return structure(Provenance, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def move_aside(folder: Path, results: Iterable[Path]) -> Path | None:
    """Rename a run's folder to the first free of folder.1, folder.2, ..., and move its results there. None: no run."""
    found = [path for path in results if path.exists()]
    if not folder.exists() and not found:
        return None
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
    aside = folder.with_name(f"{folder.name}.{number}")
    folder.rename(aside) if folder.exists() else aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


def files(folder: Path) -> list[Path]:
    """The files of answers, in order."""
    return sorted((folder / "predictions").glob("*.jsonl"))


def read(folder: Path, keys: Mapping[str, str]) -> dict[str, Prediction]:
    """index -> prediction, from the lines that have the right key. keys: index -> key.

    Of several lines an answer beats an error, and otherwise the last one counts. A last line without a line end is left
    out: its process was killed. ValueError names any other line that is no answer.
    """
    found: dict[str, Prediction] = {}
    for path in files(folder):
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            new, new_key = _prediction(path, number, line)
            old = found.get(new.index)
            if keys.get(new.index) == new_key and (old is None or old.error or not new.error):
                found[new.index] = new
    return found


def _prediction(path: Path, number: int, line: bytes) -> tuple[Prediction, str]:
    try:
        row = json.loads(line)
        error = row["err"] if row["st"] == "error" else ""
        return Prediction(row["i"], row["p"], row["n"], row["t"] / 1000, error), row["h"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is no answer ({error!r}); remove the line") from error


def count(folder: Path) -> int:
    """The number of lines that all processes have written."""
    return sum(path.read_bytes().count(b"\n") for path in files(folder))


def create(folder: Path, rank: int, size: int) -> TextIO:
    """A new file for the answers of one process."""
    for n in range(10**6):
        try:
            return (folder / "predictions" / f"{n:03d}-{rank}-of-{size}.jsonl").open("x", encoding="utf-8")
        except FileExistsError:
            continue
    raise ValueError(f"{folder} holds a million files of answers; use --fresh")


def write(file: TextIO, predictions: Sequence[Prediction], keys: Mapping[str, str]) -> None:
    """Append answers. When this returns, they are on the disk."""
    for p in predictions:
        row = {"i": p.index, "h": keys[p.index], "p": p.text, "n": p.tokens}
        row |= {"t": round(p.seconds * 1000, 3), "st": "error" if p.error else "ok", "err": p.error}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())
