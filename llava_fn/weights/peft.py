"""PEFT's low-rank adapters, on disk (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_fn import lora
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.config import Llama
from llava_fn.weights.configs import MANY
from llava_fn.weights.tables import hf_llama

NAME = re.compile(r"base_model\.model\.(?:model\.)?(?P<where>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")
PLAIN = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {},
         "bias": "none"}  # fmt: skip  # fields that change what an adapter means, and the value that is computed here

Adapters = Mapping[str, tuple[Leaf, Leaf, float]]  # path -> A: r in, B: out r, scale


def read(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapters:
    """The adapters of a PEFT folder, by our paths.

    ValueError lists every tensor without a place or without its partner, and names a variant that is not plain LoRA.
    """
    variant = [f"{k}={values[k]!r}" for k, plain in PLAIN.items() if values.get(k, plain) not in (plain, None)]
    if variant:
        raise ValueError(f"{folder / 'adapter_config.json'} is not plain LoRA: {', '.join(variant)}; not supported")
    rank = values["r"]
    scale = values["lora_alpha"] / (math.sqrt(rank) if values.get("use_rslora") else rank)
    paths = {row.theirs: f"llama/{row.ours[0]}" for row in hf_llama(Llama(blocks=MANY))}
    found: dict[str, dict[str, Tensor]] = {}
    wrong = []
    for name, t in tensors.items():
        m = NAME.fullmatch(name)
        path = paths.get(f"{m['where']}.weight") if m else None
        if m is None or path is None:
            wrong.append(f"{name} has no place in a Llama")
        elif t.ndim != 2 or t.shape[m["which"] == "B"] != rank:
            wrong.append(f"{name} is {tuple(t.shape)}, not of rank {rank}")
        else:
            found.setdefault(path, {})[m["which"]] = t
    wrong += [f"{path} has only its {next(iter(pair))}" for path, pair in found.items() if len(pair) == 1]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} adapter tensors do not fit: {'; '.join(wrong)}")
    return {path: (Leaf.of(pair["A"]), Leaf.of(pair["B"]), scale) for path, pair in found.items()}


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
    """The leaves that the adapters change, with the adapters in them."""

    def merged(path: str) -> Leaf:
        leaf, (a, b, scale) = leaves[path], adapters[path]
        return Leaf(leaf.shape, leaf.dtype, lambda: lora.merged(leaf.read(), a.read(), b.read(), scale))

    return {path: merged(path) for path in adapters}
