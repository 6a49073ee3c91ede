"""PEFT's adapter_config.json, in and out: what each field means for W + scale B A (peft/tuners/lora/config.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_fn import fields
from llava_fn.fields import OTHER, Field, flag, free, inside, number, only, text, texts, whole

CONFIG = "adapter_config.json"
ADVICE = "merge the adapters with PEFT (merge_and_unload, then save_pretrained), and convert the merged model"
PROJECTOR = ("multi_modal_projector", "mm_projector", "linear_1", "linear_2")
LAYER = re.compile(r"model\.(language_model\.)?layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)")

Values = Mapping[str, Any]  # the used fields


def _plain(*values: Any) -> Field:
    return replace(only(*values), wanted=f"more than plain LoRA, and not supported; {ADVICE}")


TABLE: fields.Table = {
    "r": whole(), "lora_alpha": number(), "use_rslora": flag(None), "modules_to_save": texts(None),
    "rank_pattern": inside({OTHER: whole()}), "alpha_pattern": inside({OTHER: number()}),
    "base_model_name_or_path": text(None),
    **free(  # none changes what the tensors mean, whatever its value
        "auto_mapping ensure_weight_tying eva_config exclude_modules inference_mode layers_pattern layers_to_transform "
        "lora_dropout megatron_core peft_version qalora_group_size revision runtime_config target_modules task_type "
        "velora_config"
    ),
    "peft_type": _plain("LORA"), "bias": _plain("none", None),
    "init_lora_weights": _plain(True, False, None, "gaussian", "orthogonal", "eva", "mica"),  # others change the base
    OTHER: _plain(None, False, {}, [], ""),  # each of PEFT's other fields adds something if it is set
}  # fmt: skip


def read(where: Path, values: Any) -> Values:
    """The used fields of adapter_config.json. ValueError names each that is malformed or more than W + scale B A."""
    own = fields.read(where, values, TABLE)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in own[field] or ():
            _check_pattern(where, field, pattern)
    if foreign := [name for name in own["modules_to_save"] or () if _last(name) not in PROJECTOR]:
        raise ValueError(
            f"{where}: modules_to_save={foreign}: only the projector is supported in addition to adapters; {ADVICE}"
        )
    return own


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def saved(values: Values) -> list[str]:
    """The last names of the modules that were trained whole, all of the projector."""
    return [_last(name) for name in values["modules_to_save"] or ()]


def _check_pattern(where: Path, field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: {field}: {pattern!r} is no regular expression: {error}") from error


def rank(values: Values, module: str) -> int:
    """The rank of a module's adapter."""
    return _of(values["rank_pattern"], module, values["r"])


def scale(values: Values, module: str) -> float:
    """What B A is multiplied by."""
    r = rank(values, module)
    return _of(values["alpha_pattern"], module, values["lora_alpha"]) / (math.sqrt(r) if values["use_rslora"] else r)


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
