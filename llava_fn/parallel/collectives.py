"""Differentiable collectives, each named by what it does to a tensor's type on one mesh axis.

    I  invariant   same value and same gradient on every rank
    R  replicated  same value; each rank's gradient is a partial sum
    V  varying     each rank holds its own shard along `dim`
    P  partial     the value is the sum over ranks

    enter I->R   leave P->I   gather V->R   scatter P->V   split I->V   join V->I

The backward of each is another row of this table (Megatron's f is `enter`, its g is `leave`; Shoeybi et al. 2019,
section 3). The types are those of local SPMD type systems: forgetting `enter` passes every forward test and corrupts
gradients, so tests compare gradients. All take (x, axis, dim) and return x; on an axis of size 1 they return x itself.

Parameters and their gradients travel without a gradient: `summing`, `gathering` and `scattering` start the all-reduce,
all-gather or reduce-scatter of many tensors, and return a function that waits for the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from llava_fn.parallel.mesh import GLOO, Axis

_OPS = torch.ops._c10d_functional
Wait = Callable[[], list[Tensor]]


def _keep(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", axis.process_group))


def _all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    name = axis.process_group.group_name
    out = funcol.wait_tensor(_OPS.all_gather_into_tensor(x.contiguous(), axis.size, name))
    return torch.cat(out.chunk(axis.size), dim) if dim else out


def _reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    x = torch.cat(x.chunk(axis.size, dim)) if dim else x
    name = axis.process_group.group_name
    return funcol.wait_tensor(_OPS.reduce_scatter_tensor(x.contiguous(), "sum", axis.size, name))


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
    def backward(ctx, *grads: Tensor):
        return ctx.backward_fn(*grads, ctx.axis, ctx.dim), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        x, forward, backward, axis, dim = args
        last = x.movedim(in_dims[0], -1)  # with the mapped dim last, `dim` keeps its meaning
        return _Collective.apply(last, forward, backward, axis, dim if dim >= 0 else dim - 1), last.ndim - 1


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


def total(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, on every rank. It has no gradient."""
    return x if axis.size == 1 else _all_reduce(x, axis, 0)


def summing(xs: Sequence[Tensor], axis: Axis) -> Wait:
    """Start the all-reduce of each tensor over the axis."""
    return _begin(xs, axis, lambda xs, name: _OPS.all_reduce_coalesced(xs, "sum", name))


def gathering(xs: Sequence[Tensor], axis: Axis) -> Wait:
    """Start the all-gather of each tensor's shards, along dim 0."""
    return _begin(xs, axis, lambda xs, name: _OPS.all_gather_into_tensor_coalesced(xs, axis.size, name))


def scattering(xs: Sequence[Tensor], axis: Axis) -> Wait:
    """Start the reduce-scatter of each tensor: a rank gets its shard of the sum, along dim 0."""
    return _begin(xs, axis, lambda xs, name: _OPS.reduce_scatter_tensor_coalesced(xs, "sum", axis.size, name))


def _begin(xs: Sequence[Tensor], axis: Axis, begin: Callable) -> Wait:
    if axis.size == 1 or not xs:
        return lambda: list(xs)
    xs = [x.contiguous() for x in xs]
    # gloo copies tensors that travel together into one first: 2 to 6 times slower than one collective each
    parts = [[x] for x in xs] if dist.get_backend(axis.process_group) == GLOO else [xs]
    results = [x for part in parts for x in begin(part, axis.process_group.group_name)]
    return lambda: [funcol.wait_tensor(x) for x in results]


def texts(text: str, axis: Axis, device: torch.device) -> list[str]:
    """Each rank's text, on every rank."""
    if axis.size == 1:
        return [text]
    own = torch.tensor(list(text.encode()), dtype=torch.int32, device=device)
    sizes = _all_gather(torch.tensor([len(own)], device=device), axis, 0).tolist()
    padded = torch.nn.functional.pad(own, (0, max(sizes) - len(own)))
    rows = _all_gather(padded, axis, 0).view(axis.size, -1) if max(sizes) else padded.new_zeros(axis.size, 0)
    return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, sizes, strict=True)]


def agree(x: Tensor, axis: Axis) -> Tensor:
    """Broadcast rank 0's value, where ranks must not differ even by a rounding. It has no gradient."""
    return x if axis.size == 1 else funcol.wait_tensor(funcol.broadcast(x.contiguous(), 0, axis.process_group))


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
        """x: I -> V (tokens or images), or I as it is."""
        return split(x, self.axis, 0) if self.sequence else x

    def join(self, x: Tensor) -> Tensor:
        """x: V (tokens or images) -> I, or I as it is."""
        return join(x, self.axis, 0) if self.sequence else x

    def select(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows of the whole stream. x: V (tokens) -> V (of the selected rows), or I -> I."""
        return self.split(self.join(x)[rows])
