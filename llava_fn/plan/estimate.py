"""From bytes and operations to seconds: a small table of devices, and what is assumed of them.

None of it was measured. Replace a figure when you have measured it (hccl_test, nccl-tests, a profile of a step).
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
    """Figures of a device as its vendor rates it. Of links: in one direction."""

    bfloat16: float  # FLOP/s, dense
    float32: float  # FLOP/s, without TF32 or HF32
    memory: float  # bytes
    inside: float  # bytes/s that it sends to the others of its machine
    outside: float  # bytes/s of its part of the machine's network


DEVICES = {
    "910B": Device(313e12, 78e12, 64 * GIB, 196e9, 25e9),  # Ascend 910B3; HCCS, a full mesh of 8; RoCE, 200 Gbit/s
    "A100": Device(312e12, 19.5e12, 80 * GIB, 300e9, 25e9),  # SXM 80 GB; NVLink 3; 200 Gbit/s
    "4090": Device(165e12, 82.6e12, 24 * GIB, 32e9, 12.5e9),  # GeForce RTX; PCIe 4.0; 100 Gbit/s
    "H200": Device(989e12, 67e12, 140 * GIB, 450e9, 50e9),  # SXM; NVLink 4; 400 Gbit/s
}


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in an update by one kind of collective over one axis."""

    op: str
    axis: str
    size: int  # ranks
    calls: int
    sent: float  # bytes
    seconds: float


def traffic(calls: Iterable[Call], tp: int, machine: int, device: Device, assumed: Assumed) -> tuple[Traffic, ...]:
    """One row for each kind and axis. tp: neighbours that share an axis; machine: devices of one machine."""
    rows: dict[tuple[str, str, int], list[Call]] = {}
    for call in calls:
        rows.setdefault((call.axis, call.op, call.size), []).append(call)
    out = []
    for (axis, op, size), group in sorted(rows.items()):
        sent, near = sum(call.sent for call in group), {"tp": tp, "dp": max(1, machine // tp), "all": machine}[axis]
        waits = len(group) * _hops(op, size) * assumed.hop
        out.append(Traffic(op, axis, size, len(group), sent, sent / _rate(size, near, device, assumed) + waits))
    return tuple(out)


def _rate(size: int, near: int, device: Device, assumed: Assumed) -> float:
    """Bytes/s of a ring of `size` ranks, of which `near` are in one machine and leave it by all of their networks."""
    rated = device.inside if size <= near else min(device.inside, near * device.outside)
    return rated * assumed.links


def _hops(op: str, size: int) -> int:
    """Of a ring; of a tree, down and up, where each rank gets the sum."""
    return 2 * math.ceil(math.log2(size)) if op == "all_reduce" else size - 1


def computing(flops: float, dtype: str, device: Device, assumed: Assumed) -> float:
    """Seconds."""
    return flops / (getattr(device, dtype) * assumed.arithmetic)
