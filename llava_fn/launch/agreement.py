"""Values that must be equal on several ranks, compared on all of them."""

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
    """ValueError on every rank if a value, which JSON can hold, is not equal on all ranks of the axis.

    The error names each rank that differs from the first one, and each field that differs.
    """
    values = [json.loads(text) for text in texts(json.dumps(value), axis, device)]
    lines = [f"rank {rank}: {line}" for rank, other in enumerate(values) for line in differences(values[0], other)]
    if lines:
        raise ValueError(f"the processes do not agree on {what} (that of rank 0 -> theirs):\n  " + "\n  ".join(lines))


def bits(x: Tensor) -> int:
    """A checksum that changes with any single bit: the sum of the tensor's 16-bit words, computed on its device."""
    words = x.contiguous().view(torch.uint8 if x.element_size() % 2 else torch.int16)
    return int(words.sum(dtype=torch.int64))


def check_params(what: str, params: TensorDict, zero: Zero, device: torch.device) -> None:
    """ValueError on every rank if replicas of a leaf have drifted apart. The error names rank and leaf."""
    mesh = zero.mesh
    if mesh.all.size == 1 or not tree.values(params):
        return
    owners = [owner(p, mesh) for p in zero.params(params)]
    for axis in dict.fromkeys(owners):  # not a set: all ranks must take the axes in one order
        rows = zip(tree.paths(params), tree.values(params), owners, strict=True)
        check(what, {"/".join(path): bits(x) for path, x, along in rows if along == axis}, axis, device)
