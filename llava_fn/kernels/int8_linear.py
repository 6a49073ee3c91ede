"""The product with a weight of eight bits: a code for each value, and a scale for each row of outputs.

Contract: x: ... k, codes: int8[n, k], scale: fp32[n, 1] -> x (codes * scale)^T, ... n, in x's dtype.
The reference makes the weight whole in x's dtype and rounds nothing else. The other forms read the codes as they are,
and round otherwise: on a CPU a product of at most 16 rows has its activations and its sums in bf16; on an NPU the
scale is rounded to x's dtype; on CUDA the sums are scaled in fp32. No form has a gradient; linear.py has x's.
Source: Dettmers et al. 2022, arXiv 2208.07339, section 2.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.dispatch import choose, npu_op, require

ROWS = 16  # above it a CPU is faster with the weight made whole, with AVX2 and with AVX-512 (bench/RESULTS.md)
CUDA_ROWS = 64  # the same on CUDA: above it the product is no longer bound by reading the codes
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
    """torch's product of bf16 rows and int8 codes where it is the faster one; else the reference.

    The op is fast with bf16 alone, and would round the scale as well: it is given ones. The sums are scaled in fp32.
    """
    (n, k), rows = codes.shape, x.numel() // x.shape[-1]
    if rows > ROWS or k % LANES or x.dtype not in (torch.float32, torch.bfloat16):
        return reference(x, codes, scale)
    y = torch._weight_int8pack_mm(x.reshape(rows, k).bfloat16(), codes, scale.new_ones(n, dtype=torch.bfloat16))
    return (y * scale[:, 0]).to(x.dtype).view(*x.shape[:-1], n)


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
