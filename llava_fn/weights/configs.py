"""The config of each part: from the JSON that stands beside the weights or, for a bare file, from its shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llava_fn.config import Llama, Llava, Vision
from llava_fn.weights.tables import MEGATRON_LLAMA, Rule, Slot

Values = Mapping[str, Any]  # of a config.json
FIXED = {  # fields of HF's and of LLaVA's config that change what is computed, and the value that LLaVA-1.5 has
    "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
}  # fmt: skip


def vision_config(values: Values, feature_layer: int = -2) -> Vision:
    """Ours from HF's CLIPVisionConfig, which leaves out what is at its default (configuration_clip.py)."""
    return Vision(
        image=values.get("image_size", 224),
        patch=values.get("patch_size", 32),
        width=values.get("hidden_size", 768),
        blocks=values.get("num_hidden_layers", 12),
        heads=values.get("num_attention_heads", 12),
        ffn=values.get("intermediate_size", 3072),
        eps=values.get("layer_norm_eps", 1e-5),
        act=values.get("hidden_act", "quick_gelu"),
        feature_layer=feature_layer,
    )


def llama_config(values: Values) -> Llama:
    """Ours from HF's LlamaConfig, which leaves out what is at its default (configuration_llama.py).

    ValueError for a scaled rotary embedding, biases or heads of their own width: nothing here computes those.
    """
    rope = values.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if values.get("rope_scaling") or kind != "default":
        scaling = values.get("rope_scaling") or kind
        raise ValueError(f"this Llama scales its rotary embedding ({scaling}); not supported")
    if values.get("attention_bias") or values.get("mlp_bias"):
        raise ValueError("this Llama has biases; not supported")
    heads = values.get("num_attention_heads", 32)
    config = Llama(
        vocab=values.get("vocab_size", 32000),
        width=values.get("hidden_size", 4096),
        blocks=values.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        ffn=values.get("intermediate_size", 11008),
        eps=values.get("rms_norm_eps", 1e-6),
        theta=rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        tied=values.get("tie_word_embeddings", False),
    )
    if values.get("head_dim") not in (None, config.head):
        raise ValueError(f"this Llama's heads are {values['head_dim']} wide, not width / heads = {config.head}")
    return config


def check_fixed(values: Values) -> None:
    """ValueError listing every field of `FIXED` that has another value: such a model is not a LLaVA-1.5."""
    wrong = [f"{k}={values[k]!r}, not {v!r}" for k, v in FIXED.items() if values.get(k, v) != v]
    if wrong:
        raise ValueError(f"this is not a LLaVA-1.5, which alone is computed here: {'; '.join(wrong)}")


def feature_layer(values: Values) -> int:
    """The hidden state that the projector reads, counted as HF does; -2 where nothing says."""
    layer = values.get("vision_feature_layer", values.get("mm_vision_select_layer", -2))
    if not isinstance(layer, int):
        raise ValueError(f"features of several layers ({layer}) are not supported: LLaVA-1.5 reads one")
    return layer


def _of(rows: list[Rule], path: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Shape of the tensor that holds the leaf `path`. ValueError if it is missing."""
    name = next(row.theirs for row in rows if path in row.ours)
    if name not in tensors:
        raise ValueError(f"{name} is missing, and the sizes of the model cannot be told without it")
    return tuple(tensors[name].shape)


def _count(rows: list[Rule], path: str, tensors: Mapping[str, Tensor]) -> int:
    """Blocks whose leaf `path` is there."""
    return sum(row.theirs in tensors for row in rows for ours in row.ours if ours.endswith(f"/{path}"))


MANY = 1000  # blocks, more than any model has


def vision_of(slot: Slot, tensors: Mapping[str, Tensor], layer: int) -> Vision:
    """The config of a CLIP that brings none, by OpenAI's rule: heads are 64 wide, quick GELU (clip/model.py).

    layer: the hidden state that the projector reads.
    23 blocks are those of ViT-L without the last, which MindSpeed-MM's later converters leave out.
    """
    rows = slot.rows(Llava(vision=Vision(blocks=MANY)))
    width, _, patch, _ = _of(rows, "patch", tensors)
    side = math.isqrt(_of(rows, "positions", tensors)[0] - 1)
    if width % 64:
        raise ValueError(f"the image tower is {width} wide, no multiple of 64: give a folder with its config.json")
    blocks = _count(rows, "wo", tensors)
    ffn = _of(rows, "blocks/0/w_up", tensors)[0]
    return Vision(side * patch, patch, width, 24 if blocks == 23 else blocks, width // 64, ffn, feature_layer=layer)


def llama_of(slot: Slot, tensors: Mapping[str, Tensor]) -> Llama:
    """The config of MindSpeed-MM's Vicuna: Llama-2's heads of 128, its eps and its rotary base.

    ValueError for another layout, whose tensors tell neither heads nor rotary base.
    """
    if slot.rows is not MEGATRON_LLAMA:
        raise ValueError("the tensors of a decoder do not tell its heads: give the folder with its config.json")
    rows = slot.rows(Llava(llama=Llama(blocks=MANY)))
    vocab, width = _of(rows, "embed", tensors)
    if width % 128:
        raise ValueError(f"the decoder is {width} wide, no multiple of 128: give MindSpeed-MM's model.json too")
    heads = width // 128
    kv_heads = (_of(rows, "blocks/0/wq", tensors)[0] // 128 - heads) // 2  # rows are queries, keys and values
    ffn = _of(rows, "blocks/0/w_down", tensors)[1]
    return Llama(vocab, width, _count(rows, "wo", tensors), heads, kv_heads, ffn)


def vision_beside(values: Values) -> Vision | None:
    """The image tower's config out of a config.json of LLaVA or CLIP, or None if it has none."""
    inner = values.get("vision_config", values.get("mm_vision_config", values if "patch_size" in values else None))
    return None if inner is None else vision_config(inner, feature_layer(values))


def llama_beside(values: Values) -> Llama | None:
    """The decoder's config out of a config.json of LLaVA or Llama, or None if there is none."""
    inner = values.get("text_config", values)
    kind = inner.get("model_type", "llama")
    if kind not in ("llama", "llava", "llava_llama"):
        raise ValueError(f"the decoder is a {kind}, not a Llama; not supported")
    return llama_config(inner) if inner else None
