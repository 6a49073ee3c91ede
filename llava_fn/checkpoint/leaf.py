"""Tensors that are read when they are needed, and safetensors files written from a stream of them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llava_fn.checkpoint.archive import Archive

SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
CHUNK = 2**30  # bytes; a single write takes up to 2 GiB


@dataclass(frozen=True)
class Leaf:
    """A tensor that is not read yet. `read` maps it from its file, or computes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @staticmethod
    def of(t: Tensor) -> Leaf:
        """The leaf of a tensor in memory."""
        return Leaf(tuple(t.shape), t.dtype, lambda: t)

    def then(self, change: Callable[[Tensor], Tensor]) -> Leaf:
        """A leaf that applies `change` to this one when it is read."""
        made = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return Leaf(tuple(made.shape), made.dtype, lambda: change(self.read()))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _header(order: Sequence[str], leaves: Mapping[str, Leaf]) -> bytes:
    """The file up to its first tensor: length of the header, and the header, padded to a multiple of 8 bytes."""
    rows: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        leaf, begin = leaves[name], end
        end += leaf.nbytes
        rows[name] = {"dtype": SAFETENSORS[leaf.dtype], "shape": leaf.shape, "data_offsets": (begin, end)}
    text = json.dumps(rows).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, leaves: Mapping[str, Leaf], archives: Sequence[Archive], wrote: Callable[[int], None]) -> str:
    """Write a safetensors file one tensor at a time, and return its SHA-256. ValueError for a tensor with NaN or inf.

    The safetensors library can only write tensors that are all in memory. Wide dtypes come first, so that every tensor
    is aligned. archives: the mapped files of the leaves; a leaf that is unchanged is copied from file to file. wrote:
    called after each tensor with its size in bytes.
    """
    order = sorted(leaves, key=lambda name: -leaves[name].dtype.itemsize)
    header, digest = _header(order, leaves), hashlib.sha256()
    digest.update(header)
    with path.open("wb") as f, ThreadPoolExecutor(1) as beside:
        f.write(header)
        f.flush()  # from here on the file's descriptor is written to
        for name in order:
            values = leaves[name].read().contiguous().flatten()
            if not torch.isfinite(values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)):
                raise ValueError(f"{name} holds NaN or an infinite value; the file that it comes from is broken")
            data = values.view(torch.uint8)
            hashed = beside.submit(digest.update, data.numpy().data)
            _put(f.fileno(), data, archives)
            hashed.result()
            wrote(leaves[name].nbytes)
    return digest.hexdigest()


def _put(to: int, data: Tensor, archives: Sequence[Archive]) -> None:
    """Append bytes to a file. The kernel copies mapped pages itself, which is several times faster than a write."""
    spot = next(((a.path, at) for a in archives if (at := a.find(data)) is not None), None)
    if spot is None or sys.platform != "linux":  # elsewhere sendfile writes to sockets only
        rest = data.numpy().data
        while rest:
            rest = rest[os.write(to, rest[:CHUNK]) :]
        return
    with spot[0].open("rb") as source:
        at, end = spot[1], spot[1] + len(data)
        while at < end:
            at += os.sendfile(to, source.fileno(), at, end - at)
