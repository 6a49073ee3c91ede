"""Names of parameters in Hugging Face's layouts of CLIP, Llama and LLaVA, and the tables that map them to paths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from tensordict import TensorDict
from torch import Tensor

from llava_fn import spec as specs

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
