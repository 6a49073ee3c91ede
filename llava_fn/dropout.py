"""Dropout without a state: whether an element is kept follows from keys of its row and its column alone.

A generator of random numbers that counts (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key
of a row is its record and its position, that of a column its update, its weight and its index. Hence an element is
dropped or kept alike when a block is recomputed, on every mesh, and however an update is cut into micro-batches.

Keys are mixed well, one by one; an element's number is then a product of two sums of them, of which the upper bits
count. It takes no shift, which Atlas A2 and A3 compute on slow cores of their own (aclnnRightShift, as an AI CPU task).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_fn.batch import Batch
from llava_fn.kernels.transfer import to_device
from llava_fn.parallel.mesh import Axis


def dropped(x: Tensor, rows: Tensor, columns: Tensor, p: Tensor) -> Tensor:
    """x: f[t, n], rows: int32[t], columns: int32[n] -> x / (1 - p) where an element is kept, else 0. p: fp32[]."""
    threshold = ((p - 0.5) * 2**32).clamp(-(2**31), 2**31 - 1).to(torch.int64)  # the numbers are even over int32
    factor = (rows * 0x2C1B3C6D | 1)[:, None] + (columns * 0x297A2D39 & -2)  # odd: all products are equally likely
    kept = (rows[:, None] ^ columns) * factor >= threshold
    return torch.where(kept, x / (1 - p).to(x.dtype), 0)


def _mixed(x: Tensor) -> Tensor:
    """int32 -> int32, one to one, each bit of the result a mix of all bits. Source: C. Wellons, lowbias32 (2018)."""
    x = x ^ (x >> 16 & 0xFFFF)  # the shift of a negative number brings ones, which the mask removes
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def _int32(text: str) -> int:
    number = zlib.crc32(text.encode())
    return number - 2**32 if number >= 2**31 else number


@dataclass(frozen=True)
class Keys:
    """The keys of one micro-batch. rows: int32[t]; read: int32[r], of the rows that the batch reads.

    blocks: of the decoder. tp: on which its weights are sharded.
    """

    step: int
    p: float
    rows: Tensor
    read: Tensor
    blocks: int
    tp: Axis

    @staticmethod
    def make(batch: Batch, step: int, p: float, blocks: int, tp: Axis) -> Keys:
        """step: number of the update. p: share of the elements that is dropped."""
        queries = batch.stream.segments.queries
        names = torch.tensor([_int32(name) for name in batch.records], dtype=torch.int32)
        names = torch.cat([names, names.new_zeros(len(queries) - len(names))])  # a padding segment has no record
        names = names.repeat_interleave(torch.tensor(queries), output_size=sum(queries))
        rows = _mixed(_mixed(to_device(names, batch.ids.device)) ^ batch.stream.positions.int())
        return Keys(step, p, rows, rows[batch.stream.read], blocks, tp)

    def of(self, path: tuple[str, ...], columns: int) -> dict[str, Tensor]:
        """What linear.py reads of the dropout in front of a decoder's weight. columns: this rank's inputs."""
        *_, block, name = path
        # the last block computes queries, output and feed-forward layer of the rows that are read alone
        rows = self.read if block == str(self.blocks - 1) and name not in ("wk", "wv") else self.rows
        first = self.tp.rank * columns if name in ("wo", "w_down") else 0
        index = torch.arange(first, first + columns, dtype=torch.int32, device=rows.device)
        keys = _mixed(index ^ _int32(f"{self.step} {'/'.join(path)}"))
        return {"rows": rows, "columns": keys, "dropout": torch.tensor(self.p)}
