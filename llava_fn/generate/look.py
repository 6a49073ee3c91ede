"""What the words of an answer attend to: the attention probabilities of the forward pass that gives the answer.

    attention = look(a, chat, ids)      # ids of the answer
    attention.maps[3].mean((0, 1))      # of its fourth word, over blocks and heads: a probability for each position
    attention.patches[3, 20]            # of block 20: heads, images, and the patches of each in rows and columns

A token is predicted at the position before it, so the attention of that position counts as the token's. A word's
attention is the mean over its tokens, and sums to one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama
from llava_fn.batch import IMAGE, Stream
from llava_fn.config import Llama
from llava_fn.data import text
from llava_fn.data.templates import template_of
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.errors import BadRecord
from llava_fn.generate import conversation, decode
from llava_fn.generate.assistant import Assistant, vocabulary
from llava_fn.generate.conversation import Chat
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Prompt
from llava_fn.grad import scan
from llava_fn.kernels import Segments, attention


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
        return self.maps[..., self.at].unflatten(-1, (int(self.at.shape[1] ** 0.5), -1))

    def shares(self) -> dict[str, Tensor]:
        """f32[w, l, n] each: attention to the images, to the first token (an attention sink), and to all other text."""
        image, first = self.maps[..., self.at.flatten()].sum(-1), self.maps[..., 0]
        return {"image": image, "first": first, "text": 1 - image - first}


@torch.no_grad()
def look(a: Assistant, chat: Chat, ids: Sequence[int]) -> Look:
    """The attention of each word of an answer. chat: ends with the question; ids: of the answer's tokens.

    The maps of all r tokens of the answer, l n r t numbers, are in memory at once. BadRecord if there is no image, or
    no word.
    """
    if not chat.pictures:
        raise BadRecord("there is no image to look at; give one")
    spans = words(a.tokenizer, ids)
    if not spans:
        raise BadRecord("the answer has no words, so nothing to look for; ask something else, or give an answer")
    chat = replace(chat, feats=conversation.features(a, chat.pictures, chat.feats))
    question, _ = conversation.prompt(a, chat, Decoding(tokens=len(ids)))
    whole = Prompt((*question.ids, *ids[:-1]), question.feats)  # nothing is predicted at the last token
    x = decode.embed(a.model, [whole])
    _, maps = attention_maps(a.model.params["llama"], x, len(ids), a.config.llama)
    means = [maps[:, :, start:end].mean(2) for _, start, end in spans]
    at = (torch.tensor(whole.ids) == IMAGE).nonzero()[:, 0].view(len(chat.pictures), -1)
    return Look(tuple(word for word, _, _ in spans), torch.stack(means).cpu(), at)


def words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """(text, index of the first token, index after the last) of each word; a space or a new line begins a word."""
    starts, before = [], ""
    for j in range(len(ids)):
        text_so_far = tokenizer.decode(ids[: j + 1]).rstrip("\ufffd")  # a character may have several tokens
        if j == 0 or text_so_far[len(before) :][:1].isspace():
            starts.append(j)
        before = text_so_far
    spans = pairwise([*starts, len(ids)])
    texts = [(tokenizer.decode(ids[start:end]).strip(), start, end) for start, end in spans]
    return [span for span in texts if span[0]]


def answer_ids(a: Assistant, chat: Chat, answer: str) -> tuple[int, ...]:
    """The tokens of a given answer to the last question, as in training, without the token that ends it."""
    template = template_of(a.form.template)
    encoded = text.encode((*chat.turns, ("gpt", answer)), template, a.tokenizer, a.form.compat)
    ids = encoded.ids[len(text.prompt(chat.turns, template, a.tokenizer, a.form.compat)) :]
    ends = vocabulary(a).ends
    return tuple(ids[: next((j for j, i in enumerate(ids) if i in ends), len(ids))])
