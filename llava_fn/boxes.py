"""Boxes: rectangles of global tensors. They are all that a sharded checkpoint knows of the mesh that wrote it.

Every process writes the boxes that it holds, and reads the boxes that it wants, whoever wrote them. The files of a
sharded checkpoint, besides those that every checkpoint has (see checkpoint.py):

    params-00003.safetensors   the boxes of rank 3; the key of each is path|box: "llama/embed|0:128,0:16"
    optim-00003.safetensors    those of AdamW's moments: "first/llama/embed|0:128,0:16" and "second/..."
    boxes.json                 of each tensor: its shape, and the file, the CRC-32 and the sides of each of its boxes

A rank that holds nothing has no file. Numbers are fp32. What a mesh pads is never written.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_fn import tree
from llava_fn.weights.archive import Archive, open_archive

INDEX = "boxes.json"
KINDS = ("params", "first", "second")  # the parameters, and AdamW's running means
Box = tuple[tuple[int, int], ...]  # (start, stop) of each dim


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor: fp32, on any device. One without numbers stands for nothing and is never written.

    ValueError if the box is not inside the shape, or if the value is not fp32 of the size of the box.
    """

    path: tree.Path
    shape: tuple[int, ...]  # global
    box: Box
    value: Tensor

    def __post_init__(self) -> None:
        name = "/".join(self.path)
        check_inside(name, self.shape, self.box)
        size = extent(self.box)
        if tuple(self.value.shape) != size or self.value.dtype != torch.float32:
            have = f"{self.value.dtype} of {tuple(self.value.shape)}"
            raise ValueError(f"{name}: the value of box {write_box(self.box)} is {have}, not fp32 of {size}")


@dataclass(frozen=True)
class Stored:
    """Where a box lies. crc: of its bytes; None: the file's own sum is checked instead."""

    file: str
    key: str
    box: Box
    crc: int | None


@dataclass(frozen=True)
class Entry:
    """A global tensor of a checkpoint."""

    shape: tuple[int, ...]
    stored: tuple[Stored, ...]
    dtype: torch.dtype = torch.float32


Index = Mapping[str, Mapping[str, Entry]]  # kind -> "llama/embed" -> entry


def extent(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape)


def write_box(box: Box) -> str:
    """A box as text: 0:128,0:16."""
    return ",".join(f"{start}:{stop}" for start, stop in box)


def check_inside(name: str, shape: Sequence[int], box: Box) -> None:
    """ValueError naming the tensor if a box is not inside its shape."""
    if len(box) != len(shape) or not all(0 <= a <= b <= size for (a, b), size in zip(box, shape, strict=True)):
        raise ValueError(f"{name}: box {write_box(box)} is not inside its shape {tuple(shape)}")


def key_of(kind: str, name: str, box: Box) -> str:
    """The key of a box in its file."""
    return f"{'' if kind == 'params' else kind + '/'}{name}|{write_box(box)}"


