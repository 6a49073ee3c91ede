"""The key-value cache of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_fn.config import Llama
from llava_fn.kernels import Held, empty_cache
from llava_fn.kernels.transfer import to_device


@dataclass(frozen=True)
class Cache:
    """Keys and values of b rows of text. A function takes it and returns it; its tensors are written in place.

    They stand in pages of s tokens: token t of row j in place t % s of page table[j, t // s]. Without a table, page j
    has room for the whole of row j; `repeat`, `grown` and `reorder` are for such a cache.
    """

    k: Tensor  # l p s m h: block, page, token, head; `kernels.empty_cache` chooses the order in memory
    v: Tensor  # l p s m h
    lengths: Tensor  # int64[b]: tokens that each row holds
    table: Tensor | None = None  # int32[b, n]
    numbers: tuple[int, ...] | None = None  # on an NPU the lengths once more, for its attention reads them on the host

    @staticmethod
    def empty(c: Llama, pages: int, size: int, like: Tensor, tp: int = 1) -> Cache:
        """As many rows as pages, each with room for `size` tokens, in the dtype and on the device of `like`.

        tp: ranks that share the heads; each holds its own.
        """
        k, v = (empty_cache(like, c.blocks, pages, size, c.kv_heads // tp, c.head) for _ in range(2))
        numbers = (0,) * pages if like.device.type == "npu" else None
        return Cache(k, v, torch.zeros(pages, dtype=torch.long, device=like.device), numbers=numbers)

    def holding(self, lengths: Sequence[int]) -> Cache:
        """The same tensors, of rows that hold so many tokens each."""
        sent = to_device(torch.tensor(lengths), self.lengths.device)
        return replace(self, lengths=sent, numbers=None if self.numbers is None else tuple(lengths))

    def longer(self) -> Cache:
        """The same tensors, with a token more in each row."""
        numbers = None if self.numbers is None else tuple(n + 1 for n in self.numbers)
        return replace(self, lengths=self.lengths + 1, numbers=numbers)

    @property
    def rows(self) -> int:
        """b."""
        return len(self.lengths)

    @property
    def size(self) -> int:
        """Tokens that a row has room for."""
        return self.page * (1 if self.table is None else self.table.shape[1])

    @property
    def page(self) -> int:
        """s."""
        return self.k[0].shape[1]  # of a block, since a compiled step gets one tensor for each

    def held(self) -> Held:
        """What the rows hold, for attention."""
        return Held.of(self.lengths, self.size, self.table, self.numbers)

    def slots(self, rows: Tensor, at: Tensor) -> Tensor:
        """Where tokens stand, counted through all pages: int64[t]. rows, at: int64[t], their rows and places there."""
        if self.table is None:
            return rows * self.page + at
        return self.table[rows, at // self.page] * self.page + at % self.page

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Each page onto its target, in place; a page may be a target and a source, of what it held before."""
        for x in (self.k, self.v):
            held = [x[:, source].clone() for source in sources]
            for target, values in zip(targets, held, strict=True):
                x[:, target] = values

    def repeat(self, n: int, into: Cache | None = None) -> Cache:
        """n copies of each row, one after another, in the tensors of `into` or in new ones."""
        k, v = (into.k, into.v) if into else (_like(x, self.rows * n, self.size) for x in (self.k, self.v))
        for new, x in ((k, self.k), (v, self.v)):
            new.unflatten(1, (-1, n)).copy_(x[:, :, None])
        numbers = None if self.numbers is None else tuple(x for x in self.numbers for _ in range(n))
        return Cache(k, v, self.lengths.repeat_interleave(n), numbers=numbers)

    def grown(self, size: int) -> Cache:
        """The same rows with room for at least `size` tokens."""
        if size <= self.size:
            return self
        k, v = (_like(x, x.shape[1], size) for x in (self.k, self.v))
        k[:, :, : self.size], v[:, :, : self.size] = self.k, self.v
        return replace(self, k=k, v=v)

    def reorder(self, rows: Tensor, start: int) -> Cache:
        """Row j becomes row rows[j], int64[b], which is as long, from token `start` on; the rows are equal before it.

        Written in place. No shape depends on a length: the room beyond the lengths moves with the tokens.
        """
        for x in (self.k, self.v):
            x[:, :, start:] = x[:, rows, start:]
        return self


def _like(x: Tensor, rows: int, size: int) -> Tensor:
    """An empty cache of the blocks and heads of x: l b s m h, with other rows and room."""
    return empty_cache(x, x.shape[0], rows, size, *x.shape[3:])
