"""One tiny LLaVA-1.5, made by transformers, in every public layout, by rules that the package does not share."""

import argparse
import importlib.util
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as HFLlava

from llava_fn.config import Llama, Llava, Vision

C = Llava(
    Vision(image=28, patch=14, width=128, blocks=4, heads=2, ffn=512),
    Llama(vocab=512, width=256, blocks=2, heads=2, kv_heads=1, ffn=40),
)
PADDED = 576  # rows of the llava-hf layout
Tensors = dict[str, Tensor]


def hf_config(c: Llava, vocab: int) -> LlavaConfig:
    v, t = c.vision, c.llama
    vision = CLIPVisionConfig(
        hidden_size=v.width, intermediate_size=v.ffn, num_hidden_layers=v.blocks, num_attention_heads=v.heads,
        image_size=v.image, patch_size=v.patch,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=t.width, intermediate_size=t.ffn, num_hidden_layers=t.blocks, num_attention_heads=t.heads,
        num_key_value_heads=t.kv_heads, vocab_size=vocab, rms_norm_eps=t.eps, tie_word_embeddings=t.tied,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=c.llama.vocab, image_seq_length=v.patches,
        vision_feature_layer=v.feature_layer, tie_word_embeddings=t.tied,
    )  # fmt: skip


def hf_model(c: Llava = C, dtype: torch.dtype = torch.float16) -> HFLlava:
    """Random weights with norms and biases away from 1 and 0."""
    torch.manual_seed(5)
    model = HFLlava(hf_config(c, PADDED))
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = {1: 0.3, 2: p.shape[-1] ** -0.5}.get(p.ndim, 0.1)
        p.data = (centre + scale * noise).to(dtype)  # not model.to: that would round the rotary buffers too
    return model.eval()


def hub(model: HFLlava) -> Tensors:
    """The state under the names of the files on the hub."""
    rules = ((r"^model\.vision_tower\.", "vision_tower.vision_model."), (r"^model\.multi_modal", "multi_modal"),
             (r"^model\.language_model\.", "language_model.model."),
             (r"^lm_head", "language_model.lm_head"))  # fmt: skip
    return {renamed(name, rules): t.clone() for name, t in model.state_dict().items()}


def renamed(name: str, rules) -> str:
    for pattern, to in rules:
        name = re.sub(pattern, to, name)
    return name


JUNK = {
    "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(64),
}
GENERATIONS = {
    "hub": (),
    "transformers 4.52": (
        (r"^vision_tower", "model.vision_tower"), (r"^multi_modal", "model.multi_modal"),
        (r"^language_model\.model", "model.language_model"), (r"^language_model\.lm_head", "lm_head"),
    ),
    "transformers 5": (
        (r"^vision_tower\.vision_model", "model.vision_tower"), (r"^multi_modal", "model.multi_modal"),
        (r"^language_model\.model", "model.language_model"), (r"^language_model\.lm_head", "lm_head"),
    ),
    "hybrid": ((r"^vision_tower\.vision_model", "vision_tower"),),
}  # fmt: skip


def write_llava_hf(folder: Path, state: Tensors, generation: str, tokenizer: bytes, c: Llava = C) -> Path:
    hf_config(c, PADDED).save_pretrained(folder)
    rules = GENERATIONS[generation]
    save_file({renamed(name, rules): t for name, t in (state | JUNK).items()}, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_center_crop": True, "do_resize": True,
        "crop_size": c.vision.image, "size": {"shortest_edge": c.vision.image}, "do_normalize": True,
        "image_processor_type": "CLIPImageProcessor"}))  # fmt: skip
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def write_sharded(folder: Path, tensors: Tensors, kind: str) -> None:
    """Three shards and their index. kind: safetensors or bin."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    where = {}
    for j in range(3):
        shard = dict(list(tensors.items())[j::3])
        name = f"{stem}-{j + 1:05d}-of-00003.{kind}"
        save_file(shard, folder / name) if kind == "safetensors" else torch.save(shard, folder / name)
        where |= dict.fromkeys(shard, name)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def text_rows(state: Tensors, c: Llava = C) -> Tensors:
    """Without the rows for <image>, <pad> and padding."""
    return {n: t[: c.llama.vocab].clone() if len(t) == PADDED else t for n, t in state.items()}


TO_LIUHAOTIAN = (
    (r"^vision_tower", "model.vision_tower.vision_tower"), (r"^language_model\.", ""),
    (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
)  # fmt: skip


def write_liuhaotian(folder: Path, state: Tensors, tower: bool, tokenizer: bytes, c: Llava = C) -> Path:
    folder.mkdir(parents=True)
    text = hf_config(c, c.llama.vocab).text_config.to_dict()
    more = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": c.vision.width,
            "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
            "mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad",
            "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(text | more))
    named = {renamed(n, TO_LIUHAOTIAN): t for n, t in text_rows(state, c).items()}
    write_sharded(folder, {n: t for n, t in named.items() if tower or "vision_tower" not in n}, "bin")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "training_args.bin").write_bytes(b"never opened")
    return folder


def part(state: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t.clone() for n, t in state.items() if n.startswith(prefix)}


def write_projector(path: Path, state: Tensors, before: str = "model.") -> Path:
    named = {renamed(n, TO_LIUHAOTIAN): t for n, t in state.items() if n.startswith("multi_modal")}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({n.replace("model.", before, 1): t for n, t in named.items()}, path)
    return path


def write_vicuna(folder: Path, state: Tensors, kind: str, tokenizer: bytes, c: Llava = C) -> Path:
    folder.mkdir(parents=True)
    hf_config(c, c.llama.vocab).text_config.save_pretrained(folder)
    write_sharded(folder, part(text_rows(state, c), "language_model."), kind)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def write_clip(folder: Path, state: Tensors, whole: bool, c: Llava = C) -> Path:
    """transformers' own CLIPModel, or its CLIPVisionModel, with these weights."""
    vision, mine = hf_config(c, PADDED).vision_config, part(state, "vision_tower.vision_model.")
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    if whole:
        model = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=4))
    else:
        model = CLIPVisionModel(vision)
    (model.vision_model if whole else model).load_state_dict(mine)
    model.half().save_pretrained(folder)
    return folder


