"""Rotary position embedding, half-rotation form (GPT-NeoX, HF Llama).

Contract: x: t n h, cos and sin: t 1 h -> x * cos + rotate_half(x) * sin, t n h. cos and sin are rounded to x's dtype
first, as in npu_rotary_mul and in HF. h is even.
Source: Su et al. 2021, arXiv 2104.09864, eq. 34, with the pairs (j, j + h/2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fn.kernels.compiled import compiled
from llava_fn.kernels.dispatch import choose, npu_op, require, require_float


def rotary_tables(positions: Tensor, head: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32[t, 1, h], of positions: int64[t]; both halves of h hold the same angles."""
    rates = theta ** -(torch.arange(0, head, 2, device=positions.device, dtype=torch.float32) / head)
    angles = (positions.float()[:, None] * rates).repeat(1, 2)[:, None]  # t 1 h
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: t n h, cos and sin: t 1 h -> t n h; see the module's contract."""
    return choose(x, reference, npu=npu, cuda=cuda)(x, cos, sin)


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat([-b, a], -1), sin.to(x.dtype))


cuda = compiled(reference)


def npu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """npu_rotary_mul in BSND with a batch of one, which allows every length; older versions lack TND.

    Not npu_apply_rotary_pos_emb, which silently overwrites its inputs and has no gradient.
    """
    t, n, h = x.shape
    require_float("npu_rotary_mul", x)
    require(h % 2 == 0 and h < 896, "npu_rotary_mul", f"an even head size below 896, not {h}")
    require(n < 1000, "npu_rotary_mul", f"fewer than 1000 heads, not {n}")
    require(
        cos.shape == sin.shape == (t, 1, h), "npu_rotary_mul",
        f"tables of {(t, 1, h)}, not {tuple(cos.shape)} and {tuple(sin.shape)}",
    )  # fmt: skip
    require(not (cos.requires_grad or sin.requires_grad), "npu_rotary_mul", "tables that do not require a gradient")
    cos, sin = (table.to(x.dtype)[None] for table in (cos, sin))
    return npu_op("npu_rotary_mul")(x[None], cos, sin, "half")[0]
