"""A tensor that is not read yet, and how a stream of them becomes a safetensors file."""

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


def _header(order: Sequence[str], leaves: Mapping[str, Leaf]) -> bytes:
    """The length of the header and the header, padded as the format wants it."""
    rows, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        leaf, begin = leaves[name], end
        end += leaf.nbytes
        rows[name] = {"dtype": SAFETENSORS[leaf.dtype], "shape": leaf.shape, "data_offsets": (begin, end)}
    text = json.dumps(rows).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, leaves: Mapping[str, Leaf], archives: Sequence[Archive], wrote: Callable[[int], None]) -> str:
    """Write a safetensors file one tensor at a time, and return its SHA-256.

    The safetensors library writes only what is all in memory; its reader takes this file for its own. Wide dtypes come
    first, so that every tensor is aligned. archives: the mapped files that leaves come from; what stays as it is goes
    straight from file to file. wrote: called after each tensor with its bytes.
    """
    order = sorted(leaves, key=lambda name: -leaves[name].dtype.itemsize)
    header, digest = _header(order, leaves), hashlib.sha256()
    digest.update(header)
    with path.open("wb") as f, ThreadPoolExecutor(1) as beside:
        f.write(header)
        f.flush()  # from here on the file's descriptor is written to
        for name in order:
            data = leaves[name].read().contiguous().flatten().view(torch.uint8)
            hashed = beside.submit(digest.update, memoryview(data.numpy()))
            _put(f.fileno(), data, archives)
            hashed.result()
            wrote(leaves[name].nbytes)
    return digest.hexdigest()


def _put(to: int, data: Tensor, archives: Sequence[Archive]) -> None:
    """Append bytes to a file. Mapped pages go through the kernel alone, which is several times faster than a write."""
    spot = next(((a.path, at) for a in archives if (at := a.find(data)) is not None), None)
    if spot is None or sys.platform != "linux":  # elsewhere sendfile writes to sockets only
        rest = memoryview(data.numpy())
        while rest:
            rest = rest[os.write(to, rest[:CHUNK]) :]
        return
    with spot[0].open("rb") as source:
        at, end = spot[1], spot[1] + len(data)
        while at < end:
            at += os.sendfile(to, source.fileno(), at, end - at)
