"""The activations of CLIP, the projector and Llama."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. Source: Shazeer 2020, arXiv 2002.05202, eq. 6."""
    return F.silu(gate) * up


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x). Source: OpenAI clip/model.py, QuickGELU."""
    return x * torch.sigmoid(1.702 * x)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) with the exact erf, never the tanh form. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return F.gelu(x, approximate="none")
