"""The files that stand beside the weights when a model is exported: configs, tokenizer, processor, chat template.

llava_hf       a folder that transformers loads: LlavaForConditionalGeneration, AutoProcessor, generate
liuhaotian     a folder that LLaVA's own code loads: LlavaLlamaForCausalLM
image_mode_of  the way back: the image mode that such files stand for
Each is pure: what the files hold goes in or comes out, and nothing is read or written here.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llava_fn.config import Llama, Llava, Vision
from llava_fn.data.templates import MARK, Template, template_of
from llava_fn.data.tokenizer import SentencePiece

PAD = "<pad>"
CONTEXT = 4096  # positions that Llama 2 was trained with
LLAVA_LENGTH = 2048  # positions that LLaVA-1.5 was trained with
TOWER = "openai/clip-vit-large-patch14-336"
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Their prompt on the Hugging Face hub has no system text, so there it is the user's to give.
OPEN_SYSTEM = ("vicuna_v1", "v1", "llava_v1")

_SPACE = "\u2581"  # how sentencepiece writes a space
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece.Type


def padded(vocab: int) -> int:
    """Rows of the embedding and of the head in the llava-hf layout: `<image>`, `<pad>`, then up to a multiple of 64.

    32000 -> 32064. Source: transformers convert_llava_weights_to_hf.py.
    """
    return (vocab + 2 + 63) // 64 * 64


def llava_hf(c: Llava, dtype: torch.dtype, tokenizer: bytes, image_mode: str, template: str) -> dict[str, bytes]:
    """File name -> content of all that a llava-hf folder holds beside its weights, for transformers 4.49 or newer.

    dtype: of the weights. tokenizer: the bytes of tokenizer.model. image_mode, template: as the model was trained.
    The vocabulary grows by `<image>` (id c.llama.vocab) and `<pad>` (the next), to `padded(c.llama.vocab)` rows.
    The chat template of vicuna_v1, v1 and llava_v1 is the hub's, "USER: <image>\\n... ASSISTANT:", with no system text
    until a message of the role "system" gives one. Every other template keeps its own.

    Raises ValueError for a tokenizer of another size than the model's vocabulary or of another kind than BPE with
    identity normalisation, and for an image mode, template or dtype that does not exist.
    Differs: transformers puts no space in front of the text that follows `<image>`, so a question has one token less
    there than in LLaVA; nor in front of a text that begins with a space itself.
    """
    pieces = _pieces(tokenizer, c.llama.vocab)
    _check(pieces)
    chat = _chat(template_of(template), template in OPEN_SYSTEM)
    files = {
        "config.json": _hf_config(c, _dtype(dtype), pieces),
        "generation_config.json": _generation(pieces.bos, pieces.eos, c.llama.vocab + 1),
        "tokenizer_config.json": _hf_tokenizer_config(pieces),
        "special_tokens_map.json": {**pieces.names, "pad_token": PAD},
        "added_tokens.json": {MARK: c.llama.vocab, PAD: c.llama.vocab + 1},
        "preprocessor_config.json": _preprocessor(c.vision.image, image_mode),
        "processor_config.json": _processor(c.vision.patch),
        "chat_template.json": {"chat_template": chat},  # before transformers 4.50; the .jinja since
    }
    rest = {"chat_template.jinja": chat.encode(), "tokenizer.json": _fast(pieces), "tokenizer.model": tokenizer}
    return {name: _json(value) for name, value in files.items()} | rest


def liuhaotian(c: Llava, dtype: torch.dtype, tokenizer: bytes, image_mode: str) -> dict[str, bytes]:
    """File name -> content of all that a folder for LLaVA's own code holds beside its weights.

    dtype: of the weights. tokenizer: the bytes of tokenizer.model. `mm_vision_config` in config.json holds the image
    tower's HF CLIPVisionConfig, which LLaVA does not read: it always fetches `mm_vision_tower`.
    Raises ValueError for a tokenizer of another size than the model's vocabulary, an image mode or a dtype that does
    not exist. Source: LLaVA llava_llama.py, llava_arch.py, builder.py.
    """
    pieces = _pieces(tokenizer, c.llama.vocab)
    _check_mode(image_mode)
    files = {
        "config.json": {
            **_llama(c.llama, _dtype(dtype), pieces),
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
            "pad_token_id": pieces.unk,
            **_multimodal(c.vision, image_mode),
        },
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


def _llama(c: Llama, dtype: str, pieces: _Pieces) -> dict[str, Any]:
    """HF LlamaConfig, every value written out: its defaults have changed between versions."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.blocks,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head,
        "hidden_act": "silu",
        "rms_norm_eps": c.eps,
        "rope_theta": float(c.theta),  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": float(c.theta)},  # transformers 5
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": CONTEXT,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": pieces.bos,
        "eos_token_id": pieces.eos,
        "torch_dtype": dtype,  # before transformers 4.56; "dtype" since
        "dtype": dtype,
    }


