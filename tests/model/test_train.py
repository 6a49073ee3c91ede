"""One update: what it computes, what it changes, and when it refuses."""

import math
from collections import Counter
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from rounding import same_but_rounded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_fn import llava, optim, spec, train, tree
from llava_fn.batch import collate
from llava_fn.config import STAGES, Optim
from llava_fn.grad import value_and_grad
from llava_fn.kernels.varlen import varlen_attn
from llava_fn.parallel.zero import Zero
from llava_fn.train import NonFinite, Task, TrainState, trains

OPTIM = Optim(lr=1e-2, warmup=0.0, weight_decay=0.1)


@pytest.fixture(scope="module")
def params(tiny):
    return spec.init(llava.spec(tiny), 0)


def copy(params):
    return tree.rebuild(params, [p.clone() for p in tree.values(params)])


def begin(params, model, stage="all", **fields):
    """(state, task) of a run of 20 updates; the state owns its tensors."""
    mine, frozen = tree.split(copy(params), trains(STAGES[stage]))
    return TrainState(0, mine, optim.init(mine)), Task(frozen, model, **{"optim": OPTIM, "steps": 20} | fields)


def grouped(samples, *sizes):
    """Micro-batches of these sizes."""
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [collate(samples[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def close(a, b, **limits):
    assert tree.paths(a) == tree.paths(b)
    for path in tree.paths(a):
        torch.testing.assert_close(a[path], b[path], msg=lambda m, path=path: f"{path}: {m}", **limits)


def same(a, b):
    """Equal to the bit, NaNs too."""
    assert tree.paths(a) == tree.paths(b)
    for x, y in zip(tree.values(a), tree.values(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def largest(tensors):
    return max(x.abs().max().item() for x in tree.values(tensors))


def run(params, model, batches, updates=3, **fields):
    state, task = begin(params, model, **fields)
    metrics = []
    for _ in range(updates):
        state, m = train.train_step(state, batches, task)
        metrics.append(m)
    return state, metrics


def nll(params, batch, model):
    return llava.nll(params, batch, model)


def test_accumulation_equals_the_big_batch(params, tiny, samples):
    eps = Optim(lr=1e-2, warmup=0.0, eps=1e-3)  # else Adam blows rounding up where a gradient is nearly zero
    one, m1 = run(params, tiny, grouped(samples, 12), optim=eps)
    for sizes in ((6, 6), (1, 3, 8), (1,) * 12):
        many, m2 = run(params, tiny, grouped(samples, *sizes), optim=eps)
        for a, b in zip(m1, m2, strict=True):
            assert b.loss == pytest.approx(a.loss, rel=1e-5) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
            assert (a.tokens, a.labelled, a.samples) == (b.tokens, b.labelled, b.samples)
        close(one.params, many.params, rtol=1e-4, atol=2e-5)


def test_the_loss_is_the_mean_over_tokens_or_the_mean_of_means(params, tiny, samples):
    short, long = sorted(samples, key=lambda s: len(s.ids))[:2], sorted(samples, key=lambda s: len(s.ids))[2:]
    batches = [collate(short), collate(long)]
    losses = [nll(params, b, tiny) for b in batches]
    (_, (token,)), (_, (rank,)) = (run(params, tiny, batches, 1, loss=x) for x in ("token_mean", "rank_mean"))
    assert token.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert rank.loss == pytest.approx(torch.stack([x.mean() for x in losses]).mean().item(), rel=1e-5)
    assert abs(token.loss - rank.loss) > 1e-4


def test_rank_mean_has_the_gradient_of_the_mean_of_means(params, tiny, samples):
    batches = grouped(samples, 2, 3, 7)
    _, grads = value_and_grad(lambda p: (sum(nll(p, b, tiny).mean() for b in batches) / 3, None))(params)
    state, _ = run(params, tiny, batches, 1, loss="rank_mean", optim=replace(OPTIM, clip=0.0))
    first = tree.rebuild(grads, [g * (1 - OPTIM.beta1) for g in tree.values(grads)])
    for a, b in zip(tree.values(state.moments.first), tree.values(first), strict=True):
        same_but_rounded(a, b, scale=largest(first))


def test_metrics_count_what_was_seen(params, tiny, samples):
    _, (m,) = run(params, tiny, grouped(samples, 5, 7), 1)
    assert m.tokens == sum(len(s.ids) for s in samples) and m.samples == 12
    assert m.labelled == sum(sum(s.label) for s in samples) and m.lr == OPTIM.lr
    _, grads = value_and_grad(lambda p: (nll(p, collate(samples), tiny).mean(), None))(params)
    assert m.grad_norm == pytest.approx(tree.global_norm(grads).item(), rel=1e-4)


def test_the_update_uses_clipped_gradients_and_reports_the_norm_before(params, tiny, samples):
    state, (m,) = run(params, tiny, grouped(samples, 12), 1, optim=replace(OPTIM, clip=0.01))
    assert m.grad_norm > 0.1
    assert tree.global_norm(state.moments.first).item() == pytest.approx(0.01 * (1 - OPTIM.beta1), rel=1e-3)


@pytest.mark.parametrize("stage, parts", [("projector", {"projector"}), ("projector+llama", {"projector", "llama"})])
def test_a_stage_changes_its_parts_and_nothing_else(params, tiny, samples, stage, parts):
    state, task = begin(params, tiny, stage)
    for _ in range(3):
        state, _ = train.train_step(state, grouped(samples, 4, 8), task)
    assert {path[0] for path in tree.paths(state.params)} == parts
    assert {path[0] for path in tree.paths(state.moments.first)} == parts
    for path in tree.paths(task.frozen):
        assert torch.equal(task.frozen[path], params[path]), path
    for path in tree.paths(state.params):
        assert not torch.equal(state.params[path], params[path]), path
    merged = tree.merge(state.params, task.frozen)
    assert set(tree.paths(merged)) == set(tree.paths(params))


def test_gradients_of_a_stage_are_those_of_the_whole_restricted_to_it(params, tiny, samples):
    free = replace(OPTIM, clip=0.0)
    full, _ = run(params, tiny, grouped(samples, 12), 1, optim=free)
    part, _ = run(params, tiny, grouped(samples, 12), 1, optim=free, stage="projector")
    for path in tree.paths(part.params):
        same_but_rounded(part.moments.first[path], full.moments.first[path])


def test_masters_stay_fp32_and_keep_updates_that_bf16_would_lose(params, tiny, samples):
    slow = Optim(lr=1e-6, warmup=0.0)
    state, metrics = run(params, tiny, grouped(samples, 12), 3, optim=slow, zero=Zero(dtype=torch.bfloat16))
    for t in (state.params, state.moments.first, state.moments.second):
        assert all(leaf.dtype == torch.float32 for leaf in tree.values(t))
    norms = state.params["llama", "norm"]  # they began as ones, whose bf16 neighbour is 0.996
    assert norms.ne(1).all() and norms.bfloat16().eq(1).all()
    moved = state.params["llama", "embed"] - params["llama", "embed"]
    assert 2e-6 < moved.abs().max() < 3.1e-6
    exact, wanted = run(params, tiny, grouped(samples, 12), 3, optim=slow)
    assert [m.loss for m in metrics] == pytest.approx([m.loss for m in wanted], rel=2e-2)
    assert [m.loss for m in metrics] != [m.loss for m in wanted]  # it did compute in bf16


def test_bf16_gradients_of_micro_batches_are_summed_in_fp32_to_the_bit(params, tiny, samples, monkeypatch):
    """Added as they are, they give what fp32 copies of them would."""
    state, task = begin(params, tiny, zero=Zero(dtype=torch.bfloat16), optim=replace(OPTIM, clip=0.0))
    batches, seen = grouped(samples, 3, 4, 5), []
    share = 1 / sum(len(b.targets) for b in batches)
    parts = [value_and_grad(train.loss)(tree.cast(params, torch.bfloat16), b, 1, share, task)[1] for b in batches]
    assert {g.dtype for part in parts for g in tree.values(part)} == {torch.bfloat16}
    monkeypatch.setattr(train.optim, "adamw", lambda _, grads, *rest: seen.append(grads))
    train.train_step(state, batches, task)
    summed = [a.float() + b.float() + c.float() for a, b, c in zip(*map(tree.values, parts), strict=True)]
    same(seen[0], tree.rebuild(params, summed))
    assert any(not torch.equal(x, x.bfloat16().float()) for x in summed)


@pytest.mark.parametrize("leaf", [("llama", "blocks", "1", "w_down"), ("projector", "b2")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run_before_anything_changes(params, tiny, samples, leaf, value):
    state, task = begin(params, tiny)
    state = replace(state, step=6)
    state.params[leaf].view(-1)[0] = value
    before = [copy(t) for t in (state.params, state.moments.first, state.moments.second)]
    with pytest.raises(NonFinite, match="step 7: the loss is (nan|inf)") as caught:
        train.train_step(state, grouped(samples, 5, 7), task)
    assert all(s.record in str(caught.value) for s in samples)
    for a, b in zip(before, (state.params, state.moments.first, state.moments.second), strict=True):
        same(a, b)


def test_the_first_gradient_that_is_not_finite_is_named(params, tiny, samples, monkeypatch):
    state, task = begin(params, tiny)

    def spoiled(fn):
        def call(p, *args):
            value, grads = value_and_grad(fn)(p, *args)
            grads["llama", "blocks", "0", "wq"][0, 0] = float("nan")
            grads["llama", "norm"][0] = float("inf")
            return value, grads

        return call

    monkeypatch.setattr(train, "value_and_grad", spoiled)
    with pytest.raises(NonFinite, match="that is not finite is llama/blocks/0/wq; records: .*\nnothing was updated"):
        train.train_step(state, grouped(samples, 12), task)
    same(state.params, params)


@pytest.mark.parametrize("batches", [[], [collate([], 2, 16)] * 3])
def test_an_update_without_a_sample_counts_the_step_and_changes_nothing_else(params, tiny, batches):
    state, task = begin(params, tiny)
    moments = [copy(x) for x in (state.moments.first, state.moments.second)]
    after, m = train.train_step(state, batches, task)
    assert after.step == 1 and (m.tokens, m.labelled, m.samples) == (0, 0, 0) and math.isnan(m.loss)
    assert m.lr == optim.learning_rate(OPTIM, 1, 20)
    same(after.params, params)
    for a, b in zip((after.moments.first, after.moments.second), moments, strict=True):
        same(a, b)


def test_training_overfits_four_samples(params, tiny, samples):
    state, task = begin(params, tiny, optim=Optim(lr=2e-2, warmup=0.05, beta2=0.98), steps=150)
    losses = []
    for _ in range(150):
        state, m = train.train_step(state, grouped(samples[:4], 4), task)
        losses.append(m.loss)
    assert losses[0] > 5 and losses[-1] < 0.1


def test_the_rate_follows_the_schedule_of_the_whole_run(params, tiny, samples):
    c = Optim(lr=1e-2, warmup=0.2)
    state, metrics = run(params, tiny, grouped(samples, 4), 5, optim=c)
    assert [m.lr for m in metrics] == [optim.learning_rate(c, k, 20) for k in range(1, 6)] and state.step == 5
    still, (m,) = run(params, tiny, grouped(samples, 4), 1, optim=c)
    assert m.lr == 0
    same(still.params, params)


class Fused:
    """Stands for the compiled kernels: counts their calls, and knows what is launched inside them."""

    def __init__(self):
        self.calls, self.inside = Counter(), False

    def __call__(self, reference):
        def run(*args):
            self.calls[f"{reference.__module__.rpartition('.')[2]} {reference.__name__}"] += 1
            self.inside = True
            out = reference(*args)
            self.inside = False
            return out

        return run


class HostReads(TorchDispatchMode):
    """A card of tensors without values. Counts what the host reads of them, as zeros, and refuses copies to them."""

    def __init__(self, fused):
        super().__init__()
        self.reads, self.fused, self.unfused = 0, fused, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        if name == "aten::_to_copy" and kwargs.get("device") == torch.device("cpu"):
            self.reads += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        if not self.fused.inside:
            self.unfused[name] += 1
        out = func(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.ndim}
        assert len(devices) < 2, f"{name} copies between {devices}"
        return out


@pytest.mark.skipif(varlen_attn.__module__ == "llava_fn.kernels.varlen", reason="this torch has none")
@pytest.mark.parametrize(
    "stage, dtype", [("projector", torch.bfloat16), ("all", torch.bfloat16), ("all", torch.float32)]
)
def test_a_step_on_a_card_makes_the_host_wait_once_and_runs_fused_kernels(tiny, samples, stage, dtype, monkeypatch):
    fused = Fused()
    monkeypatch.setattr("llava_fn.kernels.compiled.by_inductor", fused)
    for name in ("attention", "rms_norm", "add_rms_norm", "rotary", "swiglu", "quick_gelu", "gelu", "layer_norm",
                 "adamw", "cross_entropy", "patch_embedding"):  # fmt: skip
        module = import_module(f"llava_fn.kernels.{name}")
        if hasattr(module, "choose"):
            monkeypatch.setattr(module, "choose", lambda x, reference, **fused: fused.get("cuda", reference))
    wide = replace(tiny, vision=replace(tiny.vision, width=32, heads=2), llama=replace(tiny.llama, width=32, heads=4))
    p = spec.build(llava.spec(wide), lambda _, leaf: torch.empty(leaf.shape, device="meta"))
    state, task = begin(p, wide, stage, zero=Zero(dtype=dtype))
    task = replace(task, frozen=tree.cast(task.frozen, dtype))
    batches = [batch.to(torch.device("meta")) for batch in grouped(samples, 3, 2)]
    with HostReads(fused) as host:
        state, metrics = train.train_step(state, batches, task)
    assert host.reads == 1 and state.step == 1 and metrics.loss == metrics.grad_norm == 0
    blocks = 2 * wide.llama.blocks  # of both micro-batches
    assert fused.calls == {
        "rotary reference": 2 * blocks, "swiglu gated": blocks, "rms_norm reference": blocks + 2,
        "add_rms_norm reference": blocks,
    }  # fmt: skip
    assert not {"aten::silu", "aten::rsqrt", "aten::addcmul"} & host.unfused.keys()  # of forward passes
