"""The product of rows and a weight: a linear layer.

Contract: x: ... k, w: n k, bias: n or None, all of one dtype -> x w^T + bias, ... n.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.dispatch import choose

FEW = 8  # rows


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: ... k, w: n k, bias: n -> ... n; see the module's contract."""
    return choose(x, F.linear, cpu=cpu)(x, w, bias)


def cpu(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear; for a few rows of fp32 without gradients w x^T, in which the weight is the first factor.

    As the second factor MKL packs a weight anew in every call, which takes as long as reading it (bench/RESULTS.md).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != torch.float32 or x.ndim != 2:
        return F.linear(x, w, bias)
    if not 1 < len(x) <= FEW:
        return F.linear(x, w, bias)
    y = (w @ x.contiguous().t()).t().contiguous()
    return y if bias is None else y.add_(bias)
