"""PEFT's adapter_config.json, in and out: what each field means for W + scale B A (peft/tuners/lora/config.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
USED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
HARMLESS = (  # none changes what the tensors mean, whatever its value
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
)  # fmt: skip
PLAIN = {  # fields that are harmless with one of these values
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),  # others change the base
}
UNSET = (None, False, {}, [], "")  # every other field is harmless with one of these
KINDS = {
    "use_rslora": (bool, "true or false"),
    "rank_pattern": (dict, "an object of patterns"),
    "alpha_pattern": (dict, "an object of patterns"),
    "modules_to_save": (list, "a list of names"),
    "base_model_name_or_path": (str, "a name"),
}
ADVICE = "merge the adapters with PEFT (merge_and_unload, then save_pretrained), and convert the merged model"
PROJECTOR = ("multi_modal_projector", "mm_projector", "linear_1", "linear_2")
LAYER = re.compile(r"model\.(language_model\.)?layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)")

Values = Mapping[str, Any]


def check(where: Path, values: Values) -> None:
    """ValueError names the fields that W + scale B A does not express, or the first one that is malformed."""
    odd = [f"{k}={v!r}" for k, v in values.items() if k not in (*USED, *HARMLESS) and v not in PLAIN.get(k, UNSET)]
    if odd:
        raise ValueError(f"{where}: {', '.join(odd)} is more than plain LoRA, and not supported; {ADVICE}")
    for field, (kind, noun) in KINDS.items():
        if values.get(field) is not None and not isinstance(values[field], kind):
            raise ValueError(f"{where}: {field}={values[field]!r}; it must be {noun}")
    for field in ("r", "lora_alpha"):
        _check_number(where, field, values.get(field))
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (values.get(field) or {}).items():
            _check_number(where, f"{field}[{pattern!r}]", value)
            _check_pattern(where, field, pattern)
    if foreign := [name for name in values.get("modules_to_save") or () if _last(name) not in PROJECTOR]:
        raise ValueError(
            f"{where}: modules_to_save={foreign}: only the projector is supported in addition to adapters; {ADVICE}"
        )


def _last(name: object) -> str:
    return str(name).rpartition(".")[2]


def saved(values: Values) -> list[str]:
    """The last names of the modules that were trained whole, all of the projector."""
    return [_last(name) for name in values.get("modules_to_save") or ()]


def _check_number(where: Path, field: str, value: object) -> None:
    whole = "alpha" not in field
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {field}={value!r}; it must be {'an integer' if whole else 'a number'} above 0")


def _check_pattern(where: Path, field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: {field}: {pattern!r} is no regular expression: {error}") from error


def rank(values: Values, module: str) -> int:
    """The rank of a module's adapter."""
    return _of(values.get("rank_pattern"), module, values["r"])


def scale(values: Values, module: str) -> float:
    """What B A is multiplied by."""
    r = rank(values, module)
    return _of(values.get("alpha_pattern"), module, values["lora_alpha"]) / (
        math.sqrt(r) if values.get("use_rslora") else r
    )


def _of(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name. Source: peft get_pattern_key."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def written(adapters: Mapping[str, tuple[int, float]], blocks: int | None) -> dict[str, Any]:
    """The fields of plain LoRA. adapters: module -> rank and scale. blocks: of the decoder, if it is known.

    A rank or alpha of a module's own becomes a pattern of its whole name.
    """
    ranks = {module: r for module, (r, _) in adapters.items()}
    alphas = {module: float(f"{x * r:.12g}") for module, (r, x) in adapters.items()}
    r, alpha = (max(set(values), key=list(values).count) for values in (ranks.values(), alphas.values()))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": r, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        "init_lora_weights": True, "inference_mode": True, "target_modules": _targets(set(adapters), blocks),
        "rank_pattern": {re.escape(module): own for module, own in ranks.items() if own != r},
        "alpha_pattern": {re.escape(module): own for module, own in alphas.items() if own != alpha},
    }  # fmt: skip


def _targets(modules: set[str], blocks: int | None) -> str | list[str]:
    """An expression, if every block of the decoder has the same adapters and nothing else has any; else all names.

    The usual suffixes (q_proj, v_proj) would also match CLIP's.
    """
    found = [m for module in modules if (m := LAYER.fullmatch(module))]
    kinds = list(dict.fromkeys(m[3] for m in sorted(found, key=lambda m: _ORDER.index(m[3]))))
    inner = {m[1] or "" for m in found}
    if len(found) < len(modules) or len(inner) > 1 or blocks is None or len(found) != blocks * len(kinds):
        return sorted(modules)
    before = r".*language_model\.layers" if inner == {"language_model."} else r"model\.layers"
    return rf"{before}\.\d+\.({'|'.join(kind.replace('.', chr(92) + '.') for kind in kinds)})"


_ORDER = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
