"""PEFT folders of low-rank adapters, read and written (Hu et al. 2021, arXiv 2106.09685).

    adapter_config.json           accepted if its fields mean that an adapted weight is W + scale B A
    adapter_model.safetensors     base_model.model.MODULE.lora_A.weight, r in; .lora_B.weight, out r; the projector
    non_lora_trainables.bin       LLaVA's own file for the projector

MODULE is named as in transformers 5 or 4, or as in LLaVA's code; the adapter's name may follow lora_A and lora_B.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llava_fn import lora
from llava_fn.checkpoint import leaf
from llava_fn.checkpoint.archive import Archive
from llava_fn.checkpoint.leaf import SAFETENSORS, Leaf
from llava_fn.weights import peft_config
from llava_fn.weights.configs import ANY
from llava_fn.weights.peft_config import CONFIG, Values
from llava_fn.weights.tables import HF, PEFT

TENSORS, OTHERS = "adapter_model.safetensors", "non_lora_trainables.bin"
ROOT = "base_model.model."
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")

Adapters = Mapping[str, tuple[Leaf, Leaf, float]]  # path -> A: r in, B: out r, scale
Tensors = Mapping[str, Tensor]


def read(folder: Path, values: Values, tensors: Tensors) -> tuple[Adapters, Tensors]:
    """The adapters of a PEFT folder, by our paths, and its other tensors, of a projector or an image tower.

    values: the used fields of its config. ValueError names each module to save that is not in the files, each other
    tensor that is foreign, and each adapter tensor of an unknown module, without its partner, of another rank or
    dtype, duplicate, or with NaN or infinite values.
    """
    pairs = {name: t for name, t in tensors.items() if ".lora_" in name}
    others = {name: t for name, t in tensors.items() if name not in pairs}
    if not pairs:
        raise ValueError(f"{folder} has {CONFIG}, but no adapters; download its {TENSORS} too")
    _check_others(folder, values, others)
    return _adapters(folder, values, pairs), others


def _check_others(folder: Path, values: Values, others: Tensors) -> None:
    prefixes = [slot.prefix for slot in HF.slots if slot.part != "llama"]
    foreign = [name for name in others if not any(re.match(prefix, name) for prefix in prefixes)]
    if foreign:
        raise ValueError(
            f"{folder}: {', '.join(foreign[:5])}{' ...' if foreign[5:] else ''} ({len(foreign)} tensors): only a "
            f"projector or an image tower is supported in addition to adapters; {peft_config.ADVICE}"
        )
    saved = peft_config.saved(values)
    if saved and not any(f"{x}." in name for name in others for x in peft_config.PROJECTOR):
        raise ValueError(
            f"{folder / CONFIG}: modules_to_save names {', '.join(saved)}, and no tensor of it is in the folder"
        )
    if wrong := [f"{name} {flaw}" for name, t in others.items() if (flaw := _flaw(t))]:
        raise ValueError(f"{folder}: {'; '.join(wrong)}")


def _flaw(t: Tensor) -> str | None:
    """Why a tensor cannot be a weight, or None."""
    if t.dtype not in SAFETENSORS:
        return f"is {t.dtype}; weights are {', '.join(map(str, SAFETENSORS))}"
    if t.numel() == 0:
        return "is empty, as ZeRO 3 saves a parameter that it did not gather"
    return None if t.isfinite().all() else "holds NaN or an infinite value"


def _adapters(folder: Path, values: Values, tensors: Tensors) -> Adapters:
    pairs: dict[str, dict[str, Tensor]] = {}
    modules, wrong = {}, []
    for name, t in tensors.items():
        m = NAME.fullmatch(name)
        path = _path(m["module"]) if m else None
        if m is None or path is None:
            wrong.append(f"{name} belongs to no linear layer of a LLaVA")
            continue
        modules[path], which = m["module"], m["which"]
        rank = peft_config.rank(values, modules[path])
        if which in pairs.setdefault(path, {}):
            wrong.append(f"{name} is a duplicate under another name")
        elif t.ndim != 2 or t.shape[which == "B"] != rank:
            wrong.append(f"{name} is {tuple(t.shape)}, not of rank {rank}")
        elif flaw := _flaw(t):
            wrong.append(f"{name} {flaw}")
        pairs[path][which] = t
    wrong += [f"{path} has only its {next(iter(pair))}" for path, pair in pairs.items() if len(pair) == 1]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} adapter tensors do not fit: {'; '.join(wrong)}")
    scales = {path: peft_config.scale(values, module) for path, module in modules.items()}
    return {path: (Leaf.of(pair["A"]), Leaf.of(pair["B"]), scales[path]) for path, pair in pairs.items()}


@cache
def _tables() -> list[tuple[str, dict[str, str]]]:
    """For each slot of HF's layout the prefix, and name of a linear layer -> our path."""
    return [
        (slot.prefix, {r.theirs: f"{slot.part}/{r.ours[0]}" for r in slot.rules(ANY) if "/w" in f"/{r.ours[0]}"})
        for slot in HF.slots
    ]


