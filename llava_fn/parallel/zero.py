"""Who keeps which part of what is trained, and how it becomes the weights that a model reads (Rajbhandari et al. 2020).

A leaf's gradient is summed over its `owner`, the part of the mesh that does not shard it: dp, or all of dp x tp. By
level, what a rank keeps of its tensor-parallel block of a leaf is

    0   all of it, as every rank of the owner does
    1   a shard along dim 0, fp32; all of them are gathered once for an update
    3   the same, but a block's leaves are gathered where it runs, and again in the backward pass, which recomputes it

The last shards are filled up with rows of zeros, which stay zero. At levels 1 and 3 each number is kept by one rank, so
that replicas cannot drift apart. The moments of AdamW are kept as the parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    """How a trained tree is kept. spec: of the model; dtype: of the weights that it reads."""

    spec: Spec = field(default_factory=dict)
    mesh: Mesh = Mesh()
    level: int = 0
    dtype: torch.dtype = torch.float32
    ahead: bool = True  # level 3: begin to gather a block's leaves before the block before it runs

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"zero={self.level}: must be one of {', '.join(map(str, LEVELS))}")

    def params(self, like: TensorDict) -> list[Param]:
        """The Param of each leaf, in the order of `tree.values`."""
        known = dict(leaves(self.spec))
        return [known[path] for path in tree.paths(like)]

    def store(self, blocks: TensorDict) -> TensorDict:
        """This rank's tensor-parallel blocks -> what it keeps of them, in memory of its own."""
        pairs = zip(self.params(blocks), tree.values(blocks), strict=True)
        return tree.rebuild(blocks, [self.keep(p, x) for p, x in pairs])

    def keep(self, p: Param, block: Tensor) -> Tensor:
        """One leaf of `store`."""
        return _rows(block, owner(p, self.mesh)) if self.level else block

    def boxes(self, stored: TensorDict) -> list[Box]:
        """Where the rows that are kept of each leaf stand in the global tensor; the rows of zeros are left out."""
        return [self._box(p) for p in self.params(stored)]

    def _box(self, p: Param) -> Box:
        axis, (first, *rest) = owner(p, self.mesh), shard(p, self.mesh)
        rows = first.stop - first.start
        each = math.ceil(rows / axis.size) if self.level else rows
        start = min(axis.rank * each, rows) if self.level else 0
        stop = min(start + each, rows)
        return (first.start + start, first.start + stop), *((s.start, s.stop) for s in rest)

    def answers(self, stored: TensorDict) -> list[bool]:
        """Whether this rank answers for its box of each leaf. What is answered for makes up the global tensors."""
        return [self.level > 0 or owner(p, self.mesh).rank == 0 for p in self.params(stored)]

    def read(self, like: TensorDict, read: Callable[[tree.Path, Box], Tensor]) -> TensorDict:
        """A tree that is kept as `like` is, with the numbers of global tensors. read: (path, box) -> the box, fp32."""
        out = []
        for path, x, box in zip(tree.paths(like), tree.values(like), self.boxes(like), strict=True):
            rows = read(path, box)
            out.append(torch.cat([rows, rows.new_zeros(len(x) - len(rows), *rows.shape[1:])]).to(x.device))
        return tree.rebuild(like, out)

    def _now(self, like: TensorDict) -> list[int]:
        """The leaves that the model does not gather itself."""
        return [i for i, path in enumerate(tree.paths(like)) if self.level < 3 or "blocks" not in path]

    def fetch(self, stored: TensorDict) -> TensorDict:
        """What is kept -> what the loss is differentiated by: weights in `dtype`, and late blocks as they are kept."""
        out, now = tree.values(stored), self._now(stored)
        whole = [out[i].to(self.dtype) for i in now]
        if self.level and self.mesh.all.size > 1:
            params = self.params(stored)
            whole = gathering(whole, [params[i] for i in now], self.mesh)()
        for i, x in zip(now, whole, strict=True):
            out[i] = x
        return tree.rebuild(stored, out)

    def reduce(self, grads: TensorDict) -> TensorDict:
        """fp32 gradients of what `fetch` gave -> those of what is kept, summed over the ranks."""
        if self.mesh.all.size == 1:
            return grads
        out, now, params = tree.values(grads), self._now(grads), self.params(grads)
        begin = scattering if self.level else summing
        for i, g in zip(now, begin([out[i] for i in now], [params[i] for i in now], self.mesh)(), strict=True):
            out[i] = g
        return tree.rebuild(grads, out)

    def norm(self, grads: TensorDict) -> Tensor:
        """The 2-norm of the whole gradient as one vector, float32[], from what each rank keeps of it."""
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
        """grad.scan of a block of the model's `part` whose leaves are kept in shards: level 3 of the module."""
        params = [p for path, p in leaves(self.spec) if path[:3] == (part, "blocks", "0")]

        def call(shards: Sequence[TensorDict], x: Tensor, rests: Sequence[tuple]) -> Tensor:
            work = _Blocks(block, tree.paths(shards[0]), params, rests, self)
            return _Scan.apply(work, x, *(leaf for s in shards for leaf in tree.values(s)))

        return call


