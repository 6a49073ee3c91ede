"""The config of each part of a model: from the config.json of a folder, or from the shapes of a file's tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_fn import fields
from llava_fn.config import MOST_BLOCKS, Llama, Llava, Vision
from llava_fn.weights import hub
from llava_fn.weights.tables import Rule, Slot, megatron_llama

Values = Mapping[str, Any]  # of a config.json
ANY = Llava(Vision(blocks=MOST_BLOCKS), Llama(blocks=MOST_BLOCKS))  # for the rules of all models
TABLES = {  # kind of config -> its table
    "clip": hub.CLIP, "clip_vision_model": hub.VISION, "llava": hub.LLAVA, "llava_llama": hub.LLAVA_LLAMA,
}  # fmt: skip


@dataclass(frozen=True)
class Stated:
    """What a config.json says of a model; None for what it does not say."""

    vision: Vision | None = None
    llama: Llama | None = None
    layer: int = -2  # the hidden state of the image tower that the projector reads, counted as in HF
    image_row: int | None = None  # first row of the vocabulary that is no text: llava-hf's <image>, <pad> and padding
    image_mode: str | None = None
    tower: str | None = None  # name of the image tower, in LLaVA's own code
    tower_trained: bool = False  # the image tower is not the published one
    tokens: Values = dataclasses.field(default_factory=dict)  # "bos_token_id", "eos_token_id" -> one or several ids


def kind_of(values: Values) -> str:
    """The key of `TABLES` for a config.json: its model_type, or what its fields look like."""
    kind = values.get("model_type")
    if kind == "llava" and "text_config" not in values:
        return "llava_llama"  # as LLaVA's code called it until 2024
    if kind is None and ("text_config" in values or "patch_size" in values):
        return "llava" if "text_config" in values else "clip_vision_model"
    return kind if isinstance(kind, str) and kind in TABLES else "llava_llama"


def stated(where: Path | str, values: Values) -> Stated:
    """What a config.json says; of a file without one (no fields), nothing. where: the file, in errors.

    ValueError names each field that is unknown, malformed, or not computed here, with its value.
    """
    if not values:
        return Stated()
    kind = kind_of(values)
    own = fields.read(where, _merged(values) if kind == "clip" else values, TABLES[kind])
    try:
        return READERS[kind](own)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _merged(values: Values) -> Values:
    """A CLIP's config in which vision_config_dict overrides vision_config, as in transformers."""
    inner, older = values.get("vision_config", {}), values.get("vision_config_dict")
    if isinstance(inner, Mapping) and isinstance(older, Mapping):
        return {**values, "vision_config": {**inner, **older}}
    return values


def _vision(own: Values, layer: int = -2) -> Vision:
    """Our config from the used fields of HF's CLIPVisionConfig."""
    return Vision(
        image=own["image_size"], patch=own["patch_size"], width=own["hidden_size"], blocks=own["num_hidden_layers"],
        heads=own["num_attention_heads"], ffn=own["intermediate_size"], eps=own["layer_norm_eps"],
        act=own["hidden_act"], feature_layer=layer,
    )  # fmt: skip


def _llama(own: Values) -> Llama:
    """Our config from the used fields of HF's LlamaConfig. ValueError for what follows from several fields."""
    ropes = {name: own[name] or {} for name in ("rope_parameters", "rope_scaling")}
    bases = {f"{name}.rope_theta": rope.get("rope_theta") for name, rope in ropes.items()}
    theta = _one({"rope_theta": own["rope_theta"], **bases})
    llama = Llama(
        vocab=own["vocab_size"], width=own["hidden_size"], blocks=own["num_hidden_layers"],
        heads=own["num_attention_heads"], kv_heads=own["num_key_value_heads"] or own["num_attention_heads"],
        ffn=own["intermediate_size"], eps=own["rms_norm_eps"], theta=10000.0 if theta is None else theta,
        tied=own["tie_word_embeddings"],
    )  # fmt: skip
    if own["head_dim"] not in (None, llama.head):
        raise ValueError(
            f"head_dim={own['head_dim']}; only hidden_size / num_attention_heads = {llama.head} works here"
        )
    return llama


