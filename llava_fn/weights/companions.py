"""The files of an exported model other than its weights: configs, tokenizer, processor, chat template.

llava_hf     a folder that transformers loads: LlavaForConditionalGeneration, AutoProcessor, generate
liuhaotian   a folder that LLaVA's own code loads: LlavaLlamaForCausalLM
Both are pure: they return the content of the files and write nothing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import torch

from llava_fn.config import Llama, Llava, Vision
from llava_fn.data.templates import MARK, Template, template_of
from llava_fn.weights.fast_tokenizer import PAD, Pieces, parse, tokenizer_json
from llava_fn.weights.image_processor import check_mode, preprocessor, processor

CONTEXT = 4096  # positions that Llama 2 was trained with
LLAVA_LENGTH = 2048  # positions that LLaVA-1.5 was trained with
TOWER = "openai/clip-vit-large-patch14-336"
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
OPEN_SYSTEM = ("vicuna_v1", "v1", "llava_v1")  # templates whose prompt on the hub has no system text


def padded(vocab: int) -> int:
    """Rows of the embedding and of the head in the llava-hf layout: `<image>`, `<pad>`, then up to a multiple of 64.

    32000 -> 32064. Source: transformers convert_llava_weights_to_hf.py.
    """
    return (vocab + 2 + 63) // 64 * 64


def llava_hf(c: Llava, dtype: torch.dtype, tokenizer: bytes, image_mode: str, template: str) -> dict[str, bytes]:
    """File name -> content of all files but the weights of a llava-hf folder, for transformers 4.49 or newer.

    dtype: of the weights. tokenizer: the bytes of tokenizer.model. image_mode, template: as in training.
    The vocabulary grows by `<image>` (id c.llama.vocab) and `<pad>` (the next id), to `padded(c.llama.vocab)` rows.
    For the templates OPEN_SYSTEM the chat template is the hub's, "USER: <image>\\n... ASSISTANT:", with a system text
    only if a message of the role "system" gives one. Every other template keeps its own.

    ValueError for a tokenizer whose size is not the model's vocabulary or that is not BPE with identity normalisation,
    and for an unknown image mode, template or dtype.
    Differs: transformers puts no space before the text that follows `<image>`, so a question has one token less than in
    LLaVA; nor before a text that begins with a space itself.
    """
    pieces = parse(tokenizer, c.llama.vocab)
    fast, chat = tokenizer_json(pieces), _chat(template_of(template), template in OPEN_SYSTEM)
    files = {
        "config.json": _hf_config(c, _dtype(dtype), pieces),
        "generation_config.json": _generation(pieces.bos, pieces.eos, c.llama.vocab + 1),
        "tokenizer_config.json": _hf_tokenizer_config(pieces),
        "special_tokens_map.json": {**pieces.names, "pad_token": PAD},
        "added_tokens.json": {MARK: c.llama.vocab, PAD: c.llama.vocab + 1},
        "preprocessor_config.json": preprocessor(c.vision.image, image_mode),
        "processor_config.json": processor(c.vision.patch),
        "chat_template.json": {"chat_template": chat},  # before transformers 4.50; the .jinja since
    }
    rest = {"chat_template.jinja": chat.encode(), "tokenizer.json": fast, "tokenizer.model": tokenizer}
    return {name: _json(value) for name, value in files.items()} | rest


def liuhaotian(c: Llava, dtype: torch.dtype, tokenizer: bytes, image_mode: str) -> dict[str, bytes]:
    """File name -> content of all files but the weights of a folder for LLaVA's own code.

    dtype: of the weights. tokenizer: the bytes of tokenizer.model. `mm_vision_config` in config.json is the image
    tower's HF CLIPVisionConfig. LLaVA does not read it but always downloads `mm_vision_tower`.
    ValueError for a tokenizer whose size is not the model's vocabulary, and for an unknown image mode or dtype.
    Source: LLaVA llava_llama.py, llava_arch.py, builder.py.
    """
    pieces = parse(tokenizer, c.llama.vocab)
    check_mode(image_mode)
    own = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "pad_token_id": pieces.unk}
    files = {
        "config.json": {**_llama(c.llama, _dtype(dtype), pieces), **own, **_multimodal(c.vision, image_mode)},
        "generation_config.json": _generation(pieces.bos, pieces.eos, pieces.unk),
        "tokenizer_config.json": _tokenizer_config(pieces, pieces.names["unk_token"], "right", LLAVA_LENGTH),
        "special_tokens_map.json": {**pieces.names, "pad_token": pieces.names["unk_token"]},
    }
    return {name: _json(value) for name, value in files.items()} | {"tokenizer.model": tokenizer}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _dtype(dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: weights are exported as one of {', '.join(DTYPES.values())}")
    return DTYPES[dtype]


def _llama(c: Llama, dtype: str, pieces: Pieces) -> dict[str, Any]:
    """HF LlamaConfig with every value written out, because its defaults have changed between versions."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab, "hidden_size": c.width, "intermediate_size": c.ffn, "num_hidden_layers": c.blocks,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head,
        "hidden_act": "silu", "rms_norm_eps": c.eps,
        "rope_theta": float(c.theta),  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": float(c.theta)},  # transformers 5
        "tie_word_embeddings": c.tied, "max_position_embeddings": CONTEXT,
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
        "bos_token_id": pieces.bos, "eos_token_id": pieces.eos,
        "torch_dtype": dtype,  # before transformers 4.56; "dtype" since
        "dtype": dtype,
    }  # fmt: skip


