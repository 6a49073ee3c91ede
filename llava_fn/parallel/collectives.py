"""Differentiable collectives, each named by what it does to a tensor's type on one mesh axis.

    I  invariant   same value and same gradient on every rank
    R  replicated  same value; each rank's gradient is a partial sum
    V  varying     each rank holds its own shard along `dim`
    P  partial     the value is the sum over ranks

    enter I->R   leave P->I   gather V->R   scatter P->V   split I->V   join V->I

The backward of each is another row of this table (Megatron's f is `enter`, its g is `leave`; Shoeybi et al. 2019,
section 3). The types are those of local SPMD type systems: forgetting `enter` passes every forward test and corrupts
gradients, so tests compare gradients. All take (x, axis, dim) and return x; on an axis of size 1 they return x itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from llava_fn.parallel.mesh import Axis


def _keep(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", axis.group))


def _all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return funcol.wait_tensor(funcol.all_gather_tensor(x.contiguous(), dim, axis.group))


def _reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return funcol.wait_tensor(funcol.reduce_scatter_tensor(x.contiguous(), "sum", dim, axis.group))


def _slice(x: Tensor, axis: Axis, dim: int) -> Tensor:
    size, rest = divmod(x.shape[dim], axis.size)
    if rest:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} does not divide over {axis.name}={axis.size}")
    return x.narrow(dim, axis.rank * size, size).contiguous()


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, forward: Callable, backward: Callable, axis: Axis, dim: int) -> Tensor:
        return forward(x, axis, dim)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, _, ctx.backward_fn, ctx.axis, ctx.dim = inputs

    @staticmethod
    def backward(ctx, g: Tensor):
        return ctx.backward_fn(g, ctx.axis, ctx.dim), None, None, None, None


def _collective(forward: Callable, backward: Callable, types: str) -> Callable[[Tensor, Axis, int], Tensor]:
    def call(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
        return x if axis.size == 1 else _Collective.apply(x, forward, backward, axis, dim)

    call.__doc__ = f"{types} on `axis`, along `dim`."
    return call


enter = _collective(_keep, _all_reduce, "I -> R")
leave = _collective(_all_reduce, _keep, "P -> I")
gather = _collective(_all_gather, _reduce_scatter, "V -> R")
scatter = _collective(_reduce_scatter, _all_gather, "P -> V")
split = _collective(_slice, _all_gather, "I -> V")
join = _collective(_all_gather, _slice, "V -> I")


def agree(x: Tensor, axis: Axis) -> Tensor:
    """Rank 0's value on every rank, for what must not differ by a rounding. It has no gradient."""
    return x if axis.size == 1 else funcol.wait_tensor(funcol.broadcast(x.contiguous(), 0, axis.group))


@dataclass(frozen=True)
class TP:
    """How a block crosses the tensor axis: activations sharded over tokens outside it, or (decoding) invariant."""

    axis: Axis = Axis("tp")
    sequence: bool = True

    def enter(self, x: Tensor) -> Tensor:
        """Before column-sharded weights. x: V (tokens) or I -> R."""
        return gather(x, self.axis, 0) if self.sequence else enter(x, self.axis, 0)

    def leave(self, x: Tensor) -> Tensor:
        """After row-sharded weights. x: P -> V (tokens) or I."""
        return scatter(x, self.axis, 0) if self.sequence else leave(x, self.axis, 0)

    def split(self, x: Tensor) -> Tensor:
        """x: I -> V (tokens), or I as it is."""
        return split(x, self.axis, 0) if self.sequence else x

    def select(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows of the whole stream. x: V (tokens) -> V (of the selected rows), or I -> I."""
        return split(join(x, self.axis, 0)[rows], self.axis, 0) if self.sequence else x[rows]
