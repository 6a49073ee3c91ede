"""One AdamW update of many tensors.

Contract: params, grads, first and second moments are lists of equal length, all fp32 (or all fp64, except on an NPU).
params and moments are updated in place. Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_fn.kernels.dispatch import choose, require


@dataclass(frozen=True)
class Coefficients:
    """Hyperparameters of one update. The decoupled weight decay is lr * weight_decay."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


Leaves = Sequence[Tensor]


def adamw(params: Leaves, grads: Leaves, first: Leaves, second: Leaves, step: int, c: Coefficients) -> None:
    """Update number `step` (from 1) of at least one tensor, in place; see the module's contract."""
    choose(params[0], reference, cpu=fused, cuda=fused, npu=fused)(params, grads, first, second, step, c)


def reference(params: Leaves, grads: Leaves, first: Leaves, second: Leaves, step: int, c: Coefficients) -> None:
    """The algorithm, leaf by leaf."""
    for p, g, m, v in zip(params, grads, first, second, strict=True):
        p.mul_(1 - c.lr * c.weight_decay)
        m.lerp_(g, 1 - c.beta1)
        v.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)
        root = (v / (1 - c.beta2**step)).sqrt_().add_(c.eps)
        p.addcdiv_(m, root, value=-c.lr / (1 - c.beta1**step))


def fused(params: Leaves, grads: Leaves, first: Leaves, second: Leaves, step: int, c: Coefficients) -> None:
    """torch._fused_adamw_, which has a kernel on all three devices; on an NPU it runs aclnnApplyAdamWV2.

    Not torch_npu's NpuFusedAdamW, which moves all parameters into one storage and forbids replacing them.
    """
    dtypes = {str(x.dtype) for leaves in (params, grads, first, second) for x in leaves}
    uniform = dtypes in ({"torch.float32"}, {"torch.float64"})  # fp64: parallel training is checked in it
    require(uniform, "_fused_adamw_", f"float32 alone, not {', '.join(sorted(dtypes))}")
    number = torch.full((), float(step), device=params[0].device)  # only read: all leaves share one tensor
    torch._fused_adamw_(
        list(params), list(grads), list(first), list(second), [], [number] * len(params), lr=c.lr, beta1=c.beta1,
        beta2=c.beta2, weight_decay=c.weight_decay, eps=c.eps, amsgrad=False, maximize=False,
    )  # fmt: skip
