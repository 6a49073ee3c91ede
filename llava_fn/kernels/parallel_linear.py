"""The two linears of tensor parallelism with sequence-sharded activations; an NPU overlaps their collectives.

Two primitives over a process group of w ranks, which hold the tokens in rank order; each is the other's transpose:

    gather_matmul(x, b): x: t/w k, b: k n -> (t n, t k), an all-gather of x, then x b; returns x b and the gathered x
    matmul_scatter(x, b): x: t k, b: k n -> t/w n, x b, then a reduce-scatter over tokens

`column_linear` (column-parallel) is gather_matmul, `row_linear` (row-parallel) is matmul_scatter, and each is the main
part of the other's backward pass. On NPUs they are the fused ops of MC2, whose limits on Atlas A2 and A3 are: fp16 or
bf16; k from 256 to 65534; x not transposed; 2, 4, 8, 16 or 32 ranks (at most 8 on A2); on A2 one communicator for all
such ops of a model.
Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from llava_fn.kernels.dispatch import choose, npu_op, require


def column_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x: t/w k, this rank's tokens; weight: n/w k, this rank's rows -> t n/w. Several weights: join them first."""
    return _Column.apply(x, weight, group)


def row_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x: t k/w; weight: n k/w, this rank's columns -> t/w n, this rank's tokens."""
    return _Row.apply(x, weight, group)


class _Linear(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, ctx.group = inputs
        ctx.save_for_backward(x, weight)


class _Column(_Linear):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        return gather_matmul(x, weight.t(), group)[0]

    @staticmethod
    def backward(ctx, *grads):
        (g,), (x, weight) = grads, ctx.saved_tensors
        d_x = matmul_scatter(g.contiguous(), weight, ctx.group) if ctx.needs_input_grad[0] else None
        d_weight = g.t() @ all_gather(x, ctx.group) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, None


class _Row(_Linear):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        return matmul_scatter(x, weight.t(), group)

    @staticmethod
    def backward(ctx, *grads):
        (g,), (x, weight) = grads, ctx.saved_tensors
        d_x, tokens = gather_matmul(g.contiguous(), weight, ctx.group)
        return d_x, tokens.t() @ x if ctx.needs_input_grad[1] else None, None


def gather_matmul(x: Tensor, b: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """x: t/w k, b: k n -> (t n, t k); see the module's contract. Not differentiable."""
    return choose(x, gather_matmul_reference, npu=gather_matmul_npu)(x, b, group)


def matmul_scatter(x: Tensor, b: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x: t k, b: k n -> t/w n; see the module's contract. Not differentiable."""
    return choose(x, matmul_scatter_reference, npu=matmul_scatter_npu)(x, b, group)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x: t/w k -> t k."""
    return funcol.wait_tensor(funcol.all_gather_tensor(x.contiguous(), 0, group))


def gather_matmul_reference(x: Tensor, b: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """All-gather, then product."""
    tokens = all_gather(x, group)
    return tokens @ b, tokens


def matmul_scatter_reference(x: Tensor, b: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Product, then reduce-scatter."""
    return funcol.wait_tensor(funcol.reduce_scatter_tensor((x @ b).contiguous(), "sum", 0, group))


def gather_matmul_npu(x: Tensor, b: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """npu_all_gather_base_mm."""
    check("npu_all_gather_base_mm", x, b, group.size())
    return npu_op("npu_all_gather_base_mm")(x, b, communicator(group), group.size())


def matmul_scatter_npu(x: Tensor, b: Tensor, group: dist.ProcessGroup) -> Tensor:
    """npu_mm_reduce_scatter_base."""
    op = "npu_mm_reduce_scatter_base"
    check(op, x, b, group.size())
    require(len(x) % group.size() == 0, op, f"tokens that divide over {group.size()} ranks, not {len(x)}")
    return npu_op("npu_mm_reduce_scatter_base")(x, b, communicator(group), group.size(), reduce_op="sum")


def check(op: str, x: Tensor, b: Tensor, ranks: int) -> None:
    """ValueError unless MC2 supports the product of x and b over this many ranks."""
    require(x.ndim == b.ndim == 2 and x.shape[1] == b.shape[0], op, f"m k and k n, not {[*x.shape]} and {[*b.shape]}")
    require(x.dtype == b.dtype, op, f"one dtype, not {x.dtype} and {b.dtype}")
    require(x.dtype in (torch.float16, torch.bfloat16), op, f"float16 or bfloat16, not {x.dtype}")
    require(256 <= x.shape[1] < 65_535, op, f"k from 256 to 65534, not {x.shape[1]}")
    require(x.is_contiguous(), op, "a contiguous x, not a transposed or sliced one")
    require(ranks in (2, 4, 8, 16, 32), op, f"2, 4, 8, 16 or 32 ranks, not {ranks}")


def communicator(group: dist.ProcessGroup) -> str:
    """HCCL's name of the group, which the fused ops take."""
    backend = group._get_backend(torch.device("npu"))
    return backend.get_hccl_comm_name(group.rank())  # pyright: ignore[reportAttributeAccessIssue]  # torch_npu adds it
