"""ZeRO: how ranks shard the trained parameters, and gather them for the model (Rajbhandari et al. 2020).

A leaf's gradient is summed over its `owner`, the part of the mesh that does not shard the leaf: dp, or all of dp x tp.
Of its tensor-parallel block of a leaf, a rank keeps by level

    0   the whole block, a replica of which every rank of the owner has
    1   a shard along dim 0, fp32; all shards are all-gathered once for an update
    3   the same shard; the leaves of a transformer's blocks are all-gathered where a block runs, and again in the
        backward pass, which recomputes it. So are the frozen ones of these blocks, in the dtype in which they are kept

Padding rows of zeros make dim 0 divide; they stay zero. At levels 1 and 3 one rank keeps each number, so that replicas
cannot drift apart. AdamW's moments are sharded like the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from llava_fn import tree
from llava_fn.kernels.precision import at_least_fp32
from llava_fn.parallel import collectives
from llava_fn.parallel.collectives import Wait
from llava_fn.parallel.mesh import Axis, Mesh
from llava_fn.spec import RULES, Box, Param, Spec, leaves, owner, shard

LEVELS = (0, 1, 3)


@dataclass(frozen=True)
class Zero:
    """How a trained tree is sharded. spec: of the model, which one process at level 0 does without.

    dtype: of the weights that the model reads. ahead: level 3 prefetches the next block's leaves while a block runs.
    train: the trained parts, as in config.STAGES.
    """

    spec: Spec = field(default_factory=dict)
    mesh: Mesh = Mesh()
    level: int = 0
    dtype: torch.dtype = torch.float32
    ahead: bool = True
    train: tuple[str, ...] = ("vision", "projector", "llama")

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"zero={self.level}: must be one of {', '.join(map(str, LEVELS))}")

    def params(self, like: TensorDict) -> list[Param]:
        """The Param of each leaf, in the order of `tree.values`; of a leaf of a compressed weight, the weight's."""
        params = dict(leaves(self.spec))
        return [params[path if path in params else path[:-1]] for path in tree.paths(like)]

    def store(self, blocks: TensorDict) -> TensorDict:
        """This rank's tensor-parallel blocks -> its shards of them, in memory of their own."""
        pairs = zip(self.params(blocks), tree.values(blocks), strict=True)
        return tree.rebuild(blocks, [self.keep(p, x) for p, x in pairs])

    def keep(self, p: Param, block: Tensor) -> Tensor:
        """One leaf of `store`."""
        return _rows(block, owner(p, self.mesh)) if self.level else block

    def boxes(self, stored: TensorDict) -> list[Box]:
        """The box of this rank's shard of each leaf in the global tensor, without padding."""
        return [self._box(p) for p in self.params(stored)]

    def _box(self, p: Param) -> Box:
        axis, (first, *rest) = owner(p, self.mesh), shard(p, self.mesh)
        rows = first.stop - first.start
        each = math.ceil(rows / axis.size) if self.level else rows
        start = min(axis.rank * each, rows) if self.level else 0
        stop = min(start + each, rows)
        return (first.start + start, first.start + stop), *((s.start, s.stop) for s in rest)

    def answers(self, stored: TensorDict) -> list[bool]:
        """Whether this rank saves its box of each leaf. The saved boxes of all ranks make up the global tensors."""
        return [self.level > 0 or owner(p, self.mesh).rank == 0 for p in self.params(stored)]

    def read(self, like: TensorDict, read: Callable[[tree.Path, Box], Tensor]) -> TensorDict:
        """A tree that is sharded like `like`, filled from global tensors. read: (path, box) -> that box, fp32."""
        out = []
        for path, x, box in zip(tree.paths(like), tree.values(like), self.boxes(like), strict=True):
            rows = read(path, box)
            out.append(torch.cat([rows, rows.new_zeros(len(x) - len(rows), *rows.shape[1:])]).to(x.device))
        return tree.rebuild(like, out)

    def sharded(self, part: str) -> bool:
        """Whether level 3 shards all blocks of this part, since some of their weights or adapters are trained."""
        trained = [name.partition("/")[0] for name in self.train]
        adapted = "lora" in trained and any(path[:2] == ("lora", part) for path, _ in leaves(self.spec))
        return self.level == 3 and (part in trained or adapted)

    def late(self, path: tree.Path) -> bool:
        """Whether a leaf is gathered where its block runs."""
        return path[1] == "blocks" and self.sharded(path[0])

    def _now(self, like: TensorDict) -> list[int]:
        """Indices of the leaves that are gathered before the model runs."""
        return [i for i, path in enumerate(tree.paths(like)) if not self.late(path)]

    def fetch(self, stored: TensorDict) -> TensorDict:
        """Shards -> the tree that the loss is differentiated by: whole weights in `dtype`.

        Blocks that ZeRO 3 gathers later stay sharded.
        """
        out, now = tree.values(stored), self._now(stored)
        whole = [out[i].to(self.dtype) for i in now]
        if self.level and self.mesh.all.size > 1:
            params = self.params(stored)
            whole = gathering(whole, [params[i] for i in now], self.mesh)()
        for i, x in zip(now, whole, strict=True):
            out[i] = x
        return tree.rebuild(stored, out)

    def reduce(self, grads: TensorDict) -> TensorDict:
        """fp32 gradients of the tree of `fetch` -> gradients of the shards, summed over the ranks."""
        if self.mesh.all.size == 1:
            return grads
        out, now, params = tree.values(grads), self._now(grads), self.params(grads)
        begin = scattering if self.level else summing
        for i, g in zip(now, begin([out[i] for i in now], [params[i] for i in now], self.mesh)(), strict=True):
            out[i] = g
        return tree.rebuild(grads, out)

    def norm(self, grads: TensorDict) -> Tensor:
        """The 2-norm of the whole gradient as one vector, float32[], from each rank's shards."""
        if self.mesh.all.size == 1:
            return tree.global_norm(grads)
        parts: dict[Axis, list[Tensor]] = {}
        for g, p in zip(tree.values(grads), self.params(grads), strict=True):
            parts.setdefault(self.mesh.all if self.level else _spread(p, self.mesh), []).append(g)
        squares = [
            collectives.total(torch.stack(torch._foreach_norm(gs)).square().sum(), axis) for axis, gs in parts.items()
        ]
        return torch.stack(squares).sum().sqrt()

    def scan(self, block: Callable, part: str) -> Callable:
        """grad.scan of a block of the model's `part` whose leaves are sharded: level 3."""
        params = {path[3:]: p for path, p in leaves(self.spec) if path[:3] == (part, "blocks", "0")}

        def call(shards: Sequence[TensorDict], x: Tensor, rests: Sequence[tuple]) -> Tensor:
            work = _Blocks(block, [tree.paths(s) for s in shards], params, rests, self)
            return _Scan.apply(work, x, *(leaf for s in shards for leaf in tree.values(s)))

        return call


