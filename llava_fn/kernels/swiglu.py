"""The gated half of Llama's feed-forward layer.

Contract: x: ... d, w_gate and w_up: f d -> silu(x w_gate^T) * (x w_up^T), ... f.
Source: Shazeer 2020, arXiv 2002.05202, eq. 6. The operation includes the matrix products because npu_swiglu takes gate
and up concatenated, and either the weights or the products can be concatenated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.compiled import compiled
from llava_fn.kernels.dispatch import choose, npu_op, require, require_float
from llava_fn.kernels.linear import linear


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """x: ... d, w_gate and w_up: f d -> ... f; see the module's contract."""
    return choose(x, reference, npu=npu, cpu=cpu, cuda=cuda)(x, w_gate, w_up)


def reference(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """Two products, then `gated`."""
    return gated(linear(x, w_gate), linear(x, w_up))


def cpu(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """The reference; without gradients in place, which spares the allocation of fresh pages."""
    if torch.is_grad_enabled():
        return reference(x, w_gate, w_up)
    return F.silu(linear(x, w_gate), inplace=True).mul_(linear(x, w_up))


def swiglu_products(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` from its two products, both ... f, for weights that are not plain tensors."""
    return choose(gate, gated, npu=npu_products, cuda=cuda_products)(gate, up)


def swiglu_joined(products: Tensor) -> Tensor:
    """`swiglu` from both products in one tensor, gate first: ... 2f -> ... f. For weights that are joined."""
    return choose(products, gated_halves, npu=npu_joined, cpu=cpu_joined, cuda=cuda_joined)(products)


def gated_halves(products: Tensor) -> Tensor:
    """silu of the first half, times the second."""
    return gated(*products.chunk(2, -1))


def cpu_joined(products: Tensor) -> Tensor:
    """The reference; without gradients in place."""
    if torch.is_grad_enabled():
        return gated_halves(products)
    gate, up = products.chunk(2, -1)
    return F.silu(gate, inplace=True).mul_(up)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up


cuda_products, cuda_joined = compiled(gated), compiled(gated_halves)


def cuda(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """Two products, then `gated` in one kernel."""
    return cuda_products(linear(x, w_gate), linear(x, w_up))


def npu(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """npu_swiglu of [gate, up] along the last dim, after concatenating the smaller: the weights, or the products.

    In a training step, with more rows than d, these are the weights; in a decoding step, the products.
    """
    require_float("npu_swiglu", x)
    require(x.numel() > 0, "npu_swiglu", f"at least one row, not x of {tuple(x.shape)}")
    require(
        w_gate.shape == w_up.shape, "npu_swiglu", f"two equal halves, not {tuple(w_gate.shape)} and {tuple(w_up.shape)}"
    )
    if x.numel() > x.shape[-1] ** 2:
        return npu_joined(linear(x, torch.cat([w_gate, w_up])))
    return npu_products(linear(x, w_gate), linear(x, w_up))


def npu_products(gate: Tensor, up: Tensor) -> Tensor:
    """npu_swiglu of the two products, concatenated."""
    return npu_joined(torch.cat([gate, up], -1))


def npu_joined(products: Tensor) -> Tensor:
    """npu_swiglu."""
    require_float("npu_swiglu", products)
    return npu_op("npu_swiglu")(products, -1)
