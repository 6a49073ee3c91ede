"""The names that public layouts give to the tensors of CLIP, the projector and Llama.

A rule maps one tensor of a layout to the leaves of ours that it consists of. A part's rules share a prefix, which
stands in the part's slot of the layout.
Sources: HF modeling_clip.py, modeling_llama.py, modeling_llava.py; OpenAI clip/model.py; LLaVA llava_arch.py;
Megatron-LM transformer_layer.py and MindSpeed-MM clip_vit_model.py, multimodal_projector.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llava_fn.config import Llava
from llava_fn.weights.reshape import CONV, PAIR, SAME, STACK, TOKEN, Reshape, interleave


@dataclass(frozen=True)
class Rule:
    """One tensor of a layout: its name after the prefix, our leaves in it, and how they are joined and split."""

    theirs: str
    ours: tuple[str, ...]
    reshape: Reshape = SAME


def _pairs(theirs: str, weight: str, bias: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", (weight,)), Rule(f"{theirs}.bias", (bias,))]


def _blocks(block: list[Rule], count: int, prefix: str) -> list[Rule]:
    """The rules of a block, repeated for `count` blocks."""
    return [
        Rule(f"{prefix}.{i}.{r.theirs}", tuple(f"blocks/{i}/{leaf}" for leaf in r.ours), r.reshape)
        for i in range(count)
        for r in block
    ]


def hf_vision(m: Llava) -> list[Rule]:
    """HF CLIPVisionModel, including the last blocks and the norm, which LLaVA does not read."""
    block = [
        *_pairs("layer_norm1", "norm1_g", "norm1_b"),
        *_pairs("self_attn.q_proj", "wq", "bq"), *_pairs("self_attn.k_proj", "wk", "bk"),
        *_pairs("self_attn.v_proj", "wv", "bv"), *_pairs("self_attn.out_proj", "wo", "bo"),
        *_pairs("layer_norm2", "norm2_g", "norm2_b"),
        *_pairs("mlp.fc1", "w_up", "b_up"), *_pairs("mlp.fc2", "w_down", "b_down"),
    ]  # fmt: skip
    return [
        Rule("embeddings.patch_embedding.weight", ("patch",), CONV),
        Rule("embeddings.class_embedding", ("cls",)),
        Rule("embeddings.position_embedding.weight", ("positions",)),
        *_pairs("pre_layrnorm", "norm_g", "norm_b"),  # HF's own spelling
        *_blocks(block, m.vision.blocks, "encoder.layers"),
        *_pairs("post_layernorm", "post_g", "post_b"),
    ]


def openai_vision(m: Llava) -> list[Rule]:
    """OpenAI's VisionTransformer."""
    block = [
        *_pairs("ln_1", "norm1_g", "norm1_b"),
        Rule("attn.in_proj_weight", ("wq", "wk", "wv"), STACK), Rule("attn.in_proj_bias", ("bq", "bk", "bv"), STACK),
        *_pairs("attn.out_proj", "wo", "bo"),
        *_pairs("ln_2", "norm2_g", "norm2_b"),
        *_pairs("mlp.c_fc", "w_up", "b_up"), *_pairs("mlp.c_proj", "w_down", "b_down"),
    ]  # fmt: skip
    return [
        Rule("conv1.weight", ("patch",), CONV),
        Rule("class_embedding", ("cls",)),
        Rule("positional_embedding", ("positions",)),
        *_pairs("ln_pre", "norm_g", "norm_b"),
        *_blocks(block, m.vision.blocks, "transformer.resblocks"),
        *_pairs("ln_post", "post_g", "post_b"),
    ]