def crc_of(value: Tensor) -> int:
    """CRC-32 of the bytes of a tensor on the CPU."""
    return zlib.crc32(memoryview(value.contiguous().flatten().view(torch.uint8).numpy()))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor share, or None."""
    both = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def flaws(target: Box, parts: Sequence[Box]) -> Iterator[tuple[Box, list[int]]]:
    """Each piece of `target` that is not in exactly one of the parts, and the numbers of those that it is in.

    parts: boxes inside `target`. The space is cut wherever a box begins or ends: what is between cuts is in a part as a
    whole or not at all.
    """
    cuts = [sorted({edge for box in (target, *parts) for edge in box[dim]}) for dim in range(len(target))]
    at = [{edge: i for i, edge in enumerate(edges)} for edges in cuts]
    count = torch.zeros([len(edges) - 1 for edges in cuts], dtype=torch.int32)
    for box in parts:
        count[tuple(slice(place[a], place[b]) for place, (a, b) in zip(at, box, strict=True))] += 1
    for cell in (count != 1).nonzero().tolist():
        box = tuple((edges[i], edges[i + 1]) for edges, i in zip(cuts, cell, strict=True))
        yield box, [i for i, part in enumerate(parts) if overlap(box, part) is not None]


def check_tiles(where: str, target: Box, stored: Sequence[Stored]) -> None:
    """ValueError if the stored boxes leave a hole in `target` or lie over each other there; it names the first ones."""
    lines = []
    for box, numbers in flaws(target, [s.box for s in stored]):
        files = " and ".join(stored[i].file for i in numbers)
        lines.append(f"[{write_box(box)}] is in {files or 'no file'}")
        if len(lines) == 4:
            break
    if lines:
        raise ValueError(f"{where}: {'; '.join(lines)}")


def dump_index(index: Index, world: int) -> str:
    """The text of boxes.json. world: how many ranks wrote, for a person to know."""
    kinds = {
        kind: {
            name: {"shape": e.shape, "boxes": [[s.file, s.crc, s.box] for s in e.stored]} for name, e in entries.items()
        }
        for kind, entries in index.items()
    }
    return json.dumps({"format": 1, "world": world, **kinds}, separators=(",", ":")) + "\n"


def read_index(path: Path) -> Index:
    """What boxes.json says. ValueError if it is not what `dump_index` writes."""
    try:
        values = json.loads(path.read_text())
        if values["format"] != 1:
            raise ValueError(f"its format {values['format']} is not known; it needs a later version")
        kinds = [kind for kind in KINDS if kind in values]
        return {kind: {name: _entry(kind, name, row) for name, row in values[kind].items()} for kind in kinds}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error if isinstance(error, ValueError) else repr(error)}") from error


def _entry(kind: str, name: str, row: Mapping[str, Any]) -> Entry:
    stored = []
    for file, crc, sides in row["boxes"]:
        box = tuple((start, stop) for start, stop in sides)
        check_inside(name, row["shape"], box)
        stored.append(Stored(file, key_of(kind, name, box), box, crc))
    return Entry(tuple(row["shape"]), tuple(stored))


def index_of_whole(folder: Path) -> Index:
    """The index of a checkpoint that one process wrote: each tensor is one box."""
    index: dict[str, dict[str, Entry]] = {}
    for file in ("params.safetensors", "optim.safetensors"):
        tensors = open_archive(folder / file).tensors if (folder / file).is_file() else {}
        for key, t in tensors.items():
            kind, name = ("params", key) if file.startswith("params") else key.split("/", 1)
            stored = Stored(file, key, whole(t.shape), None)
            index.setdefault(kind, {})[name] = Entry(tuple(t.shape), (stored,), t.dtype)
    return index


@dataclass(frozen=True)
class Reader:
    """Reads boxes of a checkpoint. What it reads is checked, and nothing else is read.

    sums: file -> SHA-256, for files whose boxes have no CRC: such a file is read as a whole when it is opened.
    """

    folder: Path
    index: Index
    sums: Mapping[str, str]
    opened: dict[str, Archive] = field(default_factory=dict, repr=False)

    def read(self, kind: str, path: tree.Path, box: Box | None = None) -> Tensor:
        """A box of a tensor, or all of it, on the CPU, in memory of its own. kind: params, first or second.

        Reads those stored boxes that it shares numbers with, each as a whole, for its CRC. ValueError naming file and
        tensor if one is damaged, missing, or if they do not make up the box.
        """
        name = "/".join(path)
        if name not in self.index.get(kind, {}):
            raise ValueError(f"{self.folder} holds no {kind} of {name}")
        entry = self.index[kind][name]
        box = whole(entry.shape) if box is None else tuple(box)
        check_inside(name, entry.shape, box)
        shared = [(s, both) for s in entry.stored if (both := overlap(s.box, box)) is not None]
        parts = [Stored(s.file, s.key, both, s.crc) for s, both in shared]
        if all(extent(box)):
            check_tiles(f"{self.folder / INDEX}: {kind} {name}", box, parts)
        out = torch.empty(extent(box), dtype=entry.dtype)
        for stored, both in shared:
            out[_within(both, box)] = self._stored(stored, entry.dtype)[_within(both, stored.box)]
            self.opened[stored.file].release()
        return out

    def _stored(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """All of a stored box, mapped."""
        where = f"{self.folder / stored.file}: {stored.key}"
        value = self._archive(stored.file).tensors.get(stored.key)
        if value is None:
            raise ValueError(f"{where} is not in it; use another checkpoint")
        have, want = (value.dtype, *value.shape), (dtype, *extent(stored.box))
        if have != want:
            raise ValueError(f"{where} is {have}, not {want}; use another checkpoint")
        if stored.crc is not None and crc_of(value) != stored.crc:
            raise ValueError(f"{where} is damaged: its CRC is not that of {INDEX}; use another checkpoint")
        return value

    def _archive(self, file: str) -> Archive:
        if file not in self.opened:
            path = self.folder / file
            if file in self.sums and digest(path) != self.sums[file]:
                raise ValueError(f"{path} is damaged: its SHA-256 is not that of the checkpoint; use another one")
            self.opened[file] = open_archive(path)
        return self.opened[file]


def _within(box: Box, around: Box) -> tuple[slice, ...]:
    """The slices that cut `box` out of the tensor that `around` is."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, around, strict=True))
