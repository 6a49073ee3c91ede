"""Ours against models that we did not write: transformers' CLIP, Llama and LLaVA, hidden states to gradients."""

import dataclasses

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_fn import config, llama, llava, spec, tree, vit
from llava_fn.batch import IMAGE, Sample, Stream, collate
from llava_fn.grad import value_and_grad
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


LAYOUTS = ["i5", "p4", "pip3p2", "ipi9pi1", "p2i", "i1", "pppppppp9999p9", "i5"]


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


def mean_nll(p, batch, c, run=llava.Execution()):
    nll = llava.nll(p, batch, c, run)
    return nll.mean(), nll


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-5) -> None:
    scale = max(1.0, b.abs().max().item())
    assert (a - b).abs().max().item() <= limit * scale


@pytest.mark.parametrize("name", VISION)
def test_vit_equals_hf_clip(name):
    c = VISION[name]
    model = scramble(CLIPVisionModel(hf_vision(c)))
    p = from_state_dict(model.state_dict(), config.Llava(vision=c))["vision"]
    pixels = torch.randn(3, 3, c.image, c.image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(pixels, output_hidden_states=True).hidden_states
        for layer in range(-c.blocks, c.feature_layer + 1):
            close(vit.encode(p, pixels, dataclasses.replace(c, feature_layer=layer)), want[layer][:, 1:])


@pytest.mark.parametrize("name", LLAMA)
def test_llama_logits_and_gradients_equal_hf(name):
    c = LLAMA[name]
    model = scramble(LlamaForCausalLM(hf_llama(c)))
    ids = torch.randint(3, c.vocab, (2, 13), generator=torch.Generator().manual_seed(0))

    def loss(p):
        hidden = llama.decode(p, p["embed"][ids.flatten()], Stream.of([13, 13]), c)
        logits = llama.logits(p, hidden, c)
        return llama.nll(p, hidden.unflatten(0, (2, 13))[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), c).mean(), logits

    p = from_state_dict(model.state_dict(), config.Llava(llama=c))["llama"]
    (value, logits), grads = value_and_grad(loss)(p)
    out = model(ids, labels=ids)
    out.loss.backward()
    close(logits, out.logits.flatten(0, 1))
    close(value, out.loss)
    want = from_state_dict({n: q.grad for n, q in model.named_parameters()}, config.Llava(llama=c))["llama"]
    for path in tree.paths(want):
        close(grads[path], want[path])


@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: f"{c.vision.width}-{c.llama.width}")
@pytest.mark.parametrize("layouts", [LAYOUTS, ["p4"], ["i9"]], ids=["mixed", "text", "image"])
def test_llava_equals_hf_from_features_to_every_gradient(c, layouts):
    model, samples = hf_llava(c), [sample(c, i, layout) for i, layout in enumerate(layouts)]
    p, batch = ours(model, c), collate(samples)
    inputs = hf_inputs(c, [next(s for s in samples if s.record == r) for r in batch.records])
    projected, merged = [], []
    model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: projected.append(out))
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: merged.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    out = model(**inputs)
    out.loss.backward()
    real = inputs["attention_mask"].bool()
    if len(batch.pixels):
        close(llava.features(p, batch.pixels, c), projected[0].flatten(0, -2))
    close(llava.embed(p, batch, c), merged[0][real])
    full = dataclasses.replace(batch, stream=Stream.of(batch.stream.segments.keys))
    close(llama.logits(p["llama"], llava.forward(p, full, c), c.llama), out.logits[real])
    (loss, _), grads = value_and_grad(mean_nll)(p, batch, c)
    close(loss, out.loss)
    theirs = {n: torch.zeros_like(q) if q.grad is None else q.grad for n, q in model.named_parameters()}
    want = from_state_dict(theirs, c)
    for path, grad in zip(tree.paths(grads), tree.values(grads), strict=True):
        close(grad, want[path])


@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: f"{c.vision.width}-{c.llama.width}")
def test_ragged_batch_equals_each_sample_alone(c):
    p, samples = spec.init(llava.spec(c), 3), [sample(c, i, layout) for i, layout in enumerate(LAYOUTS)]
    batch = collate(samples)
    alone = {s.record: llava.nll(p, collate([s]), c) for s in samples}
    close(llava.nll(p, batch, c), torch.cat([alone[r] for r in batch.records]))


@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: f"{c.vision.width}-{c.llama.width}")
def test_bf16_is_no_further_from_fp32_than_transformers(c):
    model, samples = hf_llava(c), [sample(c, i, layout) for i, layout in enumerate(LAYOUTS)]
    p, batch = ours(model, c), collate(samples)
    inputs = hf_inputs(c, [next(s for s in samples if s.record == r) for r in batch.records])
    real = inputs["attention_mask"].bool()
    full = dataclasses.replace(batch, stream=Stream.of(batch.stream.segments.keys))

    def logits(p):
        return llama.logits(p["llama"], llava.forward(p, full, c), c.llama).float()

    with torch.no_grad():
        want = model(**inputs).logits[real]
        mine = (logits(tree.cast(p, torch.bfloat16)) - want).pow(2).mean().sqrt()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        theirs = (model.bfloat16()(**inputs).logits[real].float() - want).pow(2).mean().sqrt()
    assert mine <= theirs * 1.05