def _vision(c: Vision) -> dict[str, Any]:
    """HF CLIPVisionConfig, every value written out. The projection is CLIP's own and never runs in LLaVA."""
    return {
        "model_type": "clip_vision_model",
        "image_size": c.image,
        "patch_size": c.patch,
        "num_channels": 3,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.blocks,
        "num_attention_heads": c.heads,
        "hidden_act": c.act,
        "layer_norm_eps": c.eps,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
        "projection_dim": 768,
    }


def _hf_config(c: Llava, dtype: str, pieces: _Pieces) -> dict[str, Any]:
    text = dataclasses.replace(c.llama, vocab=padded(c.llama.vocab))
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": c.llama.vocab,
        "image_token_id": c.llama.vocab,
        "image_seq_length": c.vision.patches,
        "pad_token_id": c.llama.vocab + 1,
        "bos_token_id": pieces.bos,
        "eos_token_id": pieces.eos,
        "vision_feature_layer": c.vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": c.llama.tied,
        "torch_dtype": dtype,
        "dtype": dtype,
        "text_config": {**_llama(text, dtype, pieces), "pad_token_id": c.llama.vocab + 1},
        "vision_config": {**_vision(c.vision), "torch_dtype": dtype, "dtype": dtype},
    }


def _multimodal(c: Vision, image_mode: str) -> dict[str, Any]:
    """What LLaVA's LlavaConfig adds to LlamaConfig."""
    return {
        "mm_vision_tower": TOWER,
        "mm_vision_config": _vision(c),
        "mm_hidden_size": c.width,
        "mm_vision_select_layer": c.feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": image_mode,
        "tokenizer_model_max_length": LLAVA_LENGTH,
        "tokenizer_padding_side": "right",
    }


def _generation(bos: int, eos: int, pad: int) -> dict[str, Any]:
    """Greedy: transformers refuses to save a config with a temperature beside it."""
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "do_sample": False}


@dataclass(frozen=True)
class _Pieces:
    """A sentencepiece model in the open: (piece, score, type) in the order of ids, and its special ids."""

    rows: tuple[tuple[str, float, int], ...]
    unk: int
    bos: int
    eos: int
    plain: bool  # BPE, and no normalisation

    @property
    def names(self) -> dict[str, str]:
        return {f"{name}_token": self.rows[getattr(self, name)][0] for name in ("bos", "eos", "unk")}


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while message[at] & 128:
        value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
    return value | message[at] << shift, at + 1


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: int, or bytes that are not decoded further."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = message[at : at + size], at + size
        yield tag >> 3, value


def _piece(message: bytes) -> tuple[str, float, int]:
    values = dict(_fields(message))
    return values[1].decode(), struct.unpack("<f", values.get(2, bytes(4)))[0], values.get(3, _NORMAL)


