"""Probes of weights: the gradient of a weight, sample by sample, out of one backward pass over the stream.

A probe adds to the output of a linear layer, for the rows x of sample s, the product out^T delta[s] inp x, where delta
is zero. The model computes what it did, and the gradient of delta[s] is the gradient of the weight that sample s alone
has, projected from both sides: the sum of (out g)(inp x)^T over the rows of the sample, where g is the gradient of the
output. Nothing of the size of samples x weight exists unless nothing is projected.

The leaf: probe = {delta: f[n, o, i], rows: int64[n] on the host, inp: f[i, in], out: f[o, out]}. rows: of each sample,
in the order of the stream. Without `inp` or `out` that side is not projected. Where the layer has a bias, a last input
of 1 stands for it: `inp` then has in + 1 columns, and without it i is in + 1.

Other weights are linear layers too. An embedding table is one whose input is 1 at the token and 0 elsewhere, with
out and in exchanged: its outputs are the table's columns. It takes tokens: int64[n], the rows of its own, so that a
table that is also the head has both. The gain of a norm is one with a single input, which is 1, whose output the
normalised row multiplies.
Source: Choe et al. 2024 (LoGra), arXiv 2405.13954, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor


def probed(x: Tensor, y: Tensor, probe: TensorDict, bias: bool) -> Tensor:
    """y, with a gradient for probe["delta"]. x: f[..., in], y: f[..., out]; bias: whether the layer has one."""
    inp, out = (probe[name] if name in probe else None for name in ("inp", "out"))
    return _Probe.apply(y, x, probe["delta"], inp, out, tuple(probe["rows"].tolist()), bias)


def probed_embedding(y: Tensor, ids: Tensor, probe: TensorDict) -> Tensor:
    """y, with a gradient for probe["delta"]: f[n, v, d]. y: f[t, d], what the table gives for ids: int64[t]."""
    delta, tokens = probe["delta"], tuple(probe["tokens"].tolist())
    x = probe["out"].t()[ids] if "out" in probe else F.one_hot(ids, delta.shape[1])
    return _Probe.apply(y, x, delta.mT, None, probe["inp"] if "inp" in probe else None, tokens, False)


def part(w: Tensor | TensorDict, start: int, stop: int) -> Tensor | TensorDict:
    """A weight for the rows from `start` to `stop` alone of those that it is probed for."""
    if isinstance(w, Tensor) or "probe" not in w:
        return w
    rows = w["probe", "rows"]
    ends = rows.cumsum(0)
    inside = ends.clamp(start, stop) - (ends - rows).clamp(start, stop)
    return TensorDict({"w": w["w"], "probe": {**w["probe"], "rows": inside}})


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(y, x, delta, inp, out, rows, bias):
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, x, delta, inp, out, ctx.rows, ctx.bias = inputs
        ctx.save_for_backward(x, inp, out)
        ctx.dtype = delta.dtype

    @staticmethod
    def backward(ctx, *gs: Tensor):
        (gy,) = gs
        x, inp, out = ctx.saved_tensors
        g, x = gy.flatten(0, -2).to(ctx.dtype), x.flatten(0, -2).to(ctx.dtype)
        if ctx.bias:
            x = F.pad(x, (0, 1), value=1.0)
        g, x = (v if by is None else v @ by.t() for v, by in ((g, out), (x, inp)))
        return gy, None, outer(g, x, ctx.rows), None, None, None, None


def outer(g: Tensor, x: Tensor, rows: Sequence[int]) -> Tensor:
    """The sum of g x^T over the rows of each sample, f[n, o, i]. g: f[t, o], x: f[t, i]; rows: their number, n."""
    runs = [(size, len(list(run))) for size, run in groupby(rows)]  # neighbours with as many rows are one product
    sizes = [size * count for size, count in runs]
    parts = zip(runs, g.split(sizes), x.split(sizes), strict=True)
    return torch.cat([g.reshape(n, t, g.shape[1]).mT @ x.reshape(n, t, x.shape[1]) for (t, n), g, x in parts])
