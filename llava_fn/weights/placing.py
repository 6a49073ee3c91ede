"""From named tensors of a public layout to our leaves, one to one; an error lists all tensors that do not fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from llava_fn import llama, projector
from llava_fn import spec as specs
from llava_fn.checkpoint.leaf import SAFETENSORS, Leaf
from llava_fn.config import Llama, Llava, Vision
from llava_fn.llava import tower
from llava_fn.weights.tables import LAYOUTS, Layout, Rule, Slot

Tensors = Mapping[str, Tensor]
Check = Callable[[Tensor], None]  # called before a tensor is read; ValueError if its file is damaged
Shapes = Mapping[str, tuple[int, ...]]  # path of a leaf within its part -> global shape


def detect(where: str, tensors: Tensors) -> Layout:
    """The layout whose mark matches one of the names. ValueError if none does."""
    for layout in LAYOUTS:
        if any(re.fullmatch(layout.mark, name) for name in tensors):
            return layout
    some = ", ".join(list(tensors)[:5])
    raise ValueError(
        f"{where} holds {len(tensors)} tensors of an unknown layout ({some} ...); "
        f"known are: {', '.join(layout.name for layout in LAYOUTS)}"
    )


def assign(tensors: Tensors, layout: Layout, wrong: list[str]) -> dict[Slot, dict[str, Tensor]]:
    """The tensors of each slot, by their names without the prefix. Unexpected and duplicate ones go to `wrong`."""
    slots: dict[Slot, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if re.fullmatch(layout.ignored, name):
            continue
        matches = [(slot, name[m.end() :]) for slot in layout.slots if (m := re.match(slot.prefix, name))]
        if not matches:
            wrong.append(f"unexpected: {name}")
            continue
        slot, rest = matches[0]
        if rest in slots.setdefault(slot, {}):
            wrong.append(f"duplicate: {name} is {slot.part}'s {rest}, which another name holds too")
        slots[slot][rest] = t
    for part in ("vision", "projector", "llama"):
        if len([slot for slot in slots if slot.part == part]) > 1:
            wrong.append(f"duplicate: the {part} is held under two kinds of names")
    return slots


def vision_spec(c: Vision) -> specs.Spec:
    """The whole image tower, with the last blocks and the norm, which LLaVA does not have."""
    whole = tower(c).spec(dataclasses.replace(c, feature_layer=c.blocks))
    return {**whole, "post_g": specs.norm(c.width), "post_b": specs.bias(c.width)}


def is_spare(path: str, c: Vision) -> bool:
    """Whether a leaf belongs to the end of the image tower, after the hidden state that LLaVA reads."""
    block = re.match(r"vision/blocks/(\d+)/", path)
    return path.startswith("vision/post_") or (block is not None and int(block[1]) >= c.used)


def shapes(part: str, c: Llava, widths: tuple[int, ...]) -> Shapes:
    """The shape of every leaf of a part. widths: (out, in) of the projector."""
    spec = {"vision": lambda: vision_spec(c.vision), "llama": lambda: llama.spec(c.llama),
            "projector": lambda: projector.spec(widths[1], widths[0])}[part]()  # fmt: skip
    return {"/".join(path): p.shape for path, p in specs.leaves(spec)}


def their_shape(rule: Rule, ours: Shapes) -> tuple[int, ...]:
    """The shape of a rule's tensor, from those of our leaves. ValueError if no tensor can be so large."""
    try:
        return tuple(rule.reshape.join(*[torch.empty(ours[path], device="meta") for path in rule.ours]).shape)
    except (RuntimeError, TypeError) as error:
        sizes = ", ".join(str(ours[path]) for path in rule.ours)
        raise ValueError(f"the config wants a {rule.theirs} of {sizes}, and no tensor is so large") from error


def _group(path: str) -> str:
    """The block of a spare leaf, or the norm: a source has all leaves of a group or none."""
    return path.rpartition("/")[0] or path.partition("_")[0]


def leaves(
    slot: Slot, tensors: Tensors, vision: Vision | None, language: Llama | None, wrong: list[str], check: Check
) -> dict[str, Leaf]:
    """The leaves of a slot's part, path -> leaf; what does not fit is added to `wrong`. check: as of `Check`."""
    c = Llava(vision or Vision(), language or Llama())  # the sizes of other parts do not matter
    rules = slot.rules(c)
    first = next((tensors[r.theirs] for r in rules if r.ours == ("w1",) and r.theirs in tensors), None)
    widths = tuple(first.shape) if first is not None and first.ndim == 2 and first.numel() else None
    ours = shapes(slot.part, c, widths or (1, 1))
    wrong += [f"unexpected: {slot.part}'s {name}" for name in tensors.keys() - {rule.theirs for rule in rules}]
    rules = _untied(rules, ours, tensors, wrong)
    if slot.part == "projector" and widths is None:  # all its shapes follow from its first matrix
        if first is not None:
            wrong.append(f"wrong shape: the projector's first matrix is {tuple(first.shape)}; ZeRO 3 saves a parameter "
                         "that it did not gather as empty")  # fmt: skip
        rules = [rule for rule in rules if rule.theirs not in tensors]
    held = {_group(rule.ours[0]) for rule in rules if rule.theirs in tensors}
    out: dict[str, Leaf] = {}
    for rule in rules:
        spare = slot.part == "vision" and is_spare(f"vision/{rule.ours[0]}", c.vision)
        if rule.theirs in tensors:
            out |= _split(rule, tensors[rule.theirs], ours, wrong, check)
        elif not spare or _group(rule.ours[0]) in held:
            wrong.append(f"missing: {slot.part}'s {rule.theirs}")
    return out


def _untied(rules: list[Rule], ours: Shapes, tensors: Tensors, wrong: list[str]) -> list[Rule]:
    """The rules without the head if it is tied to the embedding. A head in the file must then equal the embedding."""
    embed = next((rule.theirs for rule in rules if rule.ours == ("embed",)), "")
    for rule in rules:
        if rule.ours[0] not in ours and rule.theirs in tensors and embed in tensors:
            if not torch.equal(tensors[rule.theirs], tensors[embed]):
                wrong.append(f"wrong values: {rule.theirs} is not the embedding, though the config ties the two")
    return [rule for rule in rules if rule.ours[0] in ours]


def _split(rule: Rule, t: Tensor, ours: Shapes, wrong: list[str], check: Check) -> dict[str, Leaf]:
    shape = their_shape(rule, ours)
    if tuple(t.shape) != shape:
        wrong.append(f"wrong shape: {rule.theirs} is {tuple(t.shape)}, the config wants {shape}")
        return {}
    if t.dtype not in SAFETENSORS:
        wrong.append(f"wrong dtype: {rule.theirs} is {t.dtype}; weights are {', '.join(map(str, SAFETENSORS))}")
        return {}

    def read(j: int) -> Tensor:
        check(t)
        return rule.reshape.split(t)[j]

    return {path: Leaf(ours[path], t.dtype, partial(read, j)) for j, path in enumerate(rule.ours)}