def _pieces(model: bytes, vocab: int) -> _Pieces:
    """What a tokenizer.model holds (sentencepiece_model.proto). ValueError if that is another number of pieces."""
    tokenizer = SentencePiece(model)
    if tokenizer.vocab_size != vocab:
        raise ValueError(f"tokenizer.model has {tokenizer.vocab_size} pieces, but llama.vocab={vocab}; make them agree")
    top = list(_fields(model))
    rows = tuple(_piece(value) for number, value in top if number == 1)
    unknown = next(i for i, (_, _, kind) in enumerate(rows) if kind == _UNKNOWN)
    # Protobuf merges messages by putting their bytes one behind the other.
    trainer, normalizer = (dict(_fields(b"".join(v for n, v in top if n == number))) for number in (2, 3))
    plain = trainer.get(3) == _BPE and not normalizer.get(2)
    return _Pieces(rows, unknown, tokenizer.bos, tokenizer.eos, plain)


def _check(pieces: _Pieces) -> None:
    """ValueError for what tokenizer.json, as it is written here, could not say."""
    if not pieces.plain:
        raise ValueError("tokenizer.model is no BPE model, or normalises its text; Llama's is, and does not")
    names = {piece for piece, _, _ in pieces.rows}
    taken = sorted(names & {MARK, PAD})
    if taken:
        raise ValueError(f"tokenizer.model has the piece {taken[0]!r} already, which the llava-hf layout adds")
    odd = [piece for piece, _, kind in pieces.rows if kind not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE)]
    if odd:
        raise ValueError(f"tokenizer.model has user-defined or unused pieces, which are not supported: {odd[:5]}")
    lost = sorted(set("".join(piece for piece, _, kind in pieces.rows if kind == _NORMAL)) - names)
    if lost:
        raise ValueError(f"tokenizer.model has pieces with characters that are no pieces themselves: {lost[:5]}")


def _merges(rows: tuple[tuple[str, float, int], ...]) -> list[str]:
    """Every pair of pieces that is a piece, the first to be merged first, as tokenizers' BPE wants them.

    Sentencepiece merges by score, and among equal scores from the left. Only runs of spaces have equal scores in
    Llama's model: there the pair that goes on with the longest piece is the one furthest left.
    """
    scores = {piece: score for piece, score, kind in rows if kind == _NORMAL}
    pairs = [
        (score, piece[:i], piece[i:])
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    pairs.sort(key=lambda pair: (-pair[0], -len(pair[1])))
    return [f"{left} {right}" for _, left, right in pairs]


def _added(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **flags}


def _specials(pieces: _Pieces) -> dict[int, str]:
    vocab = len(pieces.rows)
    names = {i: pieces.rows[i][0] for i in sorted((pieces.unk, pieces.bos, pieces.eos))}
    return {**names, vocab: MARK, vocab + 1: PAD}


_DECODERS = (
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)


def _fast(pieces: _Pieces) -> bytes:
    """tokenizer.json, which both transformers 4 and 5 prefer.

    Without it transformers 5 needs protobuf, begins no text with a space, and merges runs of spaces too early.
    """
    bos = pieces.names["bos_token"]
    first, second = ({"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB"))
    begin, again = ({"SpecialToken": {"id": bos, "type_id": i}} for i in (0, 1))
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_added(name)} for i, name in _specials(pieces).items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, again, second],
            "special_tokens": {bos: {"id": bos, "ids": [pieces.bos], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": _DECODERS},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces.names["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, (piece, _, _) in enumerate(pieces.rows)},
            "merges": _merges(pieces.rows),
        },
    }
    return json.dumps(value, ensure_ascii=False).encode()


def _tokenizer_config(pieces: _Pieces, pad: str, side: str, longest: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": side,
        "model_max_length": longest,
        **pieces.names,
        "pad_token": pad,
    }


def _hf_tokenizer_config(pieces: _Pieces) -> dict[str, Any]:
    return {
        **_tokenizer_config(pieces, PAD, "left", CONTEXT),
        "processor_class": "LlavaProcessor",
        "image_token": MARK,
        "extra_special_tokens": {"image_token": MARK},
        "added_tokens_decoder": {str(i): _added(name) for i, name in _specials(pieces).items()},
    }