def _spread(p: Param, mesh: Mesh) -> Axis:
    """The axis over which the parts of a leaf's gradient lie after it was summed over its owner."""
    return mesh.tp if any(name in RULES for name in p.axes) else Axis("none")


def _filled(x: Tensor, axis: Axis) -> Tensor:
    """With rows of zeros, so that dim 0 divides over the axis."""
    rows = -len(x) % axis.size
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows)) if rows else x


def _rows(x: Tensor, axis: Axis) -> Tensor:
    """This rank's shard, in memory of its own."""
    x = _filled(x, axis)
    each = len(x) // axis.size
    return x[axis.rank * each : (axis.rank + 1) * each].clone()


def _together(begin: Callable, xs: Sequence[Tensor], axes: Sequence[Axis]) -> Wait:
    """One collective an axis."""
    groups = {axis: [i for i, a in enumerate(axes) if a == axis] for axis in dict.fromkeys(axes)}
    coming = [(places, begin([xs[i] for i in places], axis)) for axis, places in groups.items()]

    def wait() -> list[Tensor]:
        done = {i: x for places, ready in coming for i, x in zip(places, ready(), strict=True)}
        return [done[i] for i in range(len(xs))]

    return wait


def gathering(shards: Sequence[Tensor], params: Sequence[Param], mesh: Mesh) -> Wait:
    """Begin to gather shards into the tensor-parallel blocks that they are of."""
    ready = _together(collectives.gathering, shards, [owner(p, mesh) for p in params])
    rows = [s.stop - s.start for s in (shard(p, mesh)[0] for p in params)]
    return lambda: [x[:n] for x, n in zip(ready(), rows, strict=True)]


def scattering(grads: Sequence[Tensor], params: Sequence[Param], mesh: Mesh) -> Wait:
    """Begin to sum gradients of tensor-parallel blocks, of which this rank gets its shards."""
    axes = [owner(p, mesh) for p in params]
    return _together(collectives.scattering, [_filled(g, a) for g, a in zip(grads, axes, strict=True)], axes)


def summing(grads: Sequence[Tensor], params: Sequence[Param], mesh: Mesh) -> Wait:
    """Begin to sum gradients of tensor-parallel blocks."""
    return _together(collectives.summing, grads, [owner(p, mesh) for p in params])


@dataclass(frozen=True)
class _Blocks:
    """A row of blocks, of which each rank holds shards."""

    block: Callable
    paths: list[tree.Path]
    params: list[Param]
    rests: Sequence[tuple]
    zero: Zero

    def gather(self, flat: Sequence[Tensor], i: int) -> Wait:
        """Begin to gather block i; flat: the shards of all blocks."""
        n = len(self.paths)
        mine = [x.to(self.zero.dtype) for x in flat[i * n : (i + 1) * n]]
        return gathering(mine, self.params, self.zero.mesh)

    def run(self, weights: Sequence[Tensor], x: Tensor, i: int) -> Tensor:
        """Block i."""
        p = TensorDict({})
        for path, leaf in zip(self.paths, weights, strict=True):
            p[path] = leaf
        return self.block(p, x, *self.rests[i])

    def walk(self, flat: Sequence[Tensor], order: Sequence[int]):
        """(i, weights of block i) in this order, the next ones on their way if they are wanted ahead."""
        coming = self.gather(flat, order[0])
        for i, after in zip(order, [*order[1:], None], strict=True):
            weights = coming()
            if self.zero.ahead and after is not None:
                coming = self.gather(flat, after)
            yield i, weights
            if not self.zero.ahead and after is not None:
                coming = self.gather(flat, after)


class _Scan(torch.autograd.Function):
    """Only the input of each block is kept. The sum of a block's gradients travels while the block before it runs."""

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
        grads: list[Tensor] = []  # of the shards, from the last block to the first
        before: Wait = list
        for i, weights in work.walk(flat, range(n - 1, -1, -1)):
            with torch.enable_grad():
                x, *weights = [t.detach().requires_grad_() for t in (inputs[i], *weights)]
                out = work.run(weights, x, i)
            g, *new = torch.autograd.grad(out, (x, *weights), g)
            begun = scattering([at_least_fp32(d) for d in new], work.params, work.zero.mesh)
            grads = before() + grads
            before = begun
        return None, g, *(before() + grads)
