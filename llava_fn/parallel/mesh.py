"""Named axes of devices. `axis` always means a mesh axis; `dim` a tensor's dimension."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

GLOO = "gloo_in_turn"


@dataclass(frozen=True)
class Axis:
    """One axis of the device mesh: this process is number `rank` of `size`, joined by `group`."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group of an axis of several ranks."""
        if self.group is None:
            raise ValueError(f"the axis {self.name} of one rank has no process group")
        return self.group


@dataclass(frozen=True)
class Mesh:
    """Data axis x tensor axis, and both as one. `Mesh()` is one process."""

    dp: Axis = Axis("dp")
    tp: Axis = Axis("tp")
    all: Axis = Axis("all")  # dp x tp: over it is summed what neither axis shards


def gloo() -> str:
    """The name of a backend that is gloo with one thread a group, so that its collectives run one after another.

    With the two that it has by itself they run side by side, and in torch 2.13 that corrupts memory now and then.
    """
    if GLOO not in dist.Backend.backend_list:
        dist.Backend.register_backend(GLOO, _in_turn, devices=["cpu"])
    return GLOO


def _in_turn(store: dist.Store, rank: int, size: int, timeout: timedelta) -> object:
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stub
    options._devices, options._threads = [dist.ProcessGroupGloo.create_default_device()], 1
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def make_mesh(tp: int) -> Mesh:
    """The processes of the default group as dp x tp; neighbouring ranks share a tensor axis, and so a machine.

    Every process makes every group, in one order. ValueError if tp does not divide their number.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    check_world(world, tp)
    rows = [range(first, first + tp) for first in range(0, world, tp)]
    columns = [range(first, world, tp) for first in range(tp)]
    everyone = [range(world)]
    return Mesh(_axis("dp", columns, rank), _axis("tp", rows, rank), _axis("all", everyone, rank))


def _axis(name: str, groups: list[range], rank: int) -> Axis:
    """The axis along which these groups of ranks lie. An axis of size 1 needs no group, one of all has the default."""
    own = next(ranks for ranks in groups if rank in ranks)
    if len(own) == 1:
        return Axis(name)
    made: list[Any] = [dist.new_group(list(ranks)) if len(groups) > 1 else dist.group.WORLD for ranks in groups]
    return Axis(name, len(own), own.index(rank), made[groups.index(own)])


def check_world(world: int, tp: int, machine: int | None = None) -> None:
    """ValueError if `world` processes, of which `machine` run on each machine, cannot be a mesh of dp x `tp`."""
    if tp < 1 or world % tp:
        fits = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(f"tp={tp} does not divide the {world} processes; tp can be one of {fits}")
    if world > 1 and machine is not None and machine % tp:
        raise ValueError(
            f"tp={tp} would join processes of several machines, of {machine} each; let tp divide {machine}"
        )