def _one(values: Values) -> Any:
    """The value of fields that say the same, without null. ValueError if two differ."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{', '.join(f'{k}={v}' for k, v in given.items())} disagree; remove the wrong one")
    return next(iter(given.values()), None)


def _tokens(own: Values) -> Values:
    return {name: own[name] for name in ("bos_token_id", "eos_token_id")}


def _llava(own: Values) -> Stated:
    layer, text = own["vision_feature_layer"], own["text_config"]
    row = _one({name: own[name] for name in ("image_token_index", "image_token_id")})
    return Stated(_vision(own["vision_config"], layer), _llama(text), layer, row, tokens=_tokens(text))


def _llava_llama(own: Values) -> Stated:
    layer, inner = own["mm_vision_select_layer"], own["mm_vision_config"]
    vision = None if inner is None else _vision(inner, layer)
    trained = bool(own["unfreeze_mm_vision_tower"])
    tower, tokens = own["mm_vision_tower"], _tokens(own)
    return Stated(vision, _llama(own), layer, None, own["image_aspect_ratio"], tower, trained, tokens)


READERS = {  # kind of config -> from its used fields to what it says
    "clip": lambda own: Stated(_vision(own["vision_config"])), "clip_vision_model": lambda own: Stated(_vision(own)),
    "llava": _llava, "llava_llama": _llava_llama,
}  # fmt: skip


def _shape(rules: list[Rule], path: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of the tensor that holds the leaf `path`. ValueError if it is missing."""
    name = next(rule.theirs for rule in rules if path in rule.ours)
    if name not in tensors:
        raise ValueError(f"{name} is missing, from which the sizes of the model follow")
    return tuple(tensors[name].shape)


def _blocks(rules: list[Rule], tensors: Mapping[str, Tensor]) -> int:
    """The number of blocks, counted by their leaves wo."""
    return sum(rule.theirs in tensors for rule in rules if rule.ours[0].endswith("/wo"))


def vision_from_shapes(slot: Slot, tensors: Mapping[str, Tensor], layer: int) -> Vision:
    """The config of a CLIP without config.json, by OpenAI's rule: heads of 64, quick GELU (clip/model.py).

    layer: the hidden state that the projector reads.
    23 blocks stand for ViT-L's 24: MindSpeed-MM's later converters omit the last, which LLaVA does not read.
    """
    rules = slot.rules(ANY)
    width, _, patch, _ = _shape(rules, "patch", tensors)
    side = math.isqrt(_shape(rules, "positions", tensors)[0] - 1)
    if width % 64:
        raise ValueError(f"the image tower is {width} wide, no multiple of 64: give a folder with its config.json")
    blocks, ffn = _blocks(rules, tensors), _shape(rules, "blocks/0/w_up", tensors)[0]
    return Vision(side * patch, patch, width, 24 if blocks == 23 else blocks, width // 64, ffn, feature_layer=layer)


def llama_from_shapes(slot: Slot, tensors: Mapping[str, Tensor]) -> Llama:
    """The config of MindSpeed-MM's Vicuna, with Llama 2's heads of 128, eps and rotary base.

    ValueError for another layout, whose shapes give neither heads nor rotary base.
    """
    if slot.rules is not megatron_llama:
        raise ValueError("the shapes of a decoder do not give its heads: give the folder with its config.json")
    rules = slot.rules(ANY)
    vocab, width = _shape(rules, "embed", tensors)
    if width % 128:
        raise ValueError(f"the decoder is {width} wide, no multiple of 128: give MindSpeed-MM's model.json too")
    heads = width // 128
    kv_heads = (_shape(rules, "blocks/0/wq", tensors)[0] // 128 - heads) // 2  # the rows are q, k and v
    ffn = _shape(rules, "blocks/0/w_down", tensors)[1]
    return Llama(vocab, width, _blocks(rules, tensors), heads, kv_heads, ffn)