def openai_model(state: Tensors, c: Llava = C) -> torch.nn.Module:
    """OpenAI's own CLIP, whose model.py is loaded by its path, with these weights."""
    folder = Path(importlib.util.find_spec("clip").submodule_search_locations[0])
    module = importlib.util.spec_from_file_location("clip_model", folder / "model.py")
    loaded = importlib.util.module_from_spec(module)
    module.loader.exec_module(loaded)
    v = c.vision
    model = loaded.CLIP(16, v.image, v.blocks, v.width, v.patch, 8, 50, 32, 2, 1)
    mine = part(state, "vision_tower.vision_model.")
    top = {"conv1.weight": "embeddings.patch_embedding.weight", "class_embedding": "embeddings.class_embedding",
           "positional_embedding": "embeddings.position_embedding.weight"}  # fmt: skip
    named = {a: mine[b] for a, b in top.items()}
    for kind in ("weight", "bias"):
        named |= {f"ln_pre.{kind}": mine[f"pre_layrnorm.{kind}"], f"ln_post.{kind}": mine[f"post_layernorm.{kind}"]}
        for i in range(v.blocks):
            a, b = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            pairs = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2",
                     "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
            named |= {f"{a}.{x}.{kind}": mine[f"{b}.{y}.{kind}"] for x, y in pairs.items()}
            named[f"{a}.attn.in_proj_{kind}"] = torch.cat([mine[f"{b}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
    with torch.no_grad():
        for name, p in model.visual.named_parameters():
            if name != "proj":
                p.copy_(named.pop(name))
    assert not named
    return model.eval()


def write_openai(path: Path, state: Tensors, c: Llava = C) -> Path:
    """A TorchScript archive like OpenAI's: half and single precision, and three numbers among the buffers."""
    model = openai_model(state, c)
    for name in ("input_resolution", "context_length", "vocab_size"):
        value = {"input_resolution": c.vision.image, "context_length": 8, "vocab_size": 50}[name]
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        traced = torch.jit.trace_module(model, {"encode_image": (torch.zeros(1, 3, c.vision.image, c.vision.image),)})
    for name, p in traced.named_parameters():
        if "ln_" not in name and "embedding" not in name:
            p.data = p.data.half()
    torch.jit.save(traced, path)
    return path


def mixed(heads: int, groups: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Megatron's rows, written head by head."""
    head, out = len(q) // heads, []
    for g in range(groups):
        per = heads // groups
        out += [q[(g * per + j) * head : (g * per + j + 1) * head] for j in range(per)]
        out += [k[g * head : (g + 1) * head], v[g * head : (g + 1) * head]]
    return torch.cat(out)


def mindspeed(state: Tensors, blocks: int, c: Llava = C) -> tuple[Tensors, Tensors, Tensors]:
    """The contents of converted_clip.pt, converted_vicuna.pt and mlp.pt. blocks: of CLIP that are kept."""
    v, t = part(state, "vision_tower.vision_model."), part(text_rows(state, c), "language_model.")
    clip = {"class_token": v["embeddings.class_embedding"][None, None],
            "position_embeddings.weight": v["embeddings.position_embedding.weight"],
            "conv1.weight": v["embeddings.patch_embedding.weight"]}  # fmt: skip
    vicuna = {"embedding.word_embeddings.weight": t["model.embed_tokens.weight"],
              "decoder.final_layernorm.weight": t["model.norm.weight"],
              "output_layer.weight": t["lm_head.weight"]}  # fmt: skip
    for kind in ("weight", "bias"):
        clip[f"ln_pre.{kind}"] = v[f"pre_layrnorm.{kind}"]
        for i in range(blocks):
            a, b = f"decoder.layers.{i}", f"encoder.layers.{i}"
            pairs = {"input_layernorm": "layer_norm1", "self_attention.linear_proj": "self_attn.out_proj",
                     "pre_mlp_layernorm": "layer_norm2", "mlp.linear_fc1": "mlp.fc1",
                     "mlp.linear_fc2": "mlp.fc2"}  # fmt: skip
            clip |= {f"{a}.{x}.{kind}": v[f"{b}.{y}.{kind}"] for x, y in pairs.items()}
            qkv = [v[f"{b}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            clip[f"{a}.self_attention.linear_qkv.{kind}"] = mixed(c.vision.heads, c.vision.heads, *qkv)
    for i in range(c.llama.blocks):
        a, b = f"decoder.layers.{i}", f"model.layers.{i}"
        qkv = [t[f"{b}.self_attn.{x}_proj.weight"] for x in "qkv"]
        vicuna |= {
            f"{a}.input_layernorm.weight": t[f"{b}.input_layernorm.weight"],
            f"{a}.pre_mlp_layernorm.weight": t[f"{b}.post_attention_layernorm.weight"],
            f"{a}.self_attention.linear_qkv.weight": mixed(c.llama.heads, c.llama.kv_heads, *qkv),
            f"{a}.self_attention.linear_proj.weight": t[f"{b}.self_attn.o_proj.weight"],
            f"{a}.mlp.linear_fc1.weight": torch.cat([t[f"{b}.mlp.{x}_proj.weight"] for x in ("gate", "up")]),
            f"{a}.mlp.linear_fc2.weight": t[f"{b}.mlp.down_proj.weight"],
        }
    mlp = {n.replace("linear_", "encoder.linear_fc"): x for n, x in part(state, "multi_modal_projector.").items()}
    return clip, vicuna, mlp


def write_mindspeed(folder: Path, state: Tensors, blocks: int, tokenizer: bytes, c: Llava = C) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / name for name in ("converted_clip.pt", "converted_vicuna.pt", "mlp.pt")]
    for path, tensors in zip(paths, mindspeed(state, blocks, c), strict=True):
        torch.save(tensors, path)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return paths


def write_megatron(folder: Path, state: Tensors, c: Llava = C) -> Path:
    """What MindSpeed-MM's training saves: everything under one dict, with its arguments and the optimizer's state."""
    clip, vicuna, mlp = mindspeed(state, c.vision.blocks, c)
    model = {f"image_encoder.encoder.{n}": t for n, t in clip.items()}
    model |= {f"image_encoder.projector.{n}": t for n, t in mlp.items()}
    model |= {f"text_decoder.{n}": t for n, t in vicuna.items()} | {"text_decoder.decoder._extra_state": torch.empty(0)}
    last = folder / "iter_0005000/mp_rank_00"
    last.mkdir(parents=True)
    content = {"args": argparse.Namespace(lr=1e-3), "checkpoint_version": 3.0, "iteration": 5000, "model": model,
               "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}  # fmt: skip
    torch.save(content, last / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("5000")
    return folder


def write_lora(folder: Path, state: Tensors, rank: int, alpha: int, c: Llava = C) -> tuple[Path, Tensors]:
    """A PEFT folder of LLaVA's finetune_lora.sh, and the whole state after its adapters are merged."""
    folder.mkdir(parents=True)
    torch.manual_seed(9)
    adapters, merged = {}, dict(state)
    for name, w in part(state, "language_model.model.").items():
        if "_proj" in name:
            a, b = torch.randn(rank, w.shape[1]) * 0.1, torch.randn(w.shape[0], rank) * 0.1
            where = f"base_model.model.model.{name.removesuffix('.weight')}"
            adapters |= {f"{where}.lora_A.weight": a, f"{where}.lora_B.weight": b}
            merged[f"language_model.model.{name}"] = (w.float() + (b @ a) * (alpha / rank)).to(w.dtype)
    save_file(adapters, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.05, "bias": "none",
             "task_type": "CAUSAL_LM", "modules_to_save": None, "use_rslora": False, "use_dora": False,
             "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False,
             "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    write_projector(folder / "non_lora_trainables.bin", state, "base_model.model.model.")
    return folder, merged
