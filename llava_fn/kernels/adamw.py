"""One AdamW update of many tensors.

Contract: params, grads, first and second moments: lists of equal length, fp32 (all fp64 too, but on an NPU); params
and moments are written in place. Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_fn.kernels.dispatch import choose, require


@dataclass(frozen=True)
class Coefficients:
    """Of one update. weight_decay: decoupled, times lr."""

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

    Not torch_npu's NpuFusedAdamW, which joins the storages of the parameters and forbids new ones.
    """
    dtypes = {str(x.dtype) for leaves in (params, grads, first, second) for x in leaves}
    alone = dtypes in ({"torch.float32"}, {"torch.float64"})  # the latter to check parallel training in
    require(alone, "_fused_adamw_", f"float32 alone, not {', '.join(sorted(dtypes))}")
    number = torch.full((), float(step), device=params[0].device)  # read only, so that one serves all leaves
    torch._fused_adamw_(
        list(params), list(grads), list(first), list(second), [], [number] * len(params), lr=c.lr, beta1=c.beta1,
        beta2=c.beta2, weight_decay=c.weight_decay, eps=c.eps, amsgrad=False, maximize=False,
    )  # fmt: skip
