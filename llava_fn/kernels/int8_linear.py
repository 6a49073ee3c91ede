"""The product with a weight of eight bits: a code for each value, and a scale for each row of outputs.

Contract: x: ... k, codes: int8[n, k], scale: fp32[n, 1] -> x (codes * scale)^T, ... n, in x's dtype.
The reference makes the weight whole in x's dtype and rounds nothing else. The other forms read the codes as they are,
and round otherwise: on a CPU a product of few rows has its activations and its sums in bf16, and with VNNI a product of
more has activations of two digits of eight bits; on an NPU the scale is rounded to x's dtype; on CUDA the sums are
scaled in fp32. No form has a gradient; linear.py has x's.
Source: Dettmers et al. 2022, arXiv 2208.07339, section 2, whose products of integers `digits` takes.
"""

from __future__ import annotations

import importlib
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.dispatch import choose, npu_op, require

ROWS = 16  # above it a CPU without VNNI is faster with the weight made whole (bench/RESULTS.md)
VNNI_ROWS = 7  # above it `digits` is faster than the product in bf16
LARGE = 2**17  # values of a weight from which `digits` is faster than the weight made whole
BASE = 254  # a step of the first digit in steps of the second: half a step to either side are 127
CUDA_ROWS = 64  # the same on CUDA: above it the product is no longer bound by reading the codes
TOP = 127  # of a digit and of a code
LANES = 32  # torch's kernel for the CPU steps through k by up to so many and reads over the end of a row otherwise


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x: ... k, codes: int8[n, k], scale: fp32[n, 1] -> ... n in x's dtype; see the module's contract."""
    return choose(x, reference, npu=npu, cpu=cpu, cuda=cuda)(x, codes, scale)


def whole(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that the codes stand for, n k."""
    return (codes * scale).to(dtype)


def reference(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The whole weight, then the product."""
    return F.linear(x, whole(codes, scale, x.dtype))


def cpu(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """torch's product of bf16 rows and int8 codes, or of integers, where it is the faster one; else the reference.

    The first is fast with bf16 alone, and would round the scale as well: it is given ones. The sums are scaled in fp32.
    """
    (n, k), rows = codes.shape, x.numel() // x.shape[-1]
    if x.dtype not in (torch.float32, torch.bfloat16):
        return reference(x, codes, scale)
    graph = torch.is_grad_enabled() or torch.compiler.is_compiling()  # in training both passes have the whole weight
    if rows > VNNI_ROWS and n * k >= LARGE and k * TOP**2 < 2**31 and not graph and vnni():
        return digits(x.reshape(rows, k).float(), codes, scale).to(x.dtype).view(*x.shape[:-1], n)
    if rows > ROWS or k % LANES:
        return reference(x, codes, scale)
    y = torch._weight_int8pack_mm(x.reshape(rows, k).bfloat16(), codes, scale.new_ones(n, dtype=torch.bfloat16))
    return (y * scale[:, 0]).to(x.dtype).view(*x.shape[:-1], n)


@cache
def vnni() -> bool:
    """Whether the CPU multiplies int8 fast, and oneDNN rightly: without VNNI its sums of two products can overflow."""
    most = torch.full((16, 64), TOP, dtype=torch.int8)
    return torch.cpu._is_vnni_supported() and bool((torch._int_mm(most, most.t()) == 64 * TOP**2).all())


def digits(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x: fp32[r, k]. Each row in two digits of its own step, x = step (high + low / BASE), multiplied as integers.

    That rounds a value by 2^-16 of the row's largest. One digit would cost SmolLM2 5 % of its agreement. An infinite
    value or NaN makes its row NaN.
    """
    rows = len(x)
    step = x.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny * TOP).div_(TOP)
    low, both = x / step, x.new_empty(2 * rows, x.shape[1], dtype=torch.int8)
    both[:rows] = high = low.round()
    both[rows:] = low.sub_(high).mul_(BASE).round_()
    y = torch._int_mm(both, codes.t())
    return y[:rows].float().add_(y[rows:], alpha=1 / BASE).mul_(step).mul_(scale[:, 0])


def cuda(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The kernel of int8_triton.py, which reads the codes once, for few rows in half precision; else the reference."""
    (n, k), rows = codes.shape, x.numel() // x.shape[-1]
    if not 0 < rows <= CUDA_ROWS or x.dtype.itemsize != 2:
        return reference(x, codes, scale)
    require(codes.is_contiguous(), "the int8 product", "contiguous codes, not transposed or sliced ones")
    try:
        product = importlib.import_module("llava_fn.kernels.int8_triton").product
    except ImportError as error:
        raise ValueError(
            f"the int8 product needs Triton, which does not work ({error}); install the triton of this torch, or run "
            "the plain PyTorch form with LLAVA_FN_KERNELS=reference"
        ) from error
    return product(x.reshape(rows, k).contiguous(), codes, scale).view(*x.shape[:-1], n)


def npu(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """npu_weight_quant_batchmatmul, which takes the weight as k n. It has no gradient, and no fp32: the reference."""
    if x.dtype == torch.float32:
        return reference(x, codes, scale)
    op, (n, k) = "npu_weight_quant_batchmatmul", codes.shape
    require(x.dtype in (torch.float16, torch.bfloat16), op, f"float16 or bfloat16, not {x.dtype}")
    require(x.numel() > 0 and x.shape[-1] == k, op, f"rows of {k} values, not x of {tuple(x.shape)}")
    require(1 <= k <= 65_535 and 1 <= n <= 65_535, op, f"a weight of at most 65535 by 65535, not {n} by {k}")
    require(codes.is_contiguous(), op, "contiguous codes, not transposed or sliced ones")
    require(not (torch.is_grad_enabled() and x.requires_grad), op, "torch.no_grad(): it gives no gradient, silently")
    y = npu_op("npu_weight_quant_batchmatmul")(x.reshape(-1, k), codes.t(), scale.t().to(x.dtype))
    return y.view(*x.shape[:-1], n)
