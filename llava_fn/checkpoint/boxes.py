"""Boxes: rectangles of global tensors. They are all that a sharded checkpoint knows of the mesh that wrote it.

Every process writes the boxes that it holds, and reads the boxes that it wants, whoever wrote them. The files of a
sharded checkpoint, besides those that every checkpoint has (see checkpoint.py):

    params-00003.safetensors   the boxes of rank 3; the key of each is path|box: "llama/embed|0:128,0:16"
    optim-00003.safetensors    those of AdamW's moments: "first/llama/embed|0:128,0:16" and "second/..."
    boxes.json                 the tilings: a shape, and rank and sides of each box that it is cut into;
                               of each tensor: the number of its tiling, and the CRC-32 of each of its boxes

A rank that holds nothing has no file. Numbers are fp32. What a mesh pads is never written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llava_fn import tree
from llava_fn.checkpoint.archive import Archive, open_archive
from llava_fn.spec import Box

INDEX = "boxes.json"
KINDS = ("params", "first", "second")  # the parameters, and AdamW's running means


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
class Tiling:
    """How a tensor is cut, as many others are: box i is what ranks[i] wrote. Rank None: one process wrote all."""

    shape: tuple[int, ...]
    ranks: tuple[int | None, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Entry:
    """A global tensor of a checkpoint. crcs: of each box; None: the sum of the whole file is checked instead."""

    tiling: Tiling
    crcs: Sequence[int] | None
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


def file_of(kind: str, rank: int | None) -> str:
    """The file that holds what this rank wrote of one kind; what one process wrote, if it is None."""
    return ("params" if kind == "params" else "optim") + ("" if rank is None else f"-{rank:05d}") + ".safetensors"


def key_of(kind: str, name: str, box: Box | None) -> str:
    """The key of a box in its file; of the whole tensor as one process writes it, if it is None."""
    return ("" if kind == "params" else f"{kind}/") + name + ("" if box is None else f"|{write_box(box)}")


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


def check_tiles(where: str, target: Box, parts: Sequence[tuple[str, Box]]) -> None:
    """ValueError if parts leave a hole in `target` or lie over each other there, naming the first such places.

    parts: who brings it, and the box.
    """
    lines = []
    for box, numbers in itertools.islice(flaws(target, [box for _, box in parts]), 4):
        lines.append(f"[{write_box(box)}] is in {' and '.join(parts[i][0] for i in numbers) or 'no file'}")
    if lines:
        raise ValueError(f"{where}: {'; '.join(lines)}")


def dump_index(index: Index) -> str:
    """The text of boxes.json."""
    numbers: dict[Tiling, int] = {}
    for entries in index.values():
        for entry in entries.values():
            numbers.setdefault(entry.tiling, len(numbers))
    tilings = [{"shape": t.shape, "boxes": list(zip(t.ranks, t.boxes, strict=True))} for t in numbers]
    kinds = {
        kind: {name: {"tiling": numbers[e.tiling], "crc32": e.crcs} for name, e in entries.items()}
        for kind, entries in index.items()
    }
    return json.dumps({"format": 1, "tilings": tilings, "tensors": kinds}) + "\n"


def read_index(path: Path) -> Index:
    """What boxes.json says. ValueError if it is not what `dump_index` writes."""
    try:
        values = json.loads(path.read_text())
        if values["format"] != 1:
            raise ValueError(f"its format {values['format']} is not known; it needs a later version")
        tilings = [tiling(row["shape"], row["boxes"]) for row in values["tilings"]]
        return {
            kind: {name: Entry(tilings[row["tiling"]], row["crc32"]) for name, row in entries.items()}
            for kind, entries in values["tensors"].items()
        }
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error if isinstance(error, ValueError) else repr(error)}") from error


def tiling(shape: Sequence[int], rows: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> Tiling:
    """The tiling of a shape into (rank, sides) each, as JSON has them."""
    boxes = tuple(tuple((start, stop) for start, stop in sides) for _, sides in rows)
    return Tiling(tuple(shape), tuple(rank for rank, _ in rows), boxes)


def index_of_whole(folder: Path) -> Index:
    """The index of a checkpoint that one process wrote: each tensor is one box."""
    index: dict[str, dict[str, Entry]] = {}
    for file in (file_of(kind, None) for kind in KINDS[:2]):
        tensors = open_archive(folder / file).tensors if (folder / file).is_file() else {}
        for key, t in tensors.items():
            kind, name = ("params", key) if file == file_of("params", None) else key.split("/", 1)
            uncut = Tiling(tuple(t.shape), (None,), (whole(t.shape),))
            index.setdefault(kind, {})[name] = Entry(uncut, None, t.dtype)
    return index


@dataclass(frozen=True)
class Reader:
    """Reads boxes of a checkpoint. What it reads is checked, and nothing else is read.

    sums: file -> SHA-256, for files whose boxes have no CRC: such a file is read as a whole when it is opened.
    """

    folder: Path
    index: Index = field(repr=False)
    sums: Mapping[str, str] = field(repr=False)
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
        shape, ranks, stored = entry.tiling.shape, entry.tiling.ranks, entry.tiling.boxes
        box = whole(shape) if box is None else tuple(box)
        check_inside(name, shape, box)
        out = torch.empty(extent(box), dtype=entry.dtype)
        if not out.numel():
            return out
        shared = [(i, both) for i, other in enumerate(stored) if (both := overlap(other, box)) is not None]
        parts = [(file_of(kind, ranks[i]), both) for i, both in shared]
        check_tiles(f"{self.folder / INDEX}: {kind} of {name}", box, parts)
        for (i, both), (file, _) in zip(shared, parts, strict=True):
            out[_within(both, box)] = self._stored(kind, name, i)[_within(both, stored[i])]
            self.opened[file].release()
        return out

    def _stored(self, kind: str, name: str, number: int) -> Tensor:
        """Box `number` of a tensor, mapped."""
        entry = self.index[kind][name]
        rank, box = entry.tiling.ranks[number], entry.tiling.boxes[number]
        file, key = file_of(kind, rank), key_of(kind, name, None if rank is None else box)
        where = f"{self.folder / file}: {key}"
        value = self.archive(file).tensors.get(key)
        if value is None:
            raise ValueError(f"{where} is not in it; use another checkpoint")
        have, want = (value.dtype, *value.shape), (entry.dtype, *extent(box))
        if have != want:
            raise ValueError(f"{where} is {have}, not {want}; use another checkpoint")
        if entry.crcs is not None and crc_of(value) != entry.crcs[number]:
            raise ValueError(f"{where} is damaged: its CRC-32 is not that of {INDEX}; use another checkpoint")
        return value

    def archive(self, file: str) -> Archive:
        """One of the files, mapped. ValueError if it is to be verified and is damaged."""
        if file not in self.opened:
            path = self.folder / file
            if file in self.sums and digest(path) != self.sums[file]:
                raise ValueError(f"{path} is damaged: its SHA-256 is not that of the checkpoint; use another one")
            self.opened[file] = open_archive(path)
        return self.opened[file]


def _within(box: Box, around: Box) -> tuple[slice, ...]:
    """The slices that cut `box` out of the tensor that `around` is."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, around, strict=True))
