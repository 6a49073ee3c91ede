"""Boxes: rectangular parts of global tensors. A sharded checkpoint records boxes, not the mesh that wrote it.

Every process writes the boxes that it holds, and reads the boxes that it needs, whichever rank wrote them. The files of
a sharded checkpoint, besides those that every checkpoint has (see folder.py):

    params-00003.safetensors   the boxes of rank 3 under the keys path|box: "llama/embed|0:128,0:16"
    optim-00003.safetensors    boxes of AdamW's moments: "first/llama/embed|0:128,0:16" and "second/..."
    boxes.json                 tilings: a shape, and the rank and the sides of each box that it is cut into;
                               for each tensor: the number of its tiling, and the CRC-32 of each of its boxes

A rank that holds nothing has no file. Numbers are fp32. Padding is never written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from zlib_ng import zlib_ng

from llava_fn import fields, tree
from llava_fn.checkpoint.archive import Archive, open_archive
from llava_fn.files import digest
from llava_fn.spec import Box

INDEX = "boxes.json"
KINDS = ("params", "first", "second")  # the parameters, and AdamW's running means


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor and its values: fp32, on any device. An empty box is never written.

    ValueError if the box is not inside the shape, or if the value is not fp32 of the shape of the box.
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
    """How a tensor is cut into boxes: rank ranks[i] wrote boxes[i]. Rank None: one process wrote the whole tensor."""

    shape: tuple[int, ...]
    ranks: tuple[int | None, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Entry:
    """A global tensor of a checkpoint. crcs: CRC-32 of each box; None: the SHA-256 of its file is checked instead."""

    tiling: Tiling
    crcs: Sequence[int] | None
    dtype: torch.dtype = torch.float32


Index = Mapping[str, Mapping[str, Entry]]  # kind -> "llama/embed" -> entry


def extent(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def write_box(box: Box) -> str:
    """A box as text: 0:128,0:16."""
    return ",".join(f"{start}:{stop}" for start, stop in box)


def check_inside(name: str, shape: Sequence[int], box: Box) -> None:
    """ValueError naming the tensor if a box is not inside its shape."""
    if len(box) != len(shape) or not all(0 <= a <= b <= size for (a, b), size in zip(box, shape, strict=True)):
        raise ValueError(f"{name}: box {write_box(box)} is not inside its shape {tuple(shape)}")


def file_of(kind: str, rank: int | None) -> str:
    """The file that a rank wrote for one kind; None: the file of a checkpoint that one process wrote."""
    return ("params" if kind == "params" else "optim") + ("" if rank is None else f"-{rank:05d}") + ".safetensors"


def key_of(kind: str, name: str, box: Box | None) -> str:
    """The key of a box in its file; None: the key of a whole tensor that one process wrote."""
    return ("" if kind == "params" else f"{kind}/") + name + ("" if box is None else f"|{write_box(box)}")


def crc_of(value: Tensor) -> int:
    """CRC-32 of the bytes of a tensor on the CPU."""
    return zlib_ng.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data)


def overlap(a: Box, b: Box) -> Box | None:
    """The intersection of two boxes of one tensor, or None."""
    both = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def flaws(target: Box, parts: Sequence[Box]) -> Iterator[tuple[Box, list[int]]]:
    """Each cell of `target` that is not in exactly one of the parts, and the numbers of the parts that it is in.

    parts: boxes inside `target`. Space is cut into cells wherever a box begins or ends, so that each cell lies either
    inside or outside each part.
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
    """ValueError if parts leave a hole in `target` or overlap there. The error names the first such places.

    parts: (file, box).
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
    """Parse boxes.json. ValueError if `dump_index` did not write it."""
    values = fields.load(path)
    try:
        if values["format"] != 1:
            raise ValueError(f"its format {values['format']} is not known; it needs a later version")
        tilings = dict(enumerate(tiling(row["shape"], row["boxes"]) for row in values["tilings"]))
        index = {
            kind: {name: Entry(tilings[row["tiling"]], row["crc32"]) for name, row in entries.items()}
            for kind, entries in values["tensors"].items()
        }
        for name, entry in ((name, entry) for entries in index.values() for name, entry in entries.items()):
            _check_whole(name, entry.crcs, len(entry.tiling.boxes))
        return index
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error if isinstance(error, ValueError) else repr(error)}") from error


def tiling(shape: Sequence[int], rows: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> Tiling:
    """The tiling of a shape. rows: (rank, sides of its box), as in boxes.json."""
    boxes = tuple(tuple((start, stop) for start, stop in sides) for _, sides in rows)
    ranks = tuple(rank for rank, _ in rows)
    _check_whole("a tiling", [*shape, *ranks, *(n for box in boxes for side in box for n in side)])
    for box in boxes:
        check_inside("a tiling", shape, box)
    return Tiling(tuple(shape), ranks, boxes)


def _check_whole(name: str, numbers: object, count: int = 0) -> None:
    """ValueError unless these are whole numbers, at least `count` of them."""
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers) or len(numbers) < count:
        raise ValueError(f"{name} holds what is no list of whole numbers, at least {count} of them")


def index_of_whole(folder: Path) -> Index:
    """The index of a checkpoint that one process wrote, in which each tensor is one box."""
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
    """Reads boxes of a checkpoint, and verifies what it reads.

    sums: file -> SHA-256, for files whose boxes have no CRC: such a file is hashed when it is opened. Empty if the
    files have been verified already.
    """

    folder: Path
    index: Index = field(repr=False)
    sums: Mapping[str, str] = field(repr=False)
    opened: dict[str, Archive] = field(default_factory=dict, repr=False)

    def read(self, kind: str, path: tree.Path, box: Box | None = None) -> Tensor:
        """A box of a tensor, or the whole tensor, copied to the CPU. kind: one of KINDS.

        Reads the stored boxes that intersect it, each as a whole to check its CRC. ValueError naming file and tensor if
        one of them is damaged or missing, or if together they do not cover the box.
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
        """Stored box `number` of a tensor, mapped and verified."""
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
        """A file of tensors, mapped. ValueError if it is damaged and has not been verified before."""
        if file not in self.opened:
            path = self.folder / file
            if file in self.sums and digest(path) != self.sums[file]:
                raise ValueError(f"{path} is damaged: its SHA-256 is not that of the checkpoint; use another one")
            self.opened[file] = open_archive(path)
        return self.opened[file]


def _within(box: Box, around: Box) -> tuple[slice, ...]:
    """The slices of `box` in a tensor that holds the box `around`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, around, strict=True))
