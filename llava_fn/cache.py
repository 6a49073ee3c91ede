"""What the decoder remembers of the tokens so far, for generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_fn.config import Llama
from llava_fn.kernels import lengths_device


@dataclass(frozen=True)
class Cache:
    """Keys and values of b rows of text. It is an argument and a result, and its tensors are written in place."""

    k: Tensor  # l b s m h: of each block, s tokens a row at most
    v: Tensor  # l b s m h
    lengths: Tensor  # int64[b]: tokens that each row holds, where `kernels.lengths_device` wants them

    @staticmethod
    def empty(c: Llama, rows: int, size: int, like: Tensor, tp: int = 1) -> Cache:
        """Room for `size` tokens in each of `rows` rows, in the dtype and on the device of `like`.

        tp: ranks that share the heads; each holds its own.
        """
        k, v = (like.new_zeros(c.blocks, rows, size, c.kv_heads // tp, c.head) for _ in range(2))
        return Cache(k, v, torch.zeros(rows, dtype=torch.long, device=lengths_device(like.device)))

    @property
    def size(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[2]

    def repeat(self, n: int) -> Cache:
        """n copies of each row, one after another."""
        return Cache(*(x.repeat_interleave(n, 1) for x in (self.k, self.v)), self.lengths.repeat_interleave(n))

    def grown(self, size: int) -> Cache:
        """The same rows with room for `size` tokens, or as it is if there is room already."""
        more = size - self.size
        if more <= 0:
            return self
        pad = (0, 0, 0, 0, 0, more)
        return replace(self, k=torch.nn.functional.pad(self.k, pad), v=torch.nn.functional.pad(self.v, pad))

    def reorder(self, rows: Tensor, start: int) -> Cache:
        """Row j becomes row rows[j], int64[b], from token `start` on; the rows are equal before it. Written in place.

        No shape depends on a length: the room beyond the lengths moves with the tokens.
        """
        for x in (self.k, self.v):
            x[:, :, start:] = x[:, rows, start:]
        return replace(self, lengths=self.lengths[rows.to(self.lengths.device)])
