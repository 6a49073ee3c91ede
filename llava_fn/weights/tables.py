"""What every public layout calls the tensors of CLIP, the projector and Llama: tables, and where each layout is met.

A row is one tensor of theirs and the leaves of ours that it is made of. Names are relative: a `Layout` says what stands
before them. Sources: HF modeling_clip.py, modeling_llama.py, modeling_llava.py; OpenAI clip/model.py; LLaVA
llava_arch.py; Megatron-LM transformer_layer.py and MindSpeed-MM clip_vit_model.py, multimodal_projector.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llava_fn.config import Llama, Llava, Vision
from llava_fn.weights.reshape import CONV, PAIR, SAME, STACK, TOKEN, Reshape, interleave


@dataclass(frozen=True)
class Rule:
    """`theirs` is one tensor, made of our leaves by `how`."""

    theirs: str
    ours: tuple[str, ...]
    how: Reshape = SAME


def _pairs(theirs: str, weight: str, bias: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", (weight,)), Rule(f"{theirs}.bias", (bias,))]


def _blocks(rows: list[Rule], count: int, where: str) -> Iterator[Rule]:
    for i in range(count):
        yield from (Rule(f"{where}.{i}.{r.theirs}", tuple(f"blocks/{i}/{p}" for p in r.ours), r.how) for r in rows)


def hf_vision(c: Vision) -> list[Rule]:
    """HF CLIPVisionModel, with the blocks and the norm after those that LLaVA reads."""
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
        *_blocks(block, c.blocks, "encoder.layers"),
        *_pairs("post_layernorm", "post_g", "post_b"),
    ]


def openai_vision(c: Vision) -> list[Rule]:
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
        *_blocks(block, c.blocks, "transformer.resblocks"),
        *_pairs("ln_post", "post_g", "post_b"),
    ]


def megatron_vision(c: Vision) -> list[Rule]:
    """MindSpeed-MM's CLIPViT, which has no norm after the blocks."""
    mix = interleave(c.heads, c.width // c.heads)
    block = [
        *_pairs("input_layernorm", "norm1_g", "norm1_b"),
        Rule("self_attention.linear_qkv.weight", ("wq", "wk", "wv"), mix),
        Rule("self_attention.linear_qkv.bias", ("bq", "bk", "bv"), mix),
        *_pairs("self_attention.linear_proj", "wo", "bo"),
        *_pairs("pre_mlp_layernorm", "norm2_g", "norm2_b"),
        *_pairs("mlp.linear_fc1", "w_up", "b_up"), *_pairs("mlp.linear_fc2", "w_down", "b_down"),
    ]  # fmt: skip
    return [
        Rule("conv1.weight", ("patch",), CONV),
        Rule("class_token", ("cls",), TOKEN),
        Rule("position_embeddings.weight", ("positions",)),
        *_pairs("ln_pre", "norm_g", "norm_b"),
        *_blocks(block, c.blocks, "decoder.layers"),
    ]


def hf_llama(c: Llama) -> list[Rule]:
    """HF LlamaModel."""
    block = [
        Rule("input_layernorm.weight", ("norm1",)),
        Rule("self_attn.q_proj.weight", ("wq",)), Rule("self_attn.k_proj.weight", ("wk",)),
        Rule("self_attn.v_proj.weight", ("wv",)), Rule("self_attn.o_proj.weight", ("wo",)),
        Rule("post_attention_layernorm.weight", ("norm2",)),
        Rule("mlp.gate_proj.weight", ("w_gate",)), Rule("mlp.up_proj.weight", ("w_up",)),
        Rule("mlp.down_proj.weight", ("w_down",)),
    ]  # fmt: skip
    rules = _blocks(block, c.blocks, "layers")
    return [Rule("embed_tokens.weight", ("embed",)), *rules, Rule("norm.weight", ("norm",))]


def hf_head(_: Llama) -> list[Rule]:
    """The head of HF LlamaForCausalLM."""
    return [Rule("lm_head.weight", ("head",))]


def megatron_llama(c: Llama) -> list[Rule]:
    """Megatron-LM's GPTModel with a gated MLP and no biases."""
    block = [
        Rule("input_layernorm.weight", ("norm1",)),
        Rule("self_attention.linear_qkv.weight", ("wq", "wk", "wv"), interleave(c.kv_heads, c.head)),
        Rule("self_attention.linear_proj.weight", ("wo",)),
        Rule("pre_mlp_layernorm.weight", ("norm2",)),
        Rule("mlp.linear_fc1.weight", ("w_gate", "w_up"), PAIR), Rule("mlp.linear_fc2.weight", ("w_down",)),
    ]  # fmt: skip
    return [
        Rule("embedding.word_embeddings.weight", ("embed",)),
        *_blocks(block, c.blocks, "decoder.layers"),
        Rule("decoder.final_layernorm.weight", ("norm",)),
        Rule("output_layer.weight", ("head",)),
    ]


def projector(first: str, second: str) -> list[Rule]:
    """The two linears under the names that a layout gives them."""
    return [*_pairs(first, "w1", "b1"), *_pairs(second, "w2", "b2")]


@dataclass(frozen=True)
class Slot:
    """One part of a model within a layout: the expression before its names, and its table."""

    part: str
    before: str
    rows: Callable[[Llava], list[Rule]]


@dataclass(frozen=True)
class Layout:
    """Met where a name matches `mark`. `ignored`: names that hold nothing of LLaVA. `before` of a slot: see Slot."""

    name: str
    mark: str
    places: tuple[Slot, ...]
    ignored: str


def _vision(table: Callable[[Vision], list[Rule]]) -> Callable[[Llava], list[Rule]]:
    return lambda c: table(c.vision)


def _llama(table: Callable[[Llama], list[Rule]]) -> Callable[[Llava], list[Rule]]:
    return lambda c: table(c.llama)


def _projector(first: str, second: str) -> Callable[[Llava], list[Rule]]:
    return lambda c: projector(first, second)


OPENAI = Layout(
    "OpenAI CLIP",
    r"visual\.conv1\.weight",
    (Slot("vision", r"visual\.", _vision(openai_vision)),),
    r"visual\.proj|transformer\.resblocks\..*|token_embedding\.weight|positional_embedding|ln_final\.(weight|bias)"
    r"|text_projection|logit_scale|input_resolution|context_length|vocab_size",
)
MEGATRON_LLAMA = _llama(megatron_llama)
_EXTRA = r"(.*\.)?_extra_state"  # Transformer Engine's, empty
MEGATRON = (
    Layout(
        "MindSpeed-MM VLModel",
        r"(text_decoder|image_encoder)\..*",
        (
            Slot("vision", r"image_encoder\.encoder\.", _vision(megatron_vision)),
            Slot("projector", r"image_encoder\.projector\.encoder\.", _projector("linear_fc1", "linear_fc2")),
            Slot("llama", r"text_decoder\.", MEGATRON_LLAMA),
        ),
        _EXTRA,
    ),
    Layout("MindSpeed-MM CLIP", "class_token", (Slot("vision", "", _vision(megatron_vision)),), _EXTRA),
    Layout(
        "MindSpeed-MM Vicuna",
        r"embedding\.word_embeddings\.weight",
        (Slot("llama", "", MEGATRON_LLAMA),),
        _EXTRA,
    ),
    Layout(
        "MindSpeed-MM projector",
        r"encoder\.linear_fc1\.weight",
        (Slot("projector", r"encoder\.", _projector("linear_fc1", "linear_fc2")),),
        _EXTRA,
    ),
)
_PEFT = r"(base_model\.model\.)?"
HF = Layout(  # all of CLIPModel, LlamaForCausalLM, the generations of HF's LLaVA, and liuhaotian's
    "Hugging Face or liuhaotian",
    r".*(patch_embedding|embed_tokens|multi_modal_projector|mm_projector)\..*",
    (
        Slot(
            "vision",
            _PEFT + r"((model\.)?vision_tower\.(vision_tower\.)?)?(vision_model\.)?"
            r"(?=embeddings\.|pre_layrnorm\.|encoder\.|post_layernorm\.)",
            _vision(hf_vision),
        ),
        Slot("projector", _PEFT + r"(model\.)?multi_modal_projector\.", _projector("linear_1", "linear_2")),
        Slot("projector", _PEFT + r"(model\.)?mm_projector\.", _projector("0", "2")),
        Slot(
            "llama",
            _PEFT + r"(model\.language_model\.|language_model\.model\.|model\.)(?=embed_tokens\.|layers\.|norm\.)"
            r"|(language_model\.)?(?=lm_head\.)",
            _llama(lambda c: hf_llama(c) + hf_head(c)),
        ),
    ),
    r".*\.position_ids|.*rotary_emb\.inv_freq|text_model\..*|(visual|text)_projection\.weight|logit_scale",
)
LAYOUTS = (OPENAI, *MEGATRON, HF)
WRITTEN = {  # layouts that go out; what stands before the names of a slot is a text here
    "llava-hf": (
        Slot("vision", "vision_tower.vision_model.", _vision(hf_vision)),
        Slot("projector", "multi_modal_projector.", _projector("linear_1", "linear_2")),
        Slot("llama", "language_model.model.", _llama(hf_llama)),
        Slot("llama", "language_model.", _llama(hf_head)),
    ),
    "liuhaotian": (
        Slot("vision", "model.vision_tower.vision_tower.vision_model.", _vision(hf_vision)),
        Slot("projector", "model.mm_projector.", _projector("0", "2")),
        Slot("llama", "model.", _llama(hf_llama)),
        Slot("llama", "", _llama(hf_head)),
    ),
    "mm_projector": (Slot("projector", "model.mm_projector.", _projector("0", "2")),),
}
PEFT = {  # adapters that go out
    "peft": (
        Slot("vision", "base_model.model.model.vision_tower.", _vision(hf_vision)),
        Slot("projector", "base_model.model.model.multi_modal_projector.", _projector("linear_1", "linear_2")),
        Slot("llama", "base_model.model.model.language_model.", _llama(hf_llama)),
    ),
    "peft-liuhaotian": (
        Slot("vision", "base_model.model.model.vision_tower.vision_tower.vision_model.", _vision(hf_vision)),
        Slot("projector", "base_model.model.model.mm_projector.", _projector("0", "2")),
        Slot("llama", "base_model.model.model.", _llama(hf_llama)),
    ),
}
