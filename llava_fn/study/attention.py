"""What the words of an answer attend to: the attention probabilities of the forward pass that gives the answer.

    attention = look(a.model, exchange(a, chat, ids))  # ids of the answer
    attention.maps[3].mean((0, 1))      # of its fourth word, over blocks and heads: a probability for each position
    attention.patches[3, 20]            # of block 20: heads, images, and the patches of each in rows and columns

A token is predicted at the position before it, so the attention of that position counts as the token's. A word's
attention is the mean over its tokens, and sums to one too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama
from llava_fn.batch import Stream
from llava_fn.config import Llama
from llava_fn.generate.types import Model
from llava_fn.grad import scan
from llava_fn.kernels import Segments, attention
from llava_fn.study.exchange import Exchange, in_picture, inputs


@torch.no_grad()
def attention_maps(p: TensorDict, x: Tensor, read: int, c: Llama) -> tuple[Tensor, Tensor]:
    """`llama.decode` of one sequence, and the attention probabilities of its last `read` positions.

    x: t d -> r d, the hidden states of those positions, and f32[l, n, r, t], for each block and query head the
    probabilities over the t positions, which sum to one. The decoder is whole on this device. ValueError unless read is
    from 1 to t.
    """
    if not 1 <= read <= len(x):
        raise ValueError(f"read={read}: must be from 1 to the {len(x)} positions of the sequence")
    maps: list[Tensor] = []

    def block(p: TensorDict, x: Tensor, rot: llama.Rotation, segments: Segments, rows: Tensor | None, *rest) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            maps.append(probabilities(q[-read:], k))
            return attention(q, k, v, segments, causal=True)

        return llama.block_with(p, x, rot, rows, attend, *rest)

    hidden = llama.decode(p, x, Stream.of([len(x)], [read]).to(x.device), c, blocks=scan(block))
    return hidden, torch.stack(maps)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """The weights of causal attention for one segment. q: r n h, the last r of t positions; k: t m h -> f32[n, r, t].

    In fp32 from the scores on, as kernels/attention.py has it.
    """
    r, t = len(q), len(k)
    q = rearrange(q, "r (m g) h -> m g r h", m=k.shape[1])
    scores = (q @ rearrange(k, "t m h -> m 1 h t")).float() * q.shape[-1] ** -0.5
    future = torch.ones(r, t, dtype=torch.bool, device=q.device).triu(t - r + 1)
    return scores.masked_fill(future, -torch.inf).softmax(-1).flatten(0, 1)


@dataclass(frozen=True)
class Look:
    """The words of an answer and the attention of each."""

    words: tuple[str, ...]
    maps: Tensor  # f32[w, l, n, t]: over the positions of prompt and answer
    at: Tensor  # int64[i, p]: the positions of each image's patches

    @property
    def patches(self) -> Tensor:
        """f32[w, l, n, i, rows, columns]: the attention to each patch, as the patches lie in the pictures."""
        return in_picture(self.maps[..., self.at])

    def shares(self) -> dict[str, Tensor]:
        """f32[w, l, n] each: attention to the images, to the first token (an attention sink), and to all other text."""
        image, first = self.maps[..., self.at.flatten()].sum(-1), self.maps[..., 0]
        return {"image": image, "first": first, "text": 1 - image - first}


@torch.no_grad()
def look(m: Model, e: Exchange) -> Look:
    """The attention of each word of an answer. The decoder is whole on this device.

    The maps of all r tokens of the answer, l n r t numbers, are in memory at once.
    """
    _, maps = attention_maps(m.params["llama"], inputs(m, e), len(e.answer), m.config.llama)
    means = [maps[:, :, start:end].mean(2) for _, start, end in e.words]
    return Look(tuple(e.said), torch.stack(means).cpu(), e.at)