def _spread(p: Param, mesh: Mesh) -> Axis:
    """The axis that still shards a leaf's gradient after the sum over its owner."""
    return mesh.tp if any(name in RULES for name in p.axes) else Axis("none")


def _filled(x: Tensor, axis: Axis) -> Tensor:
    """x with padding rows of zeros, so that dim 0 divides over the axis."""
    rows = -len(x) % axis.size
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows)) if rows else x


def _rows(x: Tensor, axis: Axis) -> Tensor:
    """This rank's shard, in memory of its own."""
    x = _filled(x, axis)
    each = len(x) // axis.size
    return x[axis.rank * each : (axis.rank + 1) * each].clone()


def _together(begin: Callable, xs: Sequence[Tensor], axes: Sequence[Axis]) -> Wait:
    """Start one collective for each axis; the returned function waits for all of them."""
    groups = {axis: [i for i, a in enumerate(axes) if a == axis] for axis in dict.fromkeys(axes)}
    pending = [(places, begin([xs[i] for i in places], axis)) for axis, places in groups.items()]

    def wait() -> list[Tensor]:
        done = {i: x for places, ready in pending for i, x in zip(places, ready(), strict=True)}
        return [done[i] for i in range(len(xs))]

    return wait


def gathering(shards: Sequence[Tensor], params: Sequence[Param], mesh: Mesh) -> Wait:
    """Start the all-gather of shards into their tensor-parallel blocks."""
    ready = _together(collectives.gathering, shards, [owner(p, mesh) for p in params])
    rows = [s.stop - s.start for s in (shard(p, mesh)[0] for p in params)]
    return lambda: [x[:n] for x, n in zip(ready(), rows, strict=True)]


def scattering(grads: Sequence[Tensor], params: Sequence[Param], mesh: Mesh) -> Wait:
    """Start the reduce-scatter of gradients of tensor-parallel blocks into this rank's shards."""
    axes = [owner(p, mesh) for p in params]
    return _together(collectives.scattering, [_filled(g, a) for g, a in zip(grads, axes, strict=True)], axes)


