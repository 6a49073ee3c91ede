"""Invertible reshapes, exact to the bit, between our leaves and the tensors of another layout that differ from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Reshape:
    """split: their tensor -> our leaves, views where possible. join: our leaves -> their tensor; inverse of split."""

    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[..., Tensor]


def _conv(w: Tensor) -> Tensor:
    """d (c a b) -> d c a b, where c = 3 colours and a = b."""
    return w.unflatten(1, (3, math.isqrt(w.shape[1] // 3), -1))


SAME = Reshape(lambda t: (t,), lambda t: t)
CONV = Reshape(lambda t: (t.flatten(1),), _conv)  # their patch embedding is a convolution, ours a matrix product
TOKEN = Reshape(lambda t: (t.flatten(),), lambda t: t[None, None])  # Megatron's class token is 1 1 d
STACK = Reshape(lambda t: t.chunk(3), lambda *qkv: torch.cat(qkv))  # OpenAI's rows are q, k, v
PAIR = Reshape(lambda t: t.chunk(2), lambda *pair: torch.cat(pair))  # Megatron's rows are gate, up


def interleave(groups: int, head: int) -> Reshape:
    """Megatron's rows: for each KV head, the rows of its query heads, of its key and of its value.

    groups: number of KV heads. head: rows of a head. Source: Megatron-LM, attention.py,
    SelfAttention.get_query_key_value_tensors.
    """

    def split(t: Tensor) -> tuple[Tensor, ...]:
        x = rearrange(t, "(g r h) ... -> g r h ...", g=groups, h=head)
        return x[:, :-2].flatten(0, 2), x[:, -2].flatten(0, 1), x[:, -1].flatten(0, 1)

    def join(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [rearrange(t, "(g r h) ... -> g r h ...", g=groups, h=head) for t in (q, k, v)]
        return torch.cat(parts, 1).flatten(0, 2)

    return Reshape(split, join)
