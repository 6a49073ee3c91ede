"""PEFT folders of low-rank adapters, read and written (Hu et al. 2021, arXiv 2106.09685; peft/tuners/lora/config.py).

    adapter_config.json           accepted if its fields mean that an adapted weight is W + scale B A
    adapter_model.safetensors     base_model.model.MODULE.lora_A.weight, r in; .lora_B.weight, out r; the projector
    non_lora_trainables.bin       LLaVA's own file for the projector

MODULE is named as in transformers 5 or 4, or as in LLaVA's code; the adapter's name may follow lora_A and lora_B.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_fn import lora
from llava_fn.checkpoint import leaf
from llava_fn.checkpoint.archive import Archive
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.weights.configs import ANY
from llava_fn.weights.tables import HF, PEFT

CONFIG, TENSORS, OTHERS = "adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"
NAME = re.compile(r"(?P<module>base_model\.model\..+)\.lora_(?P<which>[AB])(\.default)?\.weight")
USED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
HARMLESS = (  # fields that do not change the meaning of the tensors
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
)  # fmt: skip
PLAIN = {  # fields that are harmless with one of these values; all other fields are harmless only if unset
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),  # others change the base
}
PROJECTOR = ("multi_modal_projector", "mm_projector")
DECODER = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"

Adapters = Mapping[str, tuple[Leaf, Leaf, float]]  # path -> A: r in, B: out r, scale
Values = Mapping[str, Any]


def read(folder: Path, values: Values, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Adapters:
    """The adapters of a PEFT folder, by our paths. others: the folder's tensors that are no adapters.

    ValueError names each field that W + scale B A does not express, each module to save that is not in the files, and
    each adapter tensor of an unknown module, without its partner, of another rank, or with NaN or infinite values.
    """
    where = folder / CONFIG
    _check_fields(where, values, others)
    pairs: dict[str, dict[str, Tensor]] = {}
    modules, wrong = {}, []
    for name, t in tensors.items():
        m = NAME.fullmatch(name)
        path = _path(m["module"]) if m else None
        if m is None or path is None:
            wrong.append(f"{name} belongs to no linear layer of a LLaVA")
            continue
        modules[path] = m["module"].removeprefix("base_model.model.")
        rank = _pattern(values.get("rank_pattern"), modules[path], values["r"])
        if t.ndim != 2 or t.shape[m["which"] == "B"] != rank:
            wrong.append(f"{name} is {tuple(t.shape)}, not of rank {rank}")
        elif not t.isfinite().all():
            wrong.append(f"{name} holds NaN or an infinite value")
        pairs.setdefault(path, {})[m["which"]] = t
    wrong += [f"{path} has only its {next(iter(pair))}" for path, pair in pairs.items() if len(pair) == 1]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} adapter tensors do not fit: {'; '.join(wrong)}")
    scales = {path: _scale(values, module) for path, module in modules.items()}
    return {path: (Leaf.of(pair["A"]), Leaf.of(pair["B"]), scales[path]) for path, pair in pairs.items()}


def _check_fields(where: Path, values: Values, others: Mapping[str, Tensor]) -> None:
    odd = [f"{k}={v!r}" for k, v in values.items() if k in PLAIN and v not in PLAIN[k]]
    known = {*USED, *HARMLESS, *PLAIN}
    odd += [f"{k}={v!r}" for k, v in values.items() if k not in known and v not in (None, False, {}, [], "")]
    if odd:
        raise ValueError(f"{where}: {', '.join(odd)} is more than plain LoRA, and not supported")
    for field in ("r", "lora_alpha"):
        _check_number(where, field, values.get(field))
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(field) or {}, dict):
            raise ValueError(f"{where}: {field}={values[field]!r} is no object of patterns")
        for pattern, value in (values.get(field) or {}).items():
            _check_number(where, f"{field}[{pattern!r}]", value)
            _check_pattern(where, field, pattern)
    kept = [name.rpartition(".")[2] for name in values.get("modules_to_save") or ()]
    if foreign := [name for name in kept if name not in PROJECTOR]:
        raise ValueError(f"{where}: modules_to_save={foreign}: only the projector is supported in addition to adapters")
    if kept and not any(f"{name}." in tensor for tensor in others for name in PROJECTOR):
        raise ValueError(f"{where}: modules_to_save names {', '.join(kept)}, and no tensor of it is in the folder")


def _check_number(where: Path, field: str, value: object) -> None:
    whole = "alpha" not in field
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {field}={value!r}; it must be {'an integer' if whole else 'a number'} above 0")


def _check_pattern(where: Path, field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: {field}: {pattern!r} is no regular expression: {error}") from error


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name. Source: peft get_pattern_key."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matches, default)


def _scale(values: Values, module: str) -> float:
    rank = _pattern(values.get("rank_pattern"), module, values["r"])
    alpha = _pattern(values.get("alpha_pattern"), module, values["lora_alpha"])
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


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
    folder: Path, adapters: Adapters, projector: Mapping[str, Leaf], style: str, archives: tuple[Archive, ...]
) -> None:
    """Write the files of a PEFT folder into the existing `folder`. projector: its leaves by name if it was trained.

    style: "peft" for the names of transformers 5, with the projector among the modules to save; "peft-liuhaotian" for
    those of LLaVA's code, with the projector in a separate file.
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
    modules = {path: names[path].removeprefix("base_model.model.") for path in adapters}
    ranks = {modules[path]: a.shape[0] for path, (a, _, _) in adapters.items()}
    alphas = {modules[path]: scale * a.shape[0] for path, (a, _, scale) in adapters.items()}
    values = _config(ranks, alphas) | {"modules_to_save": list(PROJECTOR[:1]) if saved and not separate else None}
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n")


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The fields of a plain LoRA. A module with another rank or alpha gets a pattern of its whole name."""
    rank, alpha = (max(set(values), key=list(values).count) for values in (ranks.values(), alphas.values()))
    decoder = all(re.fullmatch(DECODER, module) for module in ranks)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        "init_lora_weights": True, "inference_mode": True,
        "target_modules": DECODER if decoder and len(ranks) % 7 == 0 else sorted(ranks),
        "rank_pattern": {re.escape(module): r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(module): x for module, x in alphas.items() if x != alpha},
    }  # fmt: skip
