"""The activations of a decoder, read and replaced: the blocks are an argument of llama.decode.

states = []
llama.decode(p, x, stream, c, blocks=edited(state=keep(states)))  # before each block, and after the last
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama
from llava_fn.generate.types import Model
from llava_fn.kernels import Segments, attention
from llava_fn.study.exchange import logprobs

Edit = Callable[[int, Tensor], Tensor]


def same(_: int, x: Tensor) -> Tensor:
    """The edit that changes nothing."""
    return x


def keep(into: list[Tensor]) -> Edit:
    """The edit that changes nothing and appends what it sees to a list."""

    def edit(_: int, x: Tensor) -> Tensor:
        into.append(x)
        return x

    return edit


def edited(state: Edit = same, heads: Edit = same, first: int = 0, block: Callable = llama.block_with) -> Callable:
    """The argument `blocks` of llama.decode: its blocks from `first` on, each with edits.

    state: (i, t d) -> t d, before block i, and after the last for i = l. heads: (i, t n h) -> t n h, what this rank's
    heads give in block i, before the output projection. block: llama.block_with, or another block of its form.
    """

    def call(params: Sequence[TensorDict], x: Tensor, rests: Sequence[tuple]) -> Tensor:
        for i in range(first, len(params)):
            rot, segments, rows, c, tp = rests[i]

            def attend(q: Tensor, k: Tensor, v: Tensor, i: int = i, segments: Segments = segments) -> Tensor:
                return heads(i, attention(q, k, v, segments, causal=True))

            x = block(params[i], state(i, x), rot, rows, attend, c, tp)
        return state(len(params), x)

    return call


@dataclass(frozen=True)
class Activations:
    """What one sequence of t positions makes of the decoder."""

    states: Tensor  # f[l + 1, t, d]: before each block, and after the last
    heads: Tensor  # f[l, t, n, h]: of this rank's heads, before the output projection
    logprobs: Tensor  # f32[r], of each token of the answer, in nats


@torch.no_grad()
def activations(m: Model, x: Tensor, answer: Sequence[int]) -> Activations:
    """Of one sequence. x: t d, the decoder's input, whose last r positions predict the answer."""
    states: list[Tensor] = []
    heads: list[Tensor] = []
    (scores,) = logprobs(m, x, answer, blocks=edited(keep(states), keep(heads)))
    return Activations(torch.stack(states), torch.stack(heads), scores)
