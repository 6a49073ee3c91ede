"""The key-value cache of generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_fn.config import Llama
from llava_fn.kernels import empty_cache, lengths_device


@dataclass(frozen=True)
class Cache:
    """Keys and values of b rows of text. A function takes it and returns it; its tensors are written in place."""

    k: Tensor  # l b s m h: block, row, token, head; `kernels.empty_cache` chooses the order in memory
    v: Tensor  # l b s m h
    lengths: Tensor  # int64[b]: tokens that each row holds, where `kernels.lengths_device` wants them

    @staticmethod
    def empty(c: Llama, rows: int, size: int, like: Tensor, tp: int = 1) -> Cache:
        """Room for `size` tokens in each of `rows` rows, in the dtype and on the device of `like`.

        tp: ranks that share the heads; each holds its own.
        """
        k, v = (empty_cache(like, c.blocks, rows, size, c.kv_heads // tp, c.head) for _ in range(2))
        return Cache(k, v, torch.zeros(rows, dtype=torch.long, device=lengths_device(like.device)))

    @property
    def rows(self) -> int:
        """b."""
        return self.k.shape[1]

    @property
    def size(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[2]

    def repeat(self, n: int, into: Cache | None = None) -> Cache:
        """n copies of each row, one after another, in the tensors of `into` or in new ones."""
        k, v = (into.k, into.v) if into else (_like(x, self.rows * n, self.size) for x in (self.k, self.v))
        for new, x in ((k, self.k), (v, self.v)):
            new.unflatten(1, (-1, n)).copy_(x[:, :, None])
        return Cache(k, v, self.lengths.repeat_interleave(n))

    def grown(self, size: int) -> Cache:
        """The same rows with room for at least `size` tokens."""
        if size <= self.size:
            return self
        k, v = (_like(x, x.shape[1], size) for x in (self.k, self.v))
        k[:, :, : self.size], v[:, :, : self.size] = self.k, self.v
        return replace(self, k=k, v=v)

    def reorder(self, rows: Tensor, start: int) -> Cache:
        """Row j becomes row rows[j], int64[b], from token `start` on; the rows are equal before it. Written in place.

        No shape depends on a length: the room beyond the lengths moves with the tokens.
        """
        for x in (self.k, self.v):
            x[:, :, start:] = x[:, rows, start:]
        return replace(self, lengths=self.lengths[rows.to(self.lengths.device)])


def _like(x: Tensor, rows: int, size: int) -> Tensor:
    """An empty cache of the blocks and heads of x: l b s m h, with other rows and room."""
    return empty_cache(x, x.shape[0], rows, size, *x.shape[3:])
