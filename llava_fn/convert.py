"""Hugging Face's layouts of CLIP, Llama and LLaVA: configs to ours, and tables that map names of tensors to paths."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, vit
from llava_fn import spec as specs
from llava_fn.config import Llama, Vision

Table = Mapping[str, str]  # path of a leaf, joined by "/" -> name in the other layout

VIT_BLOCK = {
    "norm1_g": "layer_norm1.weight", "norm1_b": "layer_norm1.bias",
    "wq": "self_attn.q_proj.weight", "bq": "self_attn.q_proj.bias",
    "wk": "self_attn.k_proj.weight", "bk": "self_attn.k_proj.bias",
    "wv": "self_attn.v_proj.weight", "bv": "self_attn.v_proj.bias",
    "wo": "self_attn.out_proj.weight", "bo": "self_attn.out_proj.bias",
    "norm2_g": "layer_norm2.weight", "norm2_b": "layer_norm2.bias",
    "w_up": "mlp.fc1.weight", "b_up": "mlp.fc1.bias", "w_down": "mlp.fc2.weight", "b_down": "mlp.fc2.bias",
}  # fmt: skip
VIT = {
    "patch": "embeddings.patch_embedding.weight",
    "cls": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    "norm_g": "pre_layrnorm.weight",  # CLIP's own spelling
    "norm_b": "pre_layrnorm.bias",
}
PROJECTOR = {"w1": "linear_1.weight", "b1": "linear_1.bias", "w2": "linear_2.weight", "b2": "linear_2.bias"}
LLAMA_BLOCK = {
    "norm1": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight", "wk": "self_attn.k_proj.weight", "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "norm2": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight", "w_up": "mlp.up_proj.weight", "w_down": "mlp.down_proj.weight",
}  # fmt: skip
LLAMA = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def _rows(top: Table, blocks: Table, count: int, where: str) -> Iterator[tuple[str, str]]:
    yield from top.items()
    for i in range(count):
        yield from ((f"blocks/{i}/{path}", f"{where}.{i}.{name}") for path, name in blocks.items())


def vit_names(blocks: int) -> dict[str, str]:
    """Table of the image tower in HF CLIPVisionModel of transformers 5."""
    return dict(_rows(VIT, VIT_BLOCK, blocks, "encoder.layers"))


def llama_names(blocks: int, tied: bool) -> dict[str, str]:
    """Table of the decoder in HF LlamaForCausalLM."""
    top = {path: name for path, name in LLAMA.items() if not (tied and path == "head")}
    return dict(_rows(top, LLAMA_BLOCK, blocks, "model.layers"))


def llava_names(vit_blocks: int, llama_blocks: int, tied: bool = False) -> dict[str, str]:
    """Table of HF LlavaForConditionalGeneration of transformers 5, in memory."""
    language = {p: n.replace("model.", "model.language_model.", 1) for p, n in llama_names(llama_blocks, tied).items()}
    return (
        {f"vision/{p}": f"model.vision_tower.{n}" for p, n in vit_names(vit_blocks).items()}
        | {f"projector/{p}": f"model.multi_modal_projector.{n}" for p, n in PROJECTOR.items()}
        | {f"llama/{p}": n for p, n in language.items()}
    )


def read(tensors: Mapping[str, Tensor], names: Table, spec: specs.Spec) -> TensorDict:
    """The tree that `spec` declares, out of tensors named as in the table; nothing is copied.

    A tensor of another shape but the same size is a flattened convolution and is viewed. ValueError lists every
    missing tensor and every one of a wrong size. Tensors that no row of the table names are left alone.
    """
    missing = [names["/".join(path)] for path, _ in specs.leaves(spec) if names["/".join(path)] not in tensors]
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing: {', '.join(missing)}")
    wrong = [
        f"{names['/'.join(path)]} is {tuple(tensors[names['/'.join(path)]].shape)}, the config wants {p.shape}"
        for path, p in specs.leaves(spec)
        if tensors[names["/".join(path)]].numel() != math.prod(p.shape)
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors have the wrong shape: {'; '.join(wrong)}")
    return specs.build(spec, lambda path, p: tensors[names["/".join(path)]].reshape(p.shape))


def vision_config(values: Mapping[str, Any]) -> Vision:
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
    )


def llama_config(values: Mapping[str, Any]) -> Llama:
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


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an HF folder: safetensors if there are any, else .bin files, which are never unpickled.

    ValueError if there are none, if two files hold one name, or if the index names a file that is missing.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors and no pytorch_model*.bin; fetch the weights into it")
    for index in folder.glob("*.index.json"):
        absent = set(json.loads(index.read_text())["weight_map"].values()) - {p.name for p in folder.iterdir()}
        if absent:
            raise ValueError(f"{index} names files that are missing: {', '.join(sorted(absent))}")
    found: dict[str, Tensor] = {}
    for path in files:
        part = _tensors_of(path)
        twice = sorted(found.keys() & part.keys())
        if twice:
            raise ValueError(f"{path} repeats {', '.join(twice)} of another file in {folder}")
        found |= part
    return found


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors: {error}") from error


# What an image tower's file may hold that LLaVA never reads; blocks after the last one that runs are the other part.
CLIP_UNUSED = re.compile(r"text_model\.|(visual|text)_projection\.|logit_scale$|post_layernorm\.|.*position_ids$")
LLAMA_UNUSED = re.compile(r".*rotary_emb\.inv_freq$")


def read_clip(folder: Path) -> tuple[Vision, TensorDict]:
    """The image tower of an HF CLIP folder (CLIPModel or CLIPVisionModel)."""
    values = json.loads((folder / "config.json").read_text())
    c = vision_config(values.get("vision_config", values))
    found = {n.removeprefix("vision_model."): t for n, t in tensors(folder).items()}
    late = tuple(f"encoder.layers.{i}." for i in range(c.used, c.blocks))
    wanted = {n: t for n, t in found.items() if not CLIP_UNUSED.match(n) and not n.startswith(late)}
    return c, read_all(wanted, vit_names(c.used), vit.spec(c), folder)


def read_llama(folder: Path) -> tuple[Llama, TensorDict]:
    """The decoder of an HF Llama folder."""
    c = llama_config(json.loads((folder / "config.json").read_text()))
    found = {n: t for n, t in tensors(folder).items() if not LLAMA_UNUSED.match(n)}
    if c.tied:
        found.pop(LLAMA["head"], None)
    return c, read_all(found, llama_names(c.blocks, c.tied), llama.spec(c), folder)


def read_all(found: Mapping[str, Tensor], names: Table, spec: specs.Spec, folder: Path) -> TensorDict:
    """As `read`, and every tensor must have its place. ValueError names the folder and what does not fit."""
    extra = sorted(found.keys() - set(names.values()))
    if extra:
        raise ValueError(f"{folder} holds {len(extra)} tensors that have no place in this model: {', '.join(extra)}")
    try:
        return read(found, names, spec)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
