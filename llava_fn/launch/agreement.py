"""What must be the same on several ranks, compared by all of them."""

from __future__ import annotations

import json

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import tree
from llava_fn.config import differences
from llava_fn.parallel.collectives import texts
from llava_fn.parallel.mesh import Axis
from llava_fn.parallel.zero import Zero
from llava_fn.spec import owner


def check(what: str, value: object, axis: Axis, device: torch.device) -> None:
    """ValueError on every rank if this value, of what JSON holds, is not the same all along the axis.

    It names the ranks of the axis that differ from the first, and where.
    """
    said = [json.loads(text) for text in texts(json.dumps(value), axis, device)]
    lines = [f"rank {rank}: {line}" for rank, other in enumerate(said) for line in differences(said[0], other)]
    if lines:
        raise ValueError(f"the processes do not agree on {what} (that of rank 0 -> theirs):\n  " + "\n  ".join(lines))


def bits(x: Tensor) -> int:
    """A number that changes with any bit of a tensor: the sum of its words as integers. Computed on its device."""
    words = x.contiguous().view(torch.uint8 if x.element_size() % 2 else torch.int16)
    return int(words.sum(dtype=torch.int64))


def check_params(what: str, params: TensorDict, zero: Zero, device: torch.device) -> None:
    """ValueError on every rank if leaves that ranks hold copies of have drifted apart; it names rank and leaf."""
    mesh = zero.mesh
    if mesh.all.size == 1 or not tree.values(params):
        return
    owners = [owner(p, mesh) for p in zero.params(params)]
    for axis in dict.fromkeys(owners):  # all ranks take the axes in one order; that of a set is each process's own
        rows = zip(tree.paths(params), tree.values(params), owners, strict=True)
        check(what, {"/".join(path): bits(x) for path, x, mine in rows if mine == axis}, axis, device)
