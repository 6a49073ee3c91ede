"""Named axes of devices. `axis` always means a mesh axis; `dim` a tensor's dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """One axis of the device mesh: this process is number `rank` of `size`, joined by `group`."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """Data axis x tensor axis. `Mesh()` is one process."""

    dp: Axis = Axis("dp")
    tp: Axis = Axis("tp")
