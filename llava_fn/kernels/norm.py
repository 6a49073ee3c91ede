"""RMSNorm and LayerNorm over the last dim, computed in fp32 and rounded once to x's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x * gain / sqrt(mean(x^2) + eps). x: ... d, gain: d -> ... d in x's dtype.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
    Differs: HF's LlamaRMSNorm rounds before it multiplies by the gain; here, as on NPUs, one rounding stands at the
    end, up to one unit in the last place apart in bf16.
    """
    h = x.float()  # spelled out: on the CPU the backward pass of F.rms_norm takes four times as long (torch 2.13)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * gain.float()).to(x.dtype)


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * gain + bias. x: ... d, gain and bias: d -> ... d in x's dtype.

    Source: Ba et al. 2016, arXiv 1607.06450; fp32 inside as OpenAI's CLIP does (clip/model.py, LayerNorm).
    """
    return F.layer_norm(x.float(), gain.shape, gain.float(), bias.float(), eps).to(x.dtype)
