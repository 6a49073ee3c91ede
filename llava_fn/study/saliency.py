"""Which pixels the log-probability of each word of an answer depends on.

    f = score(a.model, e)                          # pixels -> log-probability of each word
    x = normalised(a.model, e)
    gradient(f, x[None])                           # how f changes with each pixel
    integrated(f, x, torch.zeros_like(x), 32)      # shares of f(x) - f(mean colour)
    smooth(f, x, sigma=0.3, samples=32, seed=0)    # the mean gradient at noisy pictures

The three take any differentiable f: f[n, ...] -> fp32[n, w] whose row j depends on row j alone. Copies of the pictures
are copies of the segment in one stream, and w backward passes share one forward pass. Pixels are the tower's input, in
units of CLIP's standard deviation of each channel; the bytes of a file are no place to take a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from llava_fn import llava, projector
from llava_fn.batch import IMAGE
from llava_fn.generate.types import Model
from llava_fn.parallel import vocab
from llava_fn.study.exchange import Exchange, logprobs

Score = Callable[[Tensor], Tensor]


def normalised(m: Model, e: Exchange) -> Tensor:
    """The pictures as the image tower reads them, f32[i, 3, h, w], where gradients are taken."""
    return llava.tower(m.config.vision).normalise(e.pixels.to(m.embed.device))


def score(m: Model, e: Exchange) -> Score:
    """f32[n, i, 3, h, w], n versions of the normalised pictures -> log-probability of each word in nats, fp32[n, w]."""
    tower, c = llava.tower(m.config.vision), m.config
    ids = torch.tensor(e.prompt.ids, device=m.embed.device)

    def f(pixels: Tensor) -> Tensor:
        n = len(pixels)
        feats = tower.encode(m.params["vision"], rearrange(pixels, "n i ... -> (n i) ..."), c.vision)
        feats = rearrange(projector.project(m.params["projector"], feats), "i p d -> (i p) d")
        copies = ids.repeat(n)
        x = vocab.embed(m.embed, copies.clamp(min=0), m.tp.axis)
        x = llava.splice(x, feats, (copies == IMAGE).nonzero()[:, 0])
        return e.per_word(logprobs(m, x, e.answer, n))

    return f


def gradient(f: Score, x: Tensor) -> Tensor:
    """x: f[n, ...] -> f[w, n, ...], the derivative of each word's score for each number of x (Simonyan et al. 2013)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        scores = f(x).sum(0)
        return torch.stack([torch.autograd.grad(y, x, retain_graph=True)[0] for y in scores])


def integrated(f: Score, x: Tensor, baseline: Tensor, steps: int, batch: int = 16) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365, eq. 1), f[w, ...] for x and baseline f[...].

    The sum over all numbers of x is f(x) - f(baseline), but for the error of Gauss-Legendre quadrature with `steps`
    points. batch: points at a time. ValueError unless steps >= 1 and the shapes agree.
    """
    if steps < 1 or x.shape != baseline.shape:
        raise ValueError(
            f"steps={steps}, x {list(x.shape)}, baseline {list(baseline.shape)}: need a step, equal shapes"
        )
    nodes, weights = (torch.tensor(y, dtype=x.dtype, device=x.device) for y in np.polynomial.legendre.leggauss(steps))

    def points() -> Iterator[Tensor]:
        for part, weight in zip(nodes.split(batch), weights.split(batch), strict=True):
            along = rearrange((part + 1) / 2, f"n -> n {'1 ' * x.ndim}")
            yield torch.einsum("n,wn...->w...", weight / 2, gradient(f, baseline + along * (x - baseline)))

    return sum(points(), torch.zeros((), device=x.device)) * (x - baseline)


def smooth(f: Score, x: Tensor, sigma: float, samples: int, seed: int, batch: int = 16) -> Tensor:
    """SmoothGrad (Smilkov et al. 2017, arXiv 1706.03825): the mean gradient at x plus noise, f[w, ...] for x f[...].

    sigma: standard deviation of the noise, in the units of x. batch: samples at a time, which changes no number of the
    noise. ValueError unless samples >= 1 and sigma >= 0.
    """
    if samples < 1 or not sigma >= 0:
        raise ValueError(f"samples={samples}, sigma={sigma}: need at least one sample, and no negative noise")
    rng = torch.Generator().manual_seed(seed)

    def sums() -> Iterator[Tensor]:
        for start in range(0, samples, batch):
            noise = [torch.randn(x.shape, generator=rng) for _ in range(min(batch, samples - start))]
            yield gradient(f, x + sigma * torch.stack(noise).to(x)).sum(1)

    return sum(sums(), torch.zeros((), device=x.device)) / samples


def flat(m: Model, x: Tensor, colour: Literal["mean", "black", "white"]) -> Tensor:
    """Pictures of one colour in the shape of x: f[i, 3, h, w], normalised. mean: CLIP's, with which LLaVA pads."""
    if colour == "mean":
        return torch.zeros_like(x)
    pixels = torch.full(x.shape, 255 * (colour == "white"), dtype=torch.uint8, device=x.device)
    return llava.tower(m.config.vision).normalise(pixels)
