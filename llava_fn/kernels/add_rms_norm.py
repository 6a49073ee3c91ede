"""The residual addition and the RMSNorm that follows it, in one pass over memory.

Contract: x, y: ... d, gain: d -> (x + y, RMSNorm of the sum), both in x's dtype. The sum is rounded to x's dtype before
it is normalised. Otherwise as rms_norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fn.kernels.compiled import compiled
from llava_fn.kernels.dispatch import choose, npu_op, require
from llava_fn.kernels.rms_norm import check
from llava_fn.kernels.rms_norm import cpu as norm_cpu
from llava_fn.kernels.rms_norm import reference as norm_reference


def add_rms_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, y: ... d, gain: d -> (x + y, RMSNorm(x + y)); see the module's contract."""
    return choose(x, reference, npu=npu, cuda=cuda, cpu=cpu)(x, y, gain, eps)


def reference(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The addition, then the norm's reference."""
    total = x + y
    return total, norm_reference(total, gain, eps)


cuda = compiled(reference)


def cpu(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The addition, then the norm's form for a CPU: torch has no kernel for both."""
    total = x + y
    return total, norm_cpu(total, gain, eps)


def npu(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """npu_add_rms_norm, with the backward pass that torch_npu lacks. Not its _v2, which overwrites x and y."""
    check("npu_add_rms_norm", x, gain)
    require(
        x.shape == y.shape and x.dtype == y.dtype == gain.dtype,
        "npu_add_rms_norm",
        f"x and y of one shape, and x, y and gain of one dtype, not {tuple(x.shape)} and {tuple(y.shape)} in "
        f"{x.dtype}, {y.dtype} and {gain.dtype}",
    )
    total, normed, _ = _AddRmsNorm.apply(x, y, gain, eps)
    return total, normed


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        normed, scale, total = npu_op("npu_add_rms_norm")(x, y, gain, eps)
        return total, normed, scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        total, _, scale = output
        ctx.mark_non_differentiable(scale)
        ctx.save_for_backward(total, inputs[2], scale)

    @staticmethod
    def backward(ctx, *grads):
        d_total, d_normed, _ = grads
        total, gain, scale = ctx.saved_tensors
        d, d_gain = npu_op("npu_rms_norm_backward")(d_normed.contiguous(), total, gain, scale)
        d = d + d_total
        return d, d, d_gain, None  # autograd rounds d_gain, which is fp32, to gain's dtype
