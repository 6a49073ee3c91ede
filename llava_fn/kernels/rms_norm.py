"""RMSNorm over the last dim.

Contract: x: ... d, gain: d -> x * gain / sqrt(mean(x^2) + eps), in x's dtype. Computed in fp32 and rounded once, at the
end, as npu_rms_norm does. Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
Differs: HF's LlamaRMSNorm rounds before it multiplies by the gain: up to one unit in the last place apart in bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.compiled import compiled
from llava_fn.kernels.dispatch import choose, npu_op, require, require_float
from llava_fn.kernels.precision import at_least_fp32


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x: ... d, gain: d -> ... d in x's dtype; see the module's contract."""
    return choose(x, reference, npu=npu, cuda=cuda, cpu=cpu)(x, gain, eps)


def reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The formula: on the CPU the backward pass of F.rms_norm takes four times as long (torch 2.13)."""
    h = at_least_fp32(x)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * at_least_fp32(gain)).to(x.dtype)


def cpu(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The reference; without gradients and in one dtype, torch's fused kernel."""
    if torch.is_grad_enabled() or x.dtype != gain.dtype:
        return reference(x, gain, eps)
    return F.rms_norm(x, gain.shape, gain, eps)


cuda = compiled(reference)


def npu(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """npu_rms_norm: on an NPU F.rms_norm runs as five ops."""
    check("npu_rms_norm", x, gain)
    return npu_op("npu_rms_norm")(x, gain, eps)[0]


def check(op: str, x: Tensor, gain: Tensor) -> None:
    """ValueError unless the NPU's norms support x and gain: gain of x's last dim, in x's dtype or fp32."""
    require_float(op, x)
    require(
        gain.dtype in (x.dtype, torch.float32), op, f"gain in x's dtype or float32, not {gain.dtype} for x in {x.dtype}"
    )
    require(gain.shape == x.shape[-1:], op, f"gain of x's last dim, not {tuple(gain.shape)} for x of {tuple(x.shape)}")