def megatron_vision(m: Llava) -> list[Rule]:
    """MindSpeed-MM's CLIPViT, which has no norm after the blocks."""
    qkv = interleave(m.vision.heads, m.vision.width // m.vision.heads)
    block = [
        *_pairs("input_layernorm", "norm1_g", "norm1_b"),
        Rule("self_attention.linear_qkv.weight", ("wq", "wk", "wv"), qkv),
        Rule("self_attention.linear_qkv.bias", ("bq", "bk", "bv"), qkv),
        *_pairs("self_attention.linear_proj", "wo", "bo"),
        *_pairs("pre_mlp_layernorm", "norm2_g", "norm2_b"),
        *_pairs("mlp.linear_fc1", "w_up", "b_up"), *_pairs("mlp.linear_fc2", "w_down", "b_down"),
    ]  # fmt: skip
    return [
        Rule("conv1.weight", ("patch",), CONV),
        Rule("class_token", ("cls",), TOKEN),
        Rule("position_embeddings.weight", ("positions",)),
        *_pairs("ln_pre", "norm_g", "norm_b"),
        *_blocks(block, m.vision.blocks, "decoder.layers"),
    ]


def hf_llama(m: Llava) -> list[Rule]:
    """HF LlamaModel."""
    block = [
        Rule("input_layernorm.weight", ("norm1",)),
        Rule("self_attn.q_proj.weight", ("wq",)), Rule("self_attn.k_proj.weight", ("wk",)),
        Rule("self_attn.v_proj.weight", ("wv",)), Rule("self_attn.o_proj.weight", ("wo",)),
        Rule("post_attention_layernorm.weight", ("norm2",)),
        Rule("mlp.gate_proj.weight", ("w_gate",)), Rule("mlp.up_proj.weight", ("w_up",)),
        Rule("mlp.down_proj.weight", ("w_down",)),
    ]  # fmt: skip
    return [
        Rule("embed_tokens.weight", ("embed",)),
        *_blocks(block, m.llama.blocks, "layers"),
        Rule("norm.weight", ("norm",)),
    ]


def hf_head(_: Llava) -> list[Rule]:
    """The head of HF LlamaForCausalLM."""
    return [Rule("lm_head.weight", ("head",))]


def megatron_llama(m: Llava) -> list[Rule]:
    """Megatron-LM's GPTModel with a gated MLP and no biases."""
    block = [
        Rule("input_layernorm.weight", ("norm1",)),
        Rule("self_attention.linear_qkv.weight", ("wq", "wk", "wv"), interleave(m.llama.kv_heads, m.llama.head)),
        Rule("self_attention.linear_proj.weight", ("wo",)),
        Rule("pre_mlp_layernorm.weight", ("norm2",)),
        Rule("mlp.linear_fc1.weight", ("w_gate", "w_up"), PAIR), Rule("mlp.linear_fc2.weight", ("w_down",)),
    ]  # fmt: skip
    return [
        Rule("embedding.word_embeddings.weight", ("embed",)),
        *_blocks(block, m.llama.blocks, "decoder.layers"),
        Rule("decoder.final_layernorm.weight", ("norm",)),
        Rule("output_layer.weight", ("head",)),
    ]


def projector(first: str, second: str) -> Callable[[Llava], list[Rule]]:
    """The rules of the two linears under the names that a layout gives them."""
    return lambda _: [*_pairs(first, "w1", "b1"), *_pairs(second, "w2", "b2")]


@dataclass(frozen=True)
class Slot:
    """One part of a model in a layout: the prefix of its names, and the rules of their rest.

    The prefix is a regular expression in a layout that is read (`LAYOUTS`), and plain text in one that is written.
    """

    part: str
    prefix: str
    rules: Callable[[Llava], list[Rule]]


@dataclass(frozen=True)
class Layout:
    """A layout that is read. mark: matches a name by which it is recognised; ignored: matches names to skip."""

    name: str
    mark: str
    slots: tuple[Slot, ...]
    ignored: str


OPENAI = Layout(
    "OpenAI CLIP",
    r"visual\.conv1\.weight",
    (Slot("vision", r"visual\.", openai_vision),),
    r"visual\.proj|transformer\.resblocks\..*|token_embedding\.weight|positional_embedding|ln_final\.(weight|bias)"
    r"|text_projection|logit_scale|input_resolution|context_length|vocab_size",
)
_EXTRA = r"(.*\.)?_extra_state"  # Transformer Engine writes these, empty
MEGATRON = (
    Layout(
        "MindSpeed-MM VLModel",
        r"(text_decoder|image_encoder)\..*",
        (
            Slot("vision", r"image_encoder\.encoder\.", megatron_vision),
            Slot("projector", r"image_encoder\.projector\.encoder\.", projector("linear_fc1", "linear_fc2")),
            Slot("llama", r"text_decoder\.", megatron_llama),
        ),
        _EXTRA,
    ),
    Layout("MindSpeed-MM CLIP", "class_token", (Slot("vision", "", megatron_vision),), _EXTRA),
    Layout("MindSpeed-MM Vicuna", r"embedding\.word_embeddings\.weight", (Slot("llama", "", megatron_llama),), _EXTRA),
    Layout(
        "MindSpeed-MM projector",
        r"encoder\.linear_fc1\.weight",
        (Slot("projector", r"encoder\.", projector("linear_fc1", "linear_fc2")),),
        _EXTRA,
    ),
)
_PEFT = r"(base_model\.model\.)?"
HF = Layout(  # CLIPModel, LlamaForCausalLM, all versions of HF's LLaVA, and liuhaotian's
    "Hugging Face or liuhaotian",
    r".*(patch_embedding|embed_tokens|multi_modal_projector|mm_projector)\..*",
    (
        Slot(
            "vision",
            _PEFT + r"((model\.)?vision_tower\.(vision_tower\.)?)?(vision_model\.)?"
            r"(?=embeddings\.|pre_layrnorm\.|encoder\.|post_layernorm\.)",
            hf_vision,
        ),
        Slot("projector", _PEFT + r"(model\.)?multi_modal_projector\.", projector("linear_1", "linear_2")),
        Slot("projector", _PEFT + r"(model\.)?mm_projector\.", projector("0", "2")),
        Slot(
            "llama",
            _PEFT + r"(model\.language_model\.|language_model\.model\.|model\.)(?=embed_tokens\.|layers\.|norm\.)"
            r"|(language_model\.)?(?=lm_head\.)",
            lambda m: hf_llama(m) + hf_head(m),
        ),
    ),
    r".*\.position_ids|.*rotary_emb\.inv_freq|text_model\..*|(visual|text)_projection\.weight|logit_scale",
)
LAYOUTS = (OPENAI, *MEGATRON, HF)
WRITTEN = {  # layouts of whole models that are written
    "llava-hf": (
        Slot("vision", "vision_tower.vision_model.", hf_vision),
        Slot("projector", "multi_modal_projector.", projector("linear_1", "linear_2")),
        Slot("llama", "language_model.model.", hf_llama),
        Slot("llama", "language_model.", hf_head),
    ),
    "liuhaotian": (
        Slot("vision", "model.vision_tower.vision_tower.vision_model.", hf_vision),
        Slot("projector", "model.mm_projector.", projector("0", "2")),
        Slot("llama", "model.", hf_llama),
        Slot("llama", "", hf_head),
    ),
    "mm_projector": (Slot("projector", "model.mm_projector.", projector("0", "2")),),
}
PEFT = {  # layouts of adapters that are written
    "peft": (
        Slot("vision", "base_model.model.model.vision_tower.", hf_vision),
        Slot("projector", "base_model.model.model.multi_modal_projector.", projector("linear_1", "linear_2")),
        Slot("llama", "base_model.model.model.language_model.", hf_llama),
    ),
    "peft-liuhaotian": tuple(replace(s, prefix=f"base_model.model.{s.prefix}") for s in WRITTEN["liuhaotian"][:3]),
}
