"""A parameter is declared once: its shape, the logical name of each dim, its initial spread. The rest is derived."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Union

import torch
from tensordict import TensorDict

from llava_fn.parallel.mesh import Axis, Mesh

RULES: Mapping[str | None, str] = {"vocab": "tp", "heads": "tp", "ffn": "tp"}  # logical dim -> mesh axis


@dataclass(frozen=True)
class Param:
    """shape: global. axes: one logical name (or None) a dim. std: of the normal init; None: ones; 0: zeros."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float | None


Spec = Mapping[str, Union[Param, "Spec"]]
Box = tuple[tuple[int, int], ...]  # (start, stop) of each dim of a global tensor


def linear(out: int, inp: int, axes: tuple[str | None, str | None] = (None, None)) -> Param:
    """A weight [out, in], with the spread that keeps the variance of its input (LeCun 1998)."""
    return Param((out, inp), axes, inp**-0.5)


def norm(width: int) -> Param:
    """The gain of a normalisation."""
    return Param((width,), (None,), None)


def bias(width: int) -> Param:
    """A bias, zero at the start."""
    return Param((width,), (None,), 0.0)


def leaves(spec: Spec, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Param]]:
    """(path, Param) of every parameter, in the order of declaration."""
    for name, node in spec.items():
        yield from [((*path, name), node)] if isinstance(node, Param) else leaves(node, (*path, name))


def under(path: Sequence[str], parts: Iterable[str]) -> bool:
    """Whether a path is one of these parts or lies in one. A part: "llama", "vision/blocks/22"."""
    return any(tuple(path[: len(part)]) == part for part in (tuple(part.split("/")) for part in parts))


def only(spec: Spec, parts: Sequence[str], path: tuple[str, ...] = ()) -> Spec:
    """The parameters of `spec` that lie in one of the parts."""
    inner = {
        name: node if isinstance(node, Param) else only(node, parts, (*path, name))
        for name, node in spec.items()
        if not isinstance(node, Param) or under((*path, name), parts)
    }
    return {name: node for name, node in inner.items() if node}


def count(spec: Spec) -> int:
    """Number of scalars."""
    return sum(math.prod(p.shape) for _, p in leaves(spec))


def shard(p: Param, mesh: Mesh) -> tuple[slice, ...]:
    """This rank's tensor-parallel block of the global tensor. ValueError where a dim does not divide."""
    out = []
    for size, name in zip(p.shape, p.axes, strict=True):
        axis = getattr(mesh, RULES[name]) if name in RULES else Axis("none")
        if size % axis.size:
            raise ValueError(f"a dim of {size} ({name}) does not divide over {axis.name}={axis.size}")
        out.append(slice(axis.rank * size // axis.size, (axis.rank + 1) * size // axis.size))
    return tuple(out)


def owner(p: Param, mesh: Mesh) -> Axis:
    """The axis over which the parameter's gradient is summed: the part of the mesh that does not shard it."""
    return mesh.dp if mesh.tp.size > 1 and any(name in RULES for name in p.axes) else mesh.all


def _values(p: Param, path: tuple[str, ...], seed: int) -> torch.Tensor:
    if p.std is None:
        return torch.ones(p.shape)
    rng = torch.Generator().manual_seed(seed ^ zlib.crc32("/".join(path).encode()))
    return torch.randn(p.shape, generator=rng) * p.std


def init(spec: Spec, seed: int, mesh: Mesh = Mesh()) -> TensorDict:
    """fp32 parameters on the CPU, locked: this rank's block of each. Values depend on (seed, path), not on the mesh."""
    return build(spec, lambda path, p: fresh(path, p, seed, mesh))


def fresh(path: tuple[str, ...], p: Param, seed: int, mesh: Mesh) -> torch.Tensor:
    """One leaf of `init`."""
    return _values(p, path, seed)[shard(p, mesh)].clone()


def build(spec: Spec, leaf) -> TensorDict:
    """A locked tree of leaf(path, Param), made by walking the spec so that its order is the spec's."""
    tree = TensorDict({})
    for path, p in leaves(spec):
        tree[path] = leaf(path, p)
    return tree.lock_()
