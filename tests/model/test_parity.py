"""Ours against models that we did not write: transformers' CLIP, Llama and LLaVA, hidden states to gradients."""

import dataclasses

import pytest
import torch
from oracles import CONFIGS, LLAMA, VISION, hf_inputs, hf_llama, hf_llava, hf_vision, ours, sample, scramble
from transformers import (
    CLIPVisionModel,
    LlamaForCausalLM,
)

from llava_fn import config, llama, llava, optim, spec, train, tree, vit
from llava_fn.batch import Stream, collate
from llava_fn.config import Optim
from llava_fn.grad import value_and_grad
from llava_fn.parallel.zero import Zero
from llava_fn.weights.model import from_state_dict

LAYOUTS = ["i5", "p4", "pip3p2", "ipi9pi1", "p2i", "i1", "pppppppp9999p9", "i5"]


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


def test_three_updates_of_the_second_stage_are_those_of_a_usual_loop_on_transformers():
    """Projector and decoder, clipped, with decay of weights alone and a cosine: what HF's Trainer does for LLaVA."""
    c, o = CONFIGS[1], Optim(lr=3e-3, warmup=0.0, weight_decay=0.1, eps=1e-4)
    model, samples = hf_llava(c), [sample(c, i, layout) for i, layout in enumerate(LAYOUTS)]
    p, batch = ours(model, c), collate(samples)
    inputs = hf_inputs(c, [next(s for s in samples if s.record == r) for r in batch.records])
    trained = [q for name, q in model.named_parameters() if "vision_tower" not in name]
    for q in model.model.vision_tower.parameters():
        q.requires_grad = False
    groups = [
        {"params": [q for q in trained if (q.ndim > 1) == big], "weight_decay": 0.1 * big} for big in (True, False)
    ]
    oracle = torch.optim.AdamW(groups, lr=o.lr, eps=o.eps)
    parts = config.STAGES["projector+llama"]
    mine, frozen = tree.split(tree.rebuild(p, [x.clone() for x in tree.values(p)]), train.trains(parts))
    state, task = train.TrainState(0, mine, optim.init(mine)), train.Task(frozen, c, o, 10, Zero(train=parts))
    for step in range(1, 4):
        for group in oracle.param_groups:
            group["lr"] = optim.learning_rate(o, step, 10)
        oracle.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, o.clip)
        oracle.step()
        state, metrics = train.train_step(state, [batch], task)
        assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
    want = from_state_dict(model.state_dict(), c)
    for path in tree.paths(state.params):
        close(state.params[path], want[path].detach(), 2e-5)
    assert (state.params["llama", "head"] - p["llama", "head"]).abs().max() > 1e-3
