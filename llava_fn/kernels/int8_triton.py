"""The CUDA form of int8_linear for few rows, in Triton: each code is read once, as eight bits.

A program computes OUTPUTS outputs for all rows of x. The codes become x's dtype in registers; the product runs on the
tensor cores and sums in fp32. A decoding step is bound by the codes that it reads, so that nothing else counts.
Imported by int8_linear.py alone, on a machine that has Triton.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]  # comes with torch where that is built for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

OUTPUTS, INPUTS = 16, 256  # of a program, and of one turn of its loop
TILE = 16  # rows of x that the tensor cores take at a time


@triton.jit
def kernel(x, codes, scale, y, b, n, k, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, B: tl.constexpr):
    """y: b n = x: b k times (codes: n k, scale: n)^T, all contiguous; program j has outputs j OUTPUTS and on."""
    rows = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    columns, tokens = tl.arange(0, INPUTS), tl.arange(0, B)
    total = tl.zeros((OUTPUTS, B), tl.float32)
    for start in range(0, k, INPUTS):
        at = start + columns
        inside = (rows[:, None] < n) & (at[None, :] < k)
        w = tl.load(codes + rows[:, None].to(tl.int64) * k + at[None, :], mask=inside, other=0)
        a = tl.load(x + tokens[None, :] * k + at[:, None], mask=(tokens[None, :] < b) & (at[:, None] < k), other=0.0)
        total = tl.dot(w.to(a.dtype), a, total)
    total *= tl.load(scale + rows, mask=rows < n, other=0.0)[:, None]
    place = y + tokens[None, :] * n + rows[:, None]
    tl.store(place, total.to(y.dtype.element_ty), mask=(rows[:, None] < n) & (tokens[None, :] < b))


def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x: b k in half precision, codes: int8[n, k], scale: fp32[n, 1], all contiguous -> b n in x's dtype."""
    (b, k), n = x.shape, len(codes)
    y = torch.empty(b, n, dtype=x.dtype, device=x.device)
    rows = triton.next_power_of_2(-(-b // TILE)) * TILE
    launch = kernel[(triton.cdiv(n, OUTPUTS),)]  # pyright: ignore[reportIndexIssue]  # jit makes it a grid of programs
    launch(x, codes, scale, y, b, n, k, OUTPUTS, INPUTS, rows)
    return y
