"""Where the words of an answer look: the attention probabilities of the forward pass that gives the answer.

    seen = look(a, chat, ids)     # ids of the answer
    seen.maps[3].mean((0, 1))     # of its fourth word, over blocks and heads: one probability for each position
    seen.patches[3, 20]           # of block 20: heads, images, and the patches of each in rows and columns

A token is chosen by the position before it; that position's attention is the token's. A word's is the mean over its
tokens, so that it too sums to one.
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
from llava_fn.generate import assistant
from llava_fn.generate import decode as generate
from llava_fn.generate.assistant import Assistant, Chat
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Prompt
from llava_fn.grad import scan
from llava_fn.kernels import Segments, attention


@torch.no_grad()
def attention_maps(p: TensorDict, x: Tensor, read: int, c: Llama) -> tuple[Tensor, Tensor]:
    """`llama.decode` of one sequence and the attention of its last `read` positions, which it reads.

    x: t d -> r d and f32[l, n, r, t]: for each block and query head, how much position j of the r takes from each of
    the t; rows sum to one. The whole decoder stands on this device. ValueError unless read is from 1 to t.
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
    """What causal attention weighs the values with. q: r n h, the last r of t positions; k: t m h -> f32[n, r, t].

    Of kernels/attention.py's contract for one segment, in fp32 from the scores on.
    """
    r, t = len(q), len(k)
    q = rearrange(q, "r (m g) h -> m g r h", m=k.shape[1])
    scores = (q @ rearrange(k, "t m h -> m 1 h t")).float() * q.shape[-1] ** -0.5
    hidden = torch.ones(r, t, dtype=torch.bool, device=q.device).triu(t - r + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).flatten(0, 1)


@dataclass(frozen=True)
class Look:
    """The words of an answer and what each looks at."""

    words: tuple[str, ...]
    maps: Tensor  # f32[w, l, n, t]: over the positions of prompt and answer
    at: Tensor  # int64[i, p]: the positions of each image's patches

    @property
    def patches(self) -> Tensor:
        """f32[w, l, n, i, rows, columns]: what of it goes to each patch, as the patches lie in the pictures."""
        return self.maps[..., self.at].unflatten(-1, (int(self.at.shape[1] ** 0.5), -1))

    def shares(self) -> dict[str, Tensor]:
        """f32[w, l, n] each: of the images, of the first token, where much of it rests idle, and of all other text."""
        image, first = self.maps[..., self.at.flatten()].sum(-1), self.maps[..., 0]
        return {"image": image, "first": first, "text": 1 - image - first}


@torch.no_grad()
def look(a: Assistant, chat: Chat, ids: Sequence[int]) -> Look:
    """What each word of an answer looks at. chat: ends with the question; ids: of the answer's tokens.

    The maps have l n r t numbers, r tokens of the answer. BadRecord if there is no image, or no word.
    """
    if not chat.pictures:
        raise BadRecord("there is no image to look at; give one")
    spans = words(a.tokenizer, ids)
    if not spans:
        raise BadRecord("the answer has no words, so nothing to look for; ask something else, or give an answer")
    chat = replace(chat, feats=assistant.features(a, chat.pictures, chat.feats))
    asked, _ = assistant.prompt(a, chat, Decoding(tokens=len(ids)))
    whole = Prompt((*asked.ids, *ids[:-1]), asked.feats)  # the last token is chosen, and looks at nothing itself
    x = generate.embed(a.params, [whole], a.run)
    _, maps = attention_maps(a.params["llama"], x, len(ids), a.model.llama)
    means = [maps[:, :, start:end].mean(2) for _, start, end in spans]
    at = (torch.tensor(whole.ids) == IMAGE).nonzero()[:, 0].view(len(chat.pictures), -1)
    return Look(tuple(word for word, _, _ in spans), torch.stack(means).cpu(), at)


def words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """(text, first token, token after the last) of each word: a space or a new line begins one."""
    starts, before = [], ""
    for j in range(len(ids)):
        now = tokenizer.decode(ids[: j + 1]).rstrip("\ufffd")  # a character may have several tokens
        if j == 0 or now[len(before) :][:1].isspace():
            starts.append(j)
        before = now
    spans = pairwise([*starts, len(ids)])
    found = [(tokenizer.decode(ids[start:end]).strip(), start, end) for start, end in spans]
    return [span for span in found if span[0]]


def answer_ids(a: Assistant, chat: Chat, answer: str) -> tuple[int, ...]:
    """The tokens of a given answer to the last question, as in training; without the one that ends it."""
    template = template_of(a.form.template)
    coded = text.encode((*chat.turns, ("gpt", answer)), template, a.tokenizer, a.form.compat)
    ids = coded.ids[len(text.prompt(chat.turns, template, a.tokenizer, a.form.compat)) :]
    ends = assistant.words(a).ends
    return tuple(ids[: next((j for j, i in enumerate(ids) if i in ends), len(ids))])
