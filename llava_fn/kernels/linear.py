"""The product of rows and a weight: a linear layer.

Contract: x: ... k, w: n k, bias: n or None, all of one dtype -> x w^T + bias, ... n.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.dispatch import choose

FEW = 8  # rows
FEW_AVX512 = 4  # above it oneDNN is faster
LARGE = 2**18  # values of a weight from which oneDNN's product is worth its call


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: ... k, w: n k, bias: n -> ... n; see the module's contract."""
    return choose(x, F.linear, cpu=cpu)(x, w, bias)


def cpu(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear, which is MKL's product; in fp32 without gradients one of two others where it is faster.

    For a few rows that is w x^T, in which the weight is the first factor: as the second, MKL packs a weight anew in
    every call, which takes as long as reading it. Else it is oneDNN's product, with AVX-512 (bench/RESULTS.md).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != torch.float32 or x.ndim != 2:
        return F.linear(x, w, bias)
    if not 1 < len(x) <= (FEW_AVX512 if avx512() else FEW):
        if avx512() and len(x) and w.numel() >= LARGE:
            return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
        return F.linear(x, w, bias)
    y = (w @ x.contiguous().t()).t().contiguous()
    return y if bias is None else y.add_(bias)


@cache  # every product asks
def avx512() -> bool:
    """Whether torch runs on AVX-512 and has oneDNN."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