def _vision(c: Vision) -> dict[str, Any]:
    """HF CLIPVisionConfig with every value written out. The projection is CLIP's own and never runs in LLaVA."""
    return {
        "model_type": "clip_vision_model", "image_size": c.image, "patch_size": c.patch, "num_channels": 3,
        "hidden_size": c.width, "intermediate_size": c.ffn, "num_hidden_layers": c.blocks,
        "num_attention_heads": c.heads, "hidden_act": c.act, "layer_norm_eps": c.eps, "attention_dropout": 0.0,
        "initializer_range": 0.02, "initializer_factor": 1.0, "projection_dim": 768,
    }  # fmt: skip


def _hf_config(c: Llava, dtype: str, pieces: Pieces) -> dict[str, Any]:
    """HF LlavaConfig, whose decoder has the grown vocabulary."""
    text = dataclasses.replace(c.llama, vocab=padded(c.llama.vocab))
    return {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": c.llama.vocab, "image_token_id": c.llama.vocab, "image_seq_length": c.vision.patches,
        "pad_token_id": c.llama.vocab + 1, "bos_token_id": pieces.bos, "eos_token_id": pieces.eos,
        "vision_feature_layer": c.vision.feature_layer, "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": c.llama.tied,
        "torch_dtype": dtype, "dtype": dtype,
        "text_config": {**_llama(text, dtype, pieces), "pad_token_id": c.llama.vocab + 1},
        "vision_config": {**_vision(c.vision), "torch_dtype": dtype, "dtype": dtype},
    }  # fmt: skip


def _multimodal(c: Vision, image_mode: str) -> dict[str, Any]:
    """The fields of LLaVA's LlavaConfig that LlamaConfig lacks."""
    return {
        "mm_vision_tower": TOWER, "mm_vision_config": _vision(c), "mm_hidden_size": c.width,
        "mm_vision_select_layer": c.feature_layer, "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "use_mm_proj": True, "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": image_mode,
        "tokenizer_model_max_length": LLAVA_LENGTH, "tokenizer_padding_side": "right",
    }  # fmt: skip


def _generation(bos: int, eos: int, pad: int) -> dict[str, Any]:
    """Greedy decoding: transformers refuses to save a config that also has a temperature."""
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "do_sample": False}


def _tokenizer_config(pieces: Pieces, pad: str, side: str, longest: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "padding_side": side, "model_max_length": longest,
        **pieces.names, "pad_token": pad,
    }  # fmt: skip


def _hf_tokenizer_config(pieces: Pieces) -> dict[str, Any]:
    added = {str(i): token for i, token in pieces.added_tokens().items()}
    return {
        **_tokenizer_config(pieces, PAD, "left", CONTEXT), "processor_class": "LlavaProcessor",
        "image_token": MARK, "extra_special_tokens": {"image_token": MARK}, "added_tokens_decoder": added,
    }  # fmt: skip


# `_chat` replaces names in capitals by string literals. Whitespace outside of {{ }} is not printed.
_JINJA = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- for part in parts if part['type'] not in (['text', 'image'] if message['role'] == 'user' else ['text']) -%}
{{- raise_exception("no place for content of type '" + part['type'] + "' from " + message['role']) -}}
{%- endfor -%}
{%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{%- if message['role'] == 'user' -%}
{{- FIRST if loop.first else NEXT -}}
{%- for part in parts if part['type'] == 'image' -%}{{- IMAGE -}}{%- endfor -%}
QUESTION
{%- elif message['role'] == 'assistant' -%}
{{- LEAD + text + END -}}
SYSTEM
{%- else -%}
{{- raise_exception("no place for a message from '" + message['role'] + "'") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- REPLY -}}{%- endif -%}
"""


def _chat(template: Template, open_system: bool) -> str:
    """The conversation template in Jinja. A question's images come first, a line each; captions omit its text."""
    literals = {
        "FIRST": template.next if open_system else template.first,
        "NEXT": template.next,
        "IMAGE": template.image + ("" if template.caption else "\n"),
        "LEAD": template.reply + template.lead,
        "END": template.end,
        "REPLY": template.reply,
    }
    system = """{%- elif message['role'] == 'system' and loop.first -%}\n{{- text + ' ' -}}\n"""
    jinja = _JINJA.replace("QUESTION\n", "" if template.caption else "{{- text -}}\n")
    jinja = jinja.replace("SYSTEM\n", system if open_system else "")
    return re.sub("|".join(literals), lambda match: json.dumps(literals[match[0]]), jinja)
