"""The config of each part of a model: from the config.json of a folder, or from the shapes of a file's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llava_fn.config import Llama, Llava, Vision
from llava_fn.weights.tables import Rule, Slot, megatron_llama

Values = Mapping[str, Any]  # of a config.json
ANY = Llava(Vision(blocks=1000), Llama(blocks=1000))  # more blocks than any model, for the rules of all
FIXED = {  # fields of HF's and of LLaVA's configs that change the computation, and their values in LLaVA-1.5
    "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
    "mm_patch_merge_type": "flat", "s2": False,
}  # fmt: skip
VISION_SIZES = {  # our name of a size -> HF's name and default (configuration_clip.py)
    "image": ("image_size", 224), "patch": ("patch_size", 32), "width": ("hidden_size", 768),
    "blocks": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 12), "ffn": ("intermediate_size", 3072),
}  # fmt: skip
LLAMA_SIZES = {  # likewise (configuration_llama.py)
    "vocab": ("vocab_size", 32000), "width": ("hidden_size", 4096), "blocks": ("num_hidden_layers", 32),
    "heads": ("num_attention_heads", 32), "ffn": ("intermediate_size", 11008),
}  # fmt: skip


def _sizes(values: Values, names: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """Our name -> size. ValueError unless each size is a whole number above 0."""
    sizes = {ours: values.get(theirs, default) for ours, (theirs, default) in names.items()}
    for ours, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{names[ours][0]}={value!r} in config.json; it must be a whole number above 0")
    return sizes


def vision_config(values: Values, feature_layer: int = -2) -> Vision:
    """Our config from HF's CLIPVisionConfig, which omits fields at their defaults."""
    return Vision(
        **_sizes(values, VISION_SIZES),
        eps=values.get("layer_norm_eps", 1e-5),
        act=values.get("hidden_act", "quick_gelu"),
        feature_layer=feature_layer,
    )


def llama_config(values: Values) -> Llama:
    """Our config from HF's LlamaConfig, which omits fields at their defaults.

    ValueError for a size that is no whole number above 0, and for what is not implemented: a scaled rotary embedding,
    biases, an activation other than SiLU, a head width that is not width / heads.
    """
    rope, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    kinds = [x.get("rope_type", x.get("type", "default")) for x in (rope, scaling) if isinstance(x, Mapping)]
    if not isinstance(scaling, Mapping) or set(kinds) != {"default"}:
        raise ValueError(f"this Llama scales its rotary embedding ({scaling or rope}); not supported")
    if values.get("attention_bias") or values.get("mlp_bias"):
        raise ValueError("this Llama has biases; not supported")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"this Llama's activation is {values['hidden_act']}, not silu; not supported")
    sizes = _sizes(values, LLAMA_SIZES)
    config = Llama(
        **sizes,
        kv_heads=values.get("num_key_value_heads") or sizes["heads"],
        eps=values.get("rms_norm_eps", 1e-6),
        theta=rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        tied=values.get("tie_word_embeddings", False),
    )
    if values.get("head_dim") not in (None, config.head):
        raise ValueError(f"this Llama's heads are {values['head_dim']} wide, not width / heads = {config.head}")
    return config


def check_fixed(values: Values) -> None:
    """ValueError for quantised weights, for an image tower other than CLIP, and listing all fields unlike `FIXED`."""
    if quantised := values.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ValueError(f"the weights are quantised ({method}); give the original ones, in 16 or 32 bits")
    tower = values.get("mm_vision_tower")
    if tower and "clip" not in str(tower).lower():
        raise ValueError(f"mm_vision_tower={tower!r} is no CLIP, the only image tower supported")
    wrong = [f"{k}={values[k]!r}, not {v!r}" for k, v in FIXED.items() if values.get(k, v) != v]
    if wrong:
        raise ValueError(f"this is not a LLaVA-1.5, the only model supported: {'; '.join(wrong)}")


def feature_layer(values: Values) -> int:
    """The hidden state that the projector reads, counted as in HF; -2 if no field names one."""
    layer = values.get("vision_feature_layer", values.get("mm_vision_select_layer", -2))
    if not isinstance(layer, int):
        raise ValueError(f"features of several layers ({layer}) are not supported: LLaVA-1.5 reads one")
    return layer


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


def vision_in(values: Values) -> Vision | None:
    """The image tower's config from a config.json of LLaVA or CLIP; None if it holds none."""
    inner = values.get("vision_config", values.get("mm_vision_config", values if "patch_size" in values else None))
    return None if inner is None else vision_config(inner, feature_layer(values))


def llama_in(values: Values) -> Llama | None:
    """The decoder's config from a config.json of LLaVA or Llama; None if it is empty."""
    inner = values.get("text_config", values)
    kind = inner.get("model_type", "llama")
    if kind not in ("llama", "llava", "llava_llama"):
        raise ValueError(f"the decoder is a {kind}, not a Llama; not supported")
    return llama_config(inner) if inner else None
