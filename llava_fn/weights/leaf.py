"""A tensor that is not read yet, and how a stream of them becomes a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """`read` gives the tensor, mapped from its file where nothing is to be computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @staticmethod
    def of(t: Tensor) -> Leaf:
        """A tensor that is there."""
        return Leaf(tuple(t.shape), t.dtype, lambda: t)

    def then(self, change: Callable[[Tensor], Tensor]) -> Leaf:
        """The leaf that `change` makes of this one, when it is read."""
        made = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return Leaf(tuple(made.shape), made.dtype, lambda: change(self.read()))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(path: Path, leaves: Mapping[str, Leaf], wrote: Callable[[int], None]) -> str:
    """Write a safetensors file one tensor at a time, and return its SHA-256.

    The safetensors library writes only what is all in memory; its reader accepts this file as its own. Wide dtypes
    come first, so that every tensor is aligned. wrote: called after each tensor with its bytes.
    """
    order = sorted(leaves, key=lambda name: -leaves[name].dtype.itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        leaf, begin = leaves[name], end
        end += leaf.nbytes
        header[name] = {"dtype": SAFETENSORS[leaf.dtype], "shape": leaf.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as f:
        for chunk in (len(text).to_bytes(8, "little"), text):
            f.write(chunk)
            digest.update(chunk)
        for name in order:
            data = memoryview(leaves[name].read().contiguous().flatten().view(torch.uint8).numpy())
            f.write(data)
            digest.update(data)
            del data
            wrote(leaves[name].nbytes)
    return digest.hexdigest()
