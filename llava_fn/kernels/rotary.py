"""Rotary position embedding, half-rotation form (GPT-NeoX, HF Llama)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32[t, 1, h], of positions: int64[t]; both halves of h hold the same angles.

    Source: Su et al. 2021, arXiv 2104.09864, eq. 34, with the pairs (j, j + h/2).
    """
    rates = theta ** -(torch.arange(0, head, 2, device=positions.device, dtype=torch.float32) / head)
    angles = (positions.float()[:, None] * rates).repeat(1, 2)[:, None]  # t 1 h
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin. x: t n h, cos and sin: t 1 h, cast to x's dtype first -> t n h."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat([-b, a], -1), sin.to(x.dtype))