def summing(grads: Sequence[Tensor], params: Sequence[Param], mesh: Mesh) -> Wait:
    """Start the all-reduce of gradients of tensor-parallel blocks."""
    return _together(collectives.summing, grads, [owner(p, mesh) for p in params])


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one transformer, of whose weights each rank holds shards, and of whose adapters the whole.

    paths: of each block's leaves. params: name of a weight in a block -> its Param.
    """

    block: Callable
    paths: Sequence[list[tree.Path]]
    params: dict[tree.Path, Param]
    rests: Sequence[tuple]
    zero: Zero

    def own(self, flat: Sequence[Any], i: int) -> list[Any]:
        """What belongs to block i of a list with one item for each leaf of all blocks."""
        first = sum(map(len, self.paths[:i]))
        return list(flat[first : first + len(self.paths[i])])

    def sharded(self, i: int) -> list[int]:
        """The leaves of block i that are shards."""
        return [j for j, path in enumerate(self.paths[i]) if "lora" not in path]

    def param(self, i: int, j: int) -> Param:
        """Of the weight that leaf j of block i is, or is a leaf of."""
        return self.params[self.paths[i][j][:1]]

    def gather(self, flat: Sequence[Tensor], i: int) -> Wait:
        """Start the all-gather of block i. flat: the leaves of all blocks, of which the trained ones are fp32."""
        leaves, late = self.own(flat, i), self.sharded(i)
        shards = [leaves[j].to(self.zero.dtype) if leaves[j].requires_grad else leaves[j] for j in late]
        ready = gathering(shards, [self.param(i, j) for j in late], self.zero.mesh)

        def wait() -> list[Tensor]:
            whole = dict(zip(late, ready(), strict=True))
            return [whole[j] if j in whole else leaf for j, leaf in enumerate(leaves)]

        return wait

    def run(self, weights: Sequence[Tensor], x: Tensor, i: int) -> Tensor:
        """Block i."""
        p = TensorDict({})
        for path, leaf in zip(self.paths[i], weights, strict=True):
            p[path] = leaf
        return self.block(p, x, *self.rests[i])

    def walk(self, flat: Sequence[Tensor], order: Sequence[int]):
        """Yields (i, weights of block i) in this order; with `ahead`, prefetches the next block's weights."""
        pending = self.gather(flat, order[0])
        for i, after in zip(order, [*order[1:], None], strict=True):
            weights = pending()
            if self.zero.ahead and after is not None:
                pending = self.gather(flat, after)
            yield i, weights
            if not self.zero.ahead and after is not None:
                pending = self.gather(flat, after)

    def scatter(self, grads: Sequence[Tensor | None], i: int) -> Callable[[], list[Tensor | None]]:
        """Start the reduce-scatter of the gradients of block i's shards. What is frozen has None, and keeps it."""
        late = [j for j in self.sharded(i) if grads[j] is not None]
        begun = [at_least_fp32(g) for j, g in enumerate(grads) if g is not None and j in late]
        ready = scattering(begun, [self.param(i, j) for j in late], self.zero.mesh)
        rest = [None if j in late else g for j, g in enumerate(grads)]  # not `grads`, which keeps what is scattered

        def wait() -> list[Tensor | None]:
            shards = dict(zip(late, ready(), strict=True))
            return [shards.get(j, g) for j, g in enumerate(rest)]

        return wait


class _Scan(torch.autograd.Function):
    """Keeps only the input of each block. A block's gradients are reduce-scattered while the previous block runs."""

    @staticmethod
    def forward(ctx, work: _Blocks, x: Tensor, *flat: Tensor) -> Tensor:
        inputs = []
        for i, weights in work.walk(flat, range(len(work.rests))):
            inputs.append(x)
            x = work.run(weights, x, i)
        ctx.work = work
        ctx.save_for_backward(*inputs, *flat)
        return x

    @staticmethod
    def backward(ctx, *grads_out: Tensor):
        (g,) = grads_out
        work, n = ctx.work, len(ctx.work.rests)
        inputs, flat = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        grads: list[Tensor | None] = []  # of the leaves, from the last block to the first
        previous: Callable[[], list[Tensor | None]] = list
        for i, weights in work.walk(flat, range(n - 1, -1, -1)):
            wanted = [j for j, need in enumerate(work.own(ctx.needs_input_grad[2:], i)) if need]
            with torch.enable_grad():
                x = inputs[i].detach().requires_grad_()
                for j in wanted:
                    weights[j] = weights[j].detach().requires_grad_()
                out = work.run(weights, x, i)
            g, *new = torch.autograd.grad(out, (x, *(weights[j] for j in wanted)), g)
            by_leaf = dict(zip(wanted, new, strict=True))
            begun = work.scatter([by_leaf.get(j) for j in range(len(weights))], i)
            grads = previous() + grads
            previous = begun
        return None, g, *(previous() + grads)
