"""Seconds from bytes and FLOPs, by a small table of devices and assumed efficiencies.

No figure was measured. Replace a figure when you have measured it (hccl_test, nccl-tests, a profile of a step).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from llava_fn.plan.options import Assumed
from llava_fn.plan.trace import Call

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device's figures as rated by its vendor; those of links are for one direction."""

    bfloat16: float  # FLOP/s, dense
    float32: float  # FLOP/s, without TF32 or HF32
    memory: float  # bytes
    inside: float  # bytes/s to the other devices of its machine
    outside: float  # bytes/s to other machines: its share of the machine's network


DEVICES = {
    "910B": Device(313e12, 78e12, 64 * GIB, 196e9, 25e9),  # Ascend 910B3; HCCS, a full mesh of 8; RoCE, 200 Gbit/s
    "A100": Device(312e12, 19.5e12, 80 * GIB, 300e9, 25e9),  # SXM 80 GB; NVLink 3; 200 Gbit/s
    "4090": Device(165e12, 82.6e12, 24 * GIB, 32e9, 12.5e9),  # GeForce RTX; PCIe 4.0; 100 Gbit/s
    "H200": Device(989e12, 67e12, 140 * GIB, 450e9, 50e9),  # SXM; NVLink 4; 400 Gbit/s
}


@dataclass(frozen=True)
class Traffic:
    """What one kind of collective over one axis sends from a rank in an update."""

    op: str
    axis: str
    size: int  # ranks
    calls: int
    sent: float  # bytes
    seconds: float


def hccl_buffers(dp: int, tp: int, size: int) -> int:
    """Bytes of HCCL's buffers on an NPU: two of `size` MB for each communicator of a mesh of dp x tp."""
    communicators = 3 if dp > 1 and tp > 1 else int(dp * tp > 1)  # of dp, tp and all, which may be the same
    return communicators * 2 * size * 2**20


def traffic(calls: Iterable[Call], tp: int, machine: int, device: Device, assumed: Assumed) -> tuple[Traffic, ...]:
    """The traffic of each kind of collective over each axis. tp: size of the tp axis; machine: devices a machine."""
    groups: dict[tuple[str, str, int], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.axis, call.op, call.size), []).append(call)
    local = {"tp": tp, "dp": max(1, machine // tp), "all": machine}  # ranks of an axis in one machine
    out = []
    for (axis, op, size), group in sorted(groups.items()):
        sent, latency = sum(call.sent for call in group), len(group) * _hops(op, size) * assumed.hop
        seconds = sent / _rate(size, local[axis], device, assumed) + latency
        out.append(Traffic(op, axis, size, len(group), sent, seconds))
    return tuple(out)


def _rate(size: int, local: int, device: Device, assumed: Assumed) -> float:
    """Bytes/s of a ring of `size` ranks. If it leaves a machine, it uses the links of all `local` ranks there."""
    rated = device.inside if size <= local else min(device.inside, local * device.outside)
    return rated * assumed.links


def _hops(op: str, size: int) -> int:
    """Hops of a collective: a ring's, but for an all-reduce those up and down a tree."""
    return 2 * math.ceil(math.log2(size)) if op == "all_reduce" else size - 1


def computing(flops: float, dtype: str, device: Device, assumed: Assumed) -> float:
    """Seconds that this many FLOPs take."""
    return flops / (getattr(device, dtype) * assumed.arithmetic)
