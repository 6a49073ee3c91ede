"""Saliency against transformers' gradients, finite differences, and the axioms of integrated gradients."""

import pytest
import torch
from exchanges import exchange_of, logprobs_of
from oracles import CONFIGS, hf_inputs, hf_llava, ours, sample
from rounding import same_but_rounded

from llava_fn import tree
from llava_fn.generate.types import Model
from llava_fn.study.saliency import flat, gradient, integrated, normalised, score, smooth


@pytest.mark.parametrize("c", CONFIGS, ids=range(len(CONFIGS)))
def test_gradients_of_each_word_for_pixels_equal_transformers(c):
    peer, s = hf_llava(c), sample(c, 3, "p2ip3i4")
    m = Model(ours(peer, c), c)
    e, inputs = exchange_of(m, s), hf_inputs(c, [s])
    pixels = inputs["pixel_values"].requires_grad_()
    want = e.per_word(logprobs_of(peer(**inputs).logits[:, :-1], e))
    f, x = score(m, e), normalised(m, e)
    assert torch.equal(x, pixels)
    with torch.no_grad():
        same_but_rounded(f(torch.stack([x, -x, x]))[2], want)  # copies do not see each other
    grads = [torch.autograd.grad(y, pixels, retain_graph=True)[0] for y in want]
    same_but_rounded(gradient(f, x[None])[:, 0], torch.stack(grads))


@pytest.fixture(scope="module")
def case(tiny, lively):
    """A score in fp64, and the pictures."""
    m = Model(tree.cast(lively, torch.float64), tiny)
    e = exchange_of(m, sample(tiny, 3, "p2ip4"))
    return score(m, e), normalised(m, e).double(), m


def test_gradients_equal_finite_differences(case):
    f, x, _ = case
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    (up, down), h = f(torch.stack([x + 1e-5 * v, x - 1e-5 * v])), 2e-5
    slopes = (gradient(f, x[None])[:, 0] * v).flatten(1).sum(1)
    torch.testing.assert_close((up - down) / h, slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("colour", ["mean", "white"])
def test_integrated_gradients_are_complete(case, colour):
    f, x, m = case
    base = flat(m, x, colour).to(x)
    end, start = f(torch.stack([x, base]))
    shares = integrated(f, x, base, 200, batch=64)
    torch.testing.assert_close(shares.flatten(1).sum(1), end - start, rtol=1e-4, atol=1e-4)
    assert (end - start).abs().min() > 0.1
    assert not integrated(f, x, x, 3).any() and integrated(f, x, base, 1).flatten(1).sum(1).ne(end - start).all()


def test_integrated_gradients_of_a_cubic_are_known_and_do_not_depend_on_the_batch():
    def f(x):
        return torch.stack([(x**3).sum(1), x[:, 0] * x[:, 1]], 1)

    x, base = torch.tensor([2.0, -1.0, 3.0]), torch.tensor([1.0, 1.0, 0.0])
    want = torch.tensor([[7.0, -2.0, 27.0], [0.0, -3.0, 0.0]])  # of x y from (1, 1) to (2, -1): 1 * 0, -2 * 1.5
    for batch in (1, 2, 16):
        torch.testing.assert_close(integrated(f, x, base, 2, batch), want)


def test_smoothgrad_is_the_mean_of_gradients_at_noisy_pictures(case):
    f, x, _ = case
    one = gradient(f, x[None])[:, 0]
    torch.testing.assert_close(smooth(f, x, 0.0, 3, 0), one)
    rng = torch.Generator().manual_seed(7)
    noisy = [x + 0.5 * torch.randn(x.shape, generator=rng).to(x) for _ in range(5)]
    want = torch.stack([gradient(f, y[None])[:, 0] for y in noisy]).mean(0)
    for batch in (2, 8):
        torch.testing.assert_close(smooth(f, x, 0.5, 5, 7, batch), want)
    assert (want - one).abs().max() > 0.1 * one.abs().max()


def test_numbers_that_mean_nothing_are_refused(case):
    f, x, _ = case
    with pytest.raises(ValueError, match="steps=0"):
        integrated(f, x, x, 0)
    with pytest.raises(ValueError, match="equal shapes"):
        integrated(f, x, x[:, :1], 1)
    with pytest.raises(ValueError, match="no negative noise"):
        smooth(f, x, -1.0, 1, 0)
