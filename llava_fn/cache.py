"""What the decoder remembers of the tokens so far, for generation."""

from __future__ import annotations

from dataclasses import dataclass

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
    def empty(c: Llama, rows: int, size: int, like: Tensor) -> Cache:
        """Room for `size` tokens in each of `rows` rows, in the dtype and on the device of `like`."""
        k, v = (like.new_zeros(c.blocks, rows, size, c.kv_heads, c.head) for _ in range(2))
        return Cache(k, v, torch.zeros(rows, dtype=torch.long, device=lengths_device(like.device)))