_KINDS = {  # by image mode
    "square": {"image_processor_type": "CLIPImageProcessor"},
    "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
}
# What both image modes have in common. transformers' own defaults are the same.
_PIXELS = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(Vision.mean),
    "image_std": list(Vision.std),
}
# Image processors by the name of their class: do they pad to a square when do_pad asks for it?
_PROCESSORS = {
    f"{name}{kind}": pads
    for name, pads in (("CLIPImageProcessor", False), ("CLIPFeatureExtractor", False), ("LlavaImageProcessor", True))
    for kind in ("", "Fast", "Pil")
}


def _check_mode(image_mode: str) -> None:
    if image_mode not in _KINDS:
        raise ValueError(f"image mode {image_mode!r}: must be one of {', '.join(_KINDS)}")


def _preprocessor(size: int, image_mode: str) -> dict[str, Any]:
    _check_mode(image_mode)
    return {
        **_KINDS[image_mode],
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        **_PIXELS,
    }


def _processor(patch: int) -> dict[str, Any]:
    """One additional position, CLIP's class token, which the strategy "default" takes away again."""
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": MARK,
    }


# Names of variables in capitals are replaced by string literals. Whitespace outside of {{ }} is never printed.
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
    """The conversation template in Jinja: images of a question first, a line each, then its text; "plain" drops it."""
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


def image_mode_of(files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The image mode ("pad" or "square", see image.py) that the JSON files of a folder stand for; None if none says.

    files: file name -> its content, of config.json (LLaVA's own: image_aspect_ratio, which decides where it is),
    preprocessor_config.json and processor_config.json (transformers; the second may hold the first). Others are
    ignored. ValueError, with file and value, for whatever makes other pixels than these two modes, and for two files
    that disagree.
    """
    ratio = files.get("config.json", {}).get("image_aspect_ratio")
    if ratio is not None:
        if ratio not in _KINDS:
            raise ValueError(f"config.json: image_aspect_ratio={ratio!r} is not supported, only {', '.join(_KINDS)}")
        return ratio
    nested = files.get("processor_config.json", {}).get("image_processor")
    found = {"preprocessor_config.json": files.get("preprocessor_config.json"), "processor_config.json": nested}
    modes = {name: _mode(name, values) for name, values in found.items() if values is not None}
    if len(set(modes.values())) > 1:
        raise ValueError(f"the files disagree on the image mode: {modes}; remove the wrong one")
    return next(iter(modes.values()), None)


def _mode(name: str, values: Mapping[str, Any]) -> str:
    """The image mode of an HF image processor's config; a value that is left out is at its default."""
    kind = values.get("image_processor_type", values.get("feature_extractor_type", "CLIPImageProcessor"))
    if kind not in _PROCESSORS:
        raise ValueError(f"{name}: image_processor_type={kind!r} is not supported, only {', '.join(_PROCESSORS)}")
    for key, value in _PIXELS.items():
        if values.get(key, value) != value:
            raise ValueError(f"{name}: {key}={values[key]!r} is not supported, only {value!r}")
    size, crop = values.get("size"), values.get("crop_size")
    if isinstance(size, Mapping) and set(size) != {"shortest_edge"}:
        raise ValueError(f"{name}: size={size!r} is not supported; it must give the shortest_edge alone")
    if len(_edges(size) | _edges(crop)) > 1:
        raise ValueError(f"{name}: size={size!r} with crop_size={crop!r} is not supported; they must agree")
    pad = values.get("do_pad") or False
    if pad not in (True, False) or (pad and not _PROCESSORS[kind]):
        raise ValueError(f"{name}: do_pad={pad!r} of {kind}; only LlavaImageProcessor pads to a square")
    return "pad" if pad else "square"


def _edges(size: Mapping[str, int] | int | None) -> set[int]:
    return set() if size is None else {size} if isinstance(size, int) else set(size.values())
