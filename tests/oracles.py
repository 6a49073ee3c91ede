"""Models of transformers for tests, their parameters as ours, and the same samples as inputs of both."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_fn import config, vit
from llava_fn.batch import IMAGE, Sample
from llava_fn.weights.model import from_state_dict

HF_IMAGE = 100  # the id of HF's placeholder
VISION = {
    "plain": config.Vision(image=28, patch=14, width=32, blocks=4, heads=4, ffn=64),
    "odd": config.Vision(image=35, patch=5, width=42, blocks=3, heads=3, ffn=50, eps=1e-3, act="gelu"),
    "deep": config.Vision(image=16, patch=8, width=24, blocks=6, heads=2, ffn=96, feature_layer=-3),
}
LLAMA = {
    "plain": config.Llama(vocab=128, width=48, blocks=3, heads=4, kv_heads=4, ffn=96),
    "grouped": config.Llama(vocab=101, width=60, blocks=2, heads=6, kv_heads=2, ffn=70, theta=500.0, eps=1e-4),
    "tied": config.Llama(vocab=131, width=40, blocks=4, heads=5, kv_heads=1, ffn=56, tied=True),
}
CONFIGS = [config.Llava(VISION[v], LLAMA[k]) for v, k in zip(VISION, LLAMA, strict=True)]


def hf_vision(c: config.Vision) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.blocks, num_attention_heads=c.heads,
        image_size=c.image, patch_size=c.patch, layer_norm_eps=c.eps, hidden_act=c.act,
    )  # fmt: skip


def hf_llama(c: config.Llama) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.blocks,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.theta}, tie_word_embeddings=c.tied,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight gets its own size and every norm and bias leaves 1 and 0, so that no swap goes unseen."""
    rng = torch.Generator().manual_seed(5)
    for i, (name, p) in enumerate(model.named_parameters()):
        noise = torch.randn(p.shape, generator=rng) * (0.5 + 0.1 * (i % 7))
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.data = centre + (0.3 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5 if p.ndim == 2 else 0.1 * noise)
    return model.eval()


def hf_llava(c: config.Llava) -> LlavaForConditionalGeneration:
    vision, text = hf_vision(c.vision), hf_llama(c.llama)
    both = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=HF_IMAGE, image_seq_length=c.vision.patches,
        vision_feature_layer=c.vision.feature_layer, tie_word_embeddings=c.llama.tied,
    )  # fmt: skip
    return scramble(LlavaForConditionalGeneration(both))


def ours(model: torch.nn.Module, c: config.Llava):
    return from_state_dict(model.state_dict(), c)


def sample(c: config.Llava, seed: int, layout: str) -> Sample:
    """layout: i an image, a letter n prompt tokens, a digit m answer tokens; e.g. "p3i2p" ."""
    rng = torch.Generator().manual_seed(seed)
    ids, label, images = [1], [False], 0
    for kind in layout:
        if kind == "i":
            ids, label, images = ids + [IMAGE] * c.vision.patches, label + [False] * c.vision.patches, images + 1
        else:
            n = int(kind) if kind.isdigit() else 3
            ids += torch.randint(3, 99, (n,), generator=rng).tolist()
            label += [kind.isdigit()] * n
    pixels = torch.randint(0, 256, (images, 3, c.vision.image, c.vision.image), generator=rng, dtype=torch.uint8)
    return Sample(f"{layout}-{seed}", tuple(ids), tuple(label), pixels)


def hf_inputs(c: config.Llava, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Right-padded, as transformers is usually trained."""
    longest = max(len(s.ids) for s in samples)
    ids, labels, mask = (torch.full((len(samples), longest), fill) for fill in (0, -100, 0))
    for row, s in enumerate(samples):
        n, tokens, label = len(s.ids), torch.tensor(s.ids), torch.tensor(s.label)
        ids[row, :n] = torch.where(tokens == IMAGE, HF_IMAGE, tokens)
        labels[row, :n] = torch.where(label, tokens, -100)
        mask[row, :n] = 1
    pixels = torch.cat([s.pixels for s in samples])
    extra = {"pixel_values": vit.normalise(pixels)} if len(pixels) else {}
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, **extra}
