"""AdamW, clipping and the schedule, against torch and transformers."""

import pytest
import torch
from tensordict import TensorDict
from transformers import get_cosine_schedule_with_warmup

from llava_fn import llava, optim, spec, tree
from llava_fn.config import Optim

STEPS = 5198  # LLaVA-1.5: 665 k records of stage 2 in updates of 128


@pytest.fixture(scope="module")
def params(tiny):
    return spec.init(llava.spec(tiny), 0)


def random_like(params, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return tree.rebuild(params, [torch.randn(p.shape, generator=rng) * scale for p in tree.values(params)])


def copy(params):
    return tree.rebuild(params, [p.clone() for p in tree.values(params)])


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_equals_torch_with_decay_of_weights_alone(params, decay):
    c = Optim(lr=3e-3, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=decay)
    mine, moments = copy(params), optim.init(params)
    theirs = [p.clone().requires_grad_() for p in tree.values(params)]
    groups = [{"params": [p for p in theirs if p.ndim > 1]}, {"params": [p for p in theirs if p.ndim == 1]}]
    assert groups[1]["params"]
    oracle = torch.optim.AdamW(groups, lr=c.lr, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    oracle.param_groups[1]["weight_decay"] = 0.0
    for step in range(1, 6):
        grads = random_like(params, step)
        lr = c.lr * step / 5
        optim.adamw(mine, grads, moments, step, lr, c)
        for group in oracle.param_groups:
            group["lr"] = lr
        for p, g in zip(theirs, tree.values(grads), strict=True):
            p.grad = g
        oracle.step()
    for a, b in zip(tree.values(mine), theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
    for a, p in zip(tree.values(moments.second), theirs, strict=True):
        torch.testing.assert_close(a, oracle.state[p]["exp_avg_sq"], rtol=1e-5, atol=1e-7)


def test_one_update_is_that_of_the_paper():
    c = Optim(lr=0.1, beta1=0.9, beta2=0.99, eps=0.5, weight_decay=0.2)
    p = TensorDict({"w": torch.full((1, 1), 2.0), "b": torch.full((1,), 2.0)}).lock_()
    g = TensorDict({"w": torch.full((1, 1), 3.0), "b": torch.full((1,), 3.0)}).lock_()
    moments = optim.init(p)
    optim.adamw(p, g, moments, 1, 0.1, c)
    step = 0.1 * 3 / (3 + 0.5)
    assert p["b"].item() == pytest.approx(2 - step) and p["w"].item() == pytest.approx(2 * (1 - 0.1 * 0.2) - step)
    assert moments.first["w"].item() == pytest.approx(0.3) and moments.second["w"].item() == pytest.approx(0.09)


@pytest.mark.parametrize("scale, limit", [(1.0, 1.0), (1e-4, 1.0), (1.0, 30.0), (1.0, 0.0)])
def test_clip_equals_torch(params, scale, limit):
    mine = random_like(params, 3, scale)
    theirs = [torch.zeros_like(g).requires_grad_() for g in tree.values(mine)]
    for p, g in zip(theirs, tree.values(mine), strict=True):
        p.grad = g.clone()
    norm = tree.global_norm(mine)
    optim.clip(mine, norm, limit)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit or float("inf")))
    for a, p in zip(tree.values(mine), theirs, strict=True):
        torch.testing.assert_close(a, p.grad)
    after = tree.global_norm(mine).item()
    assert after == pytest.approx(min(norm.item(), limit or float("inf")), rel=1e-5)


def test_published_fine_tuning_has_156_warm_up_updates_and_begins_at_zero():
    c = Optim(lr=2e-5, warmup=0.03)
    rates = [optim.learning_rate(c, step, STEPS) for step in range(1, STEPS + 1)]
    assert rates[0] == 0.0
    assert rates[22] == pytest.approx(2e-5 * 22 / 156, rel=1e-12)
    assert rates[156] == 2e-5 == max(rates) and rates[155] < 2e-5 > rates[157]
    assert 0 < rates[-1] < 1e-11
    assert rates[156 + 2521] == pytest.approx(1e-5, rel=1e-12)  # halfway down


@pytest.mark.parametrize("steps, warmup", [(STEPS, 0.03), (7, 0.5), (10, 0.0), (3, 1.0), (1, 0.03)])
def test_the_schedule_is_that_of_transformers(steps, warmup):
    c = Optim(lr=0.7, warmup=warmup)
    oracle = torch.optim.SGD([torch.zeros(1)], lr=0.7)
    schedule = get_cosine_schedule_with_warmup(oracle, -int(-warmup * steps // 1), steps)
    for step in range(1, steps + 1):
        assert optim.learning_rate(c, step, steps) == pytest.approx(oracle.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        oracle.step()
        schedule.step()


def test_the_cosine_ends_at_the_share_of_the_peak_that_min_lr_says():
    c = Optim(lr=0.5, warmup=0.0, min_lr=0.2)
    rates = [optim.learning_rate(c, step, 1000) for step in range(1, 1002)]
    assert rates[0] == 0.5 and rates[-1] == pytest.approx(0.1) and rates == sorted(rates, reverse=True)
    assert rates[500] == pytest.approx(0.3)


def test_moments_begin_as_zeros_with_the_paths_of_the_parameters(params):
    moments = optim.init(params)
    for m in (moments.first, moments.second):
        assert tree.paths(m) == tree.paths(params) and not any(leaf.any() for leaf in tree.values(m))
    assert moments.first["projector", "w1"].data_ptr() != moments.second["projector", "w1"].data_ptr()
