"""The product of rows and a weight: a linear layer.

Contract: x: ... k, w: n k, bias: n or None, all of one dtype -> x w^T + bias, ... n. w may be one of `pack`.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.dispatch import FORCED, choose, in_transform

FEW = 8  # rows
FEW_AVX512 = 4  # above it oneDNN is faster
LARGE = 2**18  # values of a weight from which oneDNN's product is worth its call
PACKED_FOR = 600  # rows; an order in memory for so many is the best one for a few, too


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: ... k, w: n k, bias: n -> ... n; see the module's contract."""
    return choose(x, F.linear, cpu=cpu)(x, w, bias)


def pack(w: Tensor) -> Tensor:
    """w: n k in the order in which oneDNN multiplies it, where it is faster so; else w. For `linear` alone.

    That is on a CPU with AVX-512, in fp32. A product of 4 or 8 rows takes 0.5 to 0.7 of the time, of 2 rows 1.5 times
    as long (bench/RESULTS.md). A packed weight has no gradient and no transforms of torch.func; for that of x it is
    unpacked in the backward pass, one weight at a time.
    """
    if FORCED or w.device.type != "cpu" or w.dtype != torch.float32 or w.numel() < LARGE or not avx512():
        return w
    return torch.ops.mkldnn._reorder_linear_weight(w.detach().contiguous(), PACKED_FOR)


def cpu(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear, which is MKL's product; in fp32 one of two others where it is faster, outside torch.func.

    For a few rows without gradients that is w x^T, in which the weight is the first factor: as the second, MKL packs a
    weight anew in every call, which takes as long as reading it. Else it is oneDNN's product, with AVX-512
    (bench/RESULTS.md).
    """
    gradients = torch.is_grad_enabled() and any(z.requires_grad for z in (x, w, bias) if z is not None)
    if w.is_mkldnn and x.numel():
        return _OneDNN.apply(x, w, bias) if gradients else one_dnn(x, w, bias)
    if w.is_mkldnn:
        w = w.to_dense()  # oneDNN has no product of no rows
    if in_transform() or torch.compiler.is_compiling() or x.dtype != torch.float32 or x.ndim != 2:
        return F.linear(x, w, bias)
    if 1 < len(x) <= (FEW_AVX512 if avx512() else FEW) and not gradients:
        y = (w @ x.contiguous().t()).t().contiguous()
        return y if bias is None else y.add_(bias)
    if avx512() and len(x) and w.numel() >= LARGE:
        return _OneDNN.apply(x, w, bias) if gradients else one_dnn(x, w, bias)
    return F.linear(x, w, bias)


def one_dnn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product, which has no gradient, silently."""
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    """`one_dnn` with gradients. That of the weight is MKL's product, which is the faster one there."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return one_dnn(x, w, bias)

    @staticmethod
    def backward(ctx, *gs: Tensor):
        (g,), (x, w) = gs, ctx.saved_tensors
        d_bias = g.sum_to_size(g.shape[-1:]) if ctx.needs_input_grad[2] else None
        d_weight = None if x is None else g.t() @ x
        if w is None:
            return None, d_weight, d_bias
        return cpu(g, (w.to_dense() if w.is_mkldnn else w).t()), d_weight, d_bias


@cache  # every product asks
def avx512() -> bool:
    """Whether torch runs on AVX-512 and has oneDNN."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
