"""Every tensor of a source has one place in the model, and every place has its tensor; or an error that lists all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from llava_fn import llama, projector
from llava_fn import spec as specs
from llava_fn.checkpoint.leaf import SAFETENSORS, Leaf
from llava_fn.config import Llama, Llava, Vision
from llava_fn.llava import tower
from llava_fn.weights.tables import LAYOUTS, Layout, Rule, Slot

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]  # path within a part -> global shape


def detect(where: str, tensors: Tensors) -> Layout:
    """The layout whose mark one of the names bears. ValueError if it is none that is known."""
    for layout in LAYOUTS:
        if any(re.fullmatch(layout.mark, name) for name in tensors):
            return layout
    some = ", ".join(list(tensors)[:5])
    raise ValueError(
        f"{where} holds {len(tensors)} tensors of no layout known here ({some} ...); "
        f"known are: {', '.join(layout.name for layout in LAYOUTS)}"
    )


def sort(tensors: Tensors, layout: Layout, wrong: list[str]) -> dict[Slot, dict[str, Tensor]]:
    """Which slot each tensor belongs to, under its name there. What has none, or stands twice, is added to `wrong`."""
    found: dict[Slot, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if re.fullmatch(layout.ignored, name):
            continue
        spots = [(p, name[m.end() :]) for p in layout.places if (m := re.match(p.before, name))]
        if not spots:
            wrong.append(f"unexpected: {name}")
            continue
        slot, tail = spots[0]
        if tail in found.setdefault(slot, {}):
            wrong.append(f"duplicate: {name} is {slot.part}'s {tail}, which stands there under another name too")
        found[slot][tail] = t
    for part in ("vision", "projector", "llama"):
        if len([p for p in found if p.part == part]) > 1:
            wrong.append(f"duplicate: the {part} stands there under two kinds of names")
    return found


def vision_spec(c: Vision) -> specs.Spec:
    """The image tower with all its blocks and the norm after them, which LLaVA does not have."""
    whole = tower(c).spec(dataclasses.replace(c, feature_layer=c.blocks))
    return {**whole, "post_g": specs.norm(c.width), "post_b": specs.bias(c.width)}


def is_spare(path: str, c: Vision) -> bool:
    """Whether LLaVA never reads this leaf of the whole image tower: those after the hidden state that it takes."""
    block = re.match(r"vision/blocks/(\d+)/", path)
    return path.startswith("vision/post_") or (block is not None and int(block[1]) >= c.used)


def shapes(part: str, c: Llava, widths: tuple[int, ...]) -> Shapes:
    """Shape of every leaf of a part. widths: of the projector, (out, in)."""
    spec = {"vision": lambda: vision_spec(c.vision), "llama": lambda: llama.spec(c.llama),
            "projector": lambda: projector.spec(widths[1], widths[0])}[part]()  # fmt: skip
    return {"/".join(path): p.shape for path, p in specs.leaves(spec)}


def their_shape(row: Rule, ours: Shapes) -> tuple[int, ...]:
    """The shape of the other layout's tensor, made from our declaration."""
    return tuple(row.how.join(*[torch.empty(ours[path], device="meta") for path in row.ours]).shape)


def _group(path: str) -> str:
    """Spare leaves are there together or not at all: a block, or the norm."""
    return path.rpartition("/")[0] or path.partition("_")[0]


def leaves(
    slot: Slot, tensors: Tensors, vision: Vision | None, language: Llama | None, wrong: list[str]
) -> dict[str, Leaf]:
    """The leaves of a part, path -> leaf; what does not fit is added to `wrong`."""
    c = Llava(vision or Vision(), language or Llama())  # of a part that is not there the sizes do not matter
    rows = slot.rows(c)
    first = next((tensors[r.theirs] for r in rows if r.ours == ("w1",) and r.theirs in tensors), None)
    widths = tuple(first.shape) if first is not None and first.ndim == 2 else (0, 0)
    ours = shapes(slot.part, c, widths)
    wrong += [f"unexpected: {slot.part}'s {name}" for name in tensors.keys() - {row.theirs for row in rows}]
    rows = _untied(rows, ours, tensors, wrong)
    there = {_group(row.ours[0]) for row in rows if row.theirs in tensors}
    found: dict[str, Leaf] = {}
    for row in rows:
        spare = slot.part == "vision" and is_spare(f"vision/{row.ours[0]}", c.vision)
        if row.theirs in tensors:
            found |= _split(row, tensors[row.theirs], ours, wrong)
        elif not spare or _group(row.ours[0]) in there:
            wrong.append(f"missing: {slot.part}'s {row.theirs}")
    return found


def _untied(rows: list[Rule], ours: Shapes, tensors: Tensors, wrong: list[str]) -> list[Rule]:
    """Without the head of a decoder whose head is the embedding; where a file holds it too it must be the same."""
    embed = next((row.theirs for row in rows if row.ours == ("embed",)), "")
    for row in rows:
        if row.ours[0] not in ours and row.theirs in tensors and embed in tensors:
            if not torch.equal(tensors[row.theirs], tensors[embed]):
                wrong.append(f"wrong values: {row.theirs} is not the embedding, though the config ties the two")
    return [row for row in rows if row.ours[0] in ours]


def _split(row: Rule, t: Tensor, ours: Shapes, wrong: list[str]) -> dict[str, Leaf]:
    shape = their_shape(row, ours)
    if tuple(t.shape) != shape:
        wrong.append(f"wrong shape: {row.theirs} is {tuple(t.shape)}, the config wants {shape}")
        return {}
    if t.dtype not in SAFETENSORS:
        wrong.append(f"wrong dtype: {row.theirs} is {t.dtype}; weights are {', '.join(map(str, SAFETENSORS))}")
        return {}
    return {path: Leaf(ours[path], t.dtype, lambda j=j: row.how.split(t)[j]) for j, path in enumerate(row.ours)}