def _path(module: str) -> str | None:
    """Our path of a module's weight, or None if it is no linear layer of LLaVA."""
    name = f"{module}.weight"
    matches = ((table, re.match(prefix, name)) for prefix, table in _tables())
    return next((table[name[m.end() :]] for table, m in matches if m and name[m.end() :] in table), None)


def check(leaves: Mapping[str, Leaf], adapters: Adapters, where: str) -> None:
    """ValueError lists the adapters that do not fit the weights."""
    unfit = [
        f"{path} is {leaves[path].shape if path in leaves else 'missing'}, not {(b.shape[0], a.shape[1])}"
        for path, (a, b, _) in adapters.items()
        if path not in leaves or leaves[path].shape != (b.shape[0], a.shape[1])
    ]
    if unfit:
        raise ValueError(f"the adapters of {where} do not fit the weights: {'; '.join(unfit)}")


def merge(leaves: Mapping[str, Leaf], adapters: Adapters) -> dict[str, Leaf]:
    """The adapted leaves, each with its adapter added."""

    def merged(path: str) -> Leaf:
        of, (a, b, scale) = leaves[path], adapters[path]
        return Leaf(of.shape, of.dtype, lambda: lora.merged(of.read(), a.read(), b.read(), scale))

    return {path: merged(path) for path in adapters}


def write(
    folder: Path,
    adapters: Adapters,
    projector: Mapping[str, Leaf],
    style: str,
    archives: tuple[Archive, ...],
    blocks: int | None,
) -> None:
    """Write the files of a PEFT folder into the existing `folder`. projector: its leaves by name if it was trained.

    style: "peft" for the names of transformers 5, with the projector among the modules to save; "peft-liuhaotian" for
    those of LLaVA's code, with the projector in a separate file. blocks: of the decoder, if known.
    """
    names, saved = {}, {}
    for slot in PEFT[style]:
        theirs = {r.ours[0]: slot.prefix + r.theirs for r in slot.rules(ANY)}
        names |= {f"{slot.part}/{path}": name.removesuffix(".weight") for path, name in theirs.items()}
        if slot.part == "projector":
            saved = {name: projector[path] for path, name in theirs.items() if projector}
    tensors = {}
    for path, (a, b, _) in adapters.items():
        tensors |= {f"{names[path]}.lora_A.weight": a, f"{names[path]}.lora_B.weight": b}
    separate = style == "peft-liuhaotian"
    leaf.write(folder / TENSORS, tensors if separate else tensors | saved, archives, lambda n: None)
    if saved and separate:
        torch.save({name: x.read().clone() for name, x in saved.items()}, folder / OTHERS)
    sizes = {names[path].removeprefix(ROOT): (a.shape[0], scale) for path, (a, _, scale) in adapters.items()}
    whole = {"modules_to_save": ["multi_modal_projector"] if saved and not separate else None}
    (folder / CONFIG).write_text(json.dumps(peft_config.written(sizes, blocks) | whole, indent=1) + "\n")
