"""Continuous batching: requests come and go in the slots of one cache, and a step decodes a token for each.

    Desk -> admit -> Desk -> step -> Desk, deltas -> release -> Desk

A Desk is a value but for the tensors of its state, which are written: only the newest Desk may be continued. A slot
keeps its keys and values when its answer is done, so that a later prompt with the same prefix computes only the rest:
the next turn of a conversation, another sample of the same question, the same system prompt. An answer does not depend
on the other slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_fn.cache import Cache
from llava_fn.generate import conversation, decode
from llava_fn.generate.assistant import vocabulary
from llava_fn.generate.conversation import GrowingText, Key, Picture, common_prefix, visible
from llava_fn.generate.family import Family
from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import RowOptions, sample, uniforms
from llava_fn.generate.types import DecodeState, Model, PartialAnswer, Prompt, Vocabulary

AnswerName = tuple[str, int]  # of the HTTP request, and the number of the answer
Ranking = tuple[tuple[int, float], ...]  # tokens and their log-probabilities, most likely first


@dataclass(frozen=True)
class Choice:
    """A slot's next token. logprobs and top: one of each if they are requested."""

    token: int
    logprobs: tuple[float, ...] = ()
    top: tuple[Ranking, ...] = ()


@dataclass(frozen=True)
class AnswerRequest:
    """One answer to write. ids and keys: the token id, and the conversation's key, of each position of the prompt.

    vocabulary: with what ends the answer. top: how many most likely tokens are told beside each chosen one. goes_on:
    whether the answer continues a text of the prompt.
    """

    name: AnswerName
    ids: tuple[int, ...]
    keys: tuple[Key, ...]
    pictures: tuple[Picture, ...]
    decoding: Decoding  # the template's stop text included; one sample, no beams
    vocabulary: Vocabulary
    top: int = 0
    goes_on: bool = False
    adapter: str = ""  # its name; "" for the base


@dataclass(frozen=True)
class Delta:
    """What a step added to an answer. finish: "stop" or "length" at the end of the answer.

    logprobs and top: where requested, of each id and of the most likely tokens in its place, in nats under the model.
    """

    name: AnswerName
    new: str
    ids: tuple[int, ...] = ()  # the new token, unless it is one that ends answers
    logprobs: tuple[float, ...] = ()
    top: tuple[Ranking, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Seat:
    """A request in its slot. uniform: f32[tokens], a random number for each token. text: of the answer so far.

    shown: how many characters of it its deltas have.
    """

    request: AnswerRequest
    uniform: Tensor
    text: GrowingText
    row: PartialAnswer = PartialAnswer()
    steps: int = 0
    shown: int = 0


@dataclass(frozen=True)
class Desk:
    """b slots. state: of all slots. cached: the keys of the positions that each row of the cache holds."""

    state: DecodeState
    seats: tuple[Seat | None, ...]
    cached: tuple[tuple[Key, ...], ...]
    feats: Mapping[str, Tensor]  # of the newest pictures, key -> f[p, d]
    rows: tuple[tuple[str, ...], Model] | None = None  # the adapter of each row of the last step, and their model

    @property
    def free(self) -> int:
        """The number of slots without a request."""
        return self.seats.count(None)


def empty(f: Family, slots: int) -> Desk:
    """A desk whose every slot has room for the assistant's whole context. ValueError without a slot."""
    if slots < 1:
        raise ValueError(f"slots={slots}: must be at least 1")
    a = f.base
    like = a.model.embed
    seen = torch.zeros(slots, vocabulary(a).size, dtype=torch.bool, device=like.device)
    state = DecodeState(like.new_zeros(slots, a.config.llama.width), a.model.cache(slots, a.context), seen)
    return Desk(state, (None,) * slots, ((),) * slots, {})


def admit(f: Family, desk: Desk, request: AnswerRequest) -> Desk:
    """Takes a request into a free slot and prefills its prompt.

    The caller makes sure that a slot is free and that the context has room for the answer.
    """
    a = f.member(request.adapter)
    feats = conversation.features(a, request.pictures, desk.feats)
    common = [common_prefix(request.keys[:-1], cached) for cached in desk.cached]
    best = max(range(len(common)), key=lambda j: (common[j], desk.seats[j] is None))
    slot = _slot(desk, best, common)
    if slot != best and common[best]:
        _copy(desk.state.cache, best, slot, common[best])
    prompt = Prompt(request.ids, torch.cat([a.model.embed[:0], *(feats[p.key] for p in request.pictures)]))
    part = _rows(desk.state, slot, slot + 1)
    new = decode.prefill(a.model, [prompt], part.cache, vocabulary(a), [common[best]])
    part.hidden.copy_(new.hidden)
    part.seen.copy_(new.seen)
    text = GrowingText(a.tokenizer, request.goes_on)
    seat = Seat(request, uniforms([request.decoding.seed], request.decoding.tokens)[0], text)
    seats, cached = _put(desk.seats, slot, seat), _put(desk.cached, slot, request.keys)
    return replace(desk, seats=seats, cached=cached, feats=feats)


def _slot(desk: Desk, best: int, common: Sequence[int]) -> int:
    """The slot `best` if it is free and keeps half of its positions; else the free slot with the fewest positions."""
    if desk.seats[best] is None and common[best] >= len(desk.cached[best]) // 2:
        return best
    return min((j for j, seat in enumerate(desk.seats) if seat is None), key=lambda j: (len(desk.cached[j]), j))


def _copy(cache: Cache, source: int, target: int, n: int) -> None:
    for x in (cache.k, cache.v):
        x[:, target, :n] = x[:, source, :n]


def release(desk: Desk, request: str) -> Desk:
    """Frees the slots of an HTTP request. request: its name."""
    return replace(desk, seats=tuple(s if s and s.request.name[0] != request else None for s in desk.seats))


@torch.no_grad()
def step(f: Family, desk: Desk) -> tuple[Desk, list[Delta]]:
    """Decodes the next token of every answer. An answer that has ended leaves its slot."""
    busy = [j for j, seat in enumerate(desk.seats) if seat]
    if not busy:
        return desk, []
    n = busy[-1] + 1
    state = _rows(desk.state, 0, n)
    choices = _choose(decode.logits(f.base.model, state), state.seen, desk.seats[:n])
    seats, deltas = list(desk.seats), []
    for j, seat in enumerate(desk.seats):
        if seat:
            seats[j], delta = _grow(seat, choices[j])
            deltas.append(delta)
    desk = replace(desk, seats=tuple(seats))
    return (_feed(f, desk, [c.token for c in choices]) if desk.free < len(seats) else desk), deltas


def _choose(logits: Tensor, seen: Tensor, seats: Sequence[Seat | None]) -> list[Choice]:
    """A token for each slot."""
    options = RowOptions.of([seat.request.decoding if seat else Decoding() for seat in seats]).to(logits.device)
    uniform = torch.stack([seat.uniform[seat.steps] if seat else torch.zeros(()) for seat in seats])
    ids = sample(logits, seen, uniform.to(logits.device), options)
    return [replace(c, token=token) for c, token in zip(_told(logits, ids, seats), ids.tolist(), strict=True)]


def _told(logits: Tensor, ids: Tensor, seats: Sequence[Seat | None]) -> list[Choice]:
    """What each slot's request wants to be told about the chosen tokens."""
    tops = {j: seat.request.top for j, seat in enumerate(seats) if seat and seat.request.decoding.logprobs}
    choices, rows = [Choice(0)] * len(seats), list(tops)
    if not rows:
        return choices
    scores = logits[rows].log_softmax(-1)
    own = scores.gather(1, ids[rows][:, None])[:, 0].tolist()
    best, tokens = (x.tolist() for x in scores.topk(min(max(tops.values()), scores.shape[1])))
    for i, (j, k) in enumerate(tops.items()):
        choices[j] = Choice(0, (own[i],), (tuple(zip(tokens[i][:k], best[i][:k], strict=True)),))
    return choices


def _grow(seat: Seat, c: Choice) -> tuple[Seat | None, Delta]:
    """The seat after one more token, None if its answer has ended, and what the token adds to the answer."""
    request, d = seat.request, seat.request.decoding
    row = seat.row.grow(c.token, c.logprobs, d, request.vocabulary)
    ended = row.ended or seat.steps + 1 == d.tokens
    new = row.ids[len(seat.row.ids) :]
    text = seat.text.grow(new)
    shown = visible(text.text, d.stop, ended)
    finish = ("stop" if row.ended else "length") if ended else None
    delta = Delta(request.name, shown[seat.shown :], new, c.logprobs[: len(new)], c.top[: len(new)], finish)
    return None if ended else replace(seat, text=text, row=row, steps=seat.steps + 1, shown=len(shown)), delta


def _feed(f: Family, desk: Desk, tokens: Sequence[int]) -> Desk:
    """A decoding step with the chosen tokens, for all rows up to the last busy slot.

    Free rows among them compute too. They write behind the positions that they keep, and nobody reads what they write.
    """
    n = max(j for j, seat in enumerate(desk.seats) if seat) + 1
    size = _reach(desk.state.cache, max(map(len, desk.cached[:n])) + 1)
    part = _rows(desk.state, 0, n)
    lengths = torch.tensor([min(len(keys), size - 1) for keys in desk.cached[:n]])
    c = part.cache
    part = replace(part, cache=Cache(c.k[:, :, :size], c.v[:, :, :size], lengths.to(c.lengths.device)))
    who = tuple(seat.request.adapter if seat else "" for seat in desk.seats[:n])
    rows = desk.rows if desk.rows and desk.rows[0] == who else (who, f.model(who))
    new = decode.step(rows[1], part, torch.tensor(tokens[:n], device=part.hidden.device))
    part.hidden.copy_(new.hidden)
    part.seen.copy_(new.seen)
    cached = [(*keys, tokens[j]) if desk.seats[j] else keys[: c.size - 1] for j, keys in enumerate(desk.cached)]
    return replace(desk, cached=tuple(cached), rows=rows)


def _reach(cache: Cache, tokens: int) -> int:
    """How many positions of each row a step is given: one of few sizes, so that its cost follows the rows' lengths.

    All where fused attention stops at each row's length by itself and needs the whole buffer, as its order tells.
    """
    size = 64
    while size < tokens:
        size *= 2
    return cache.size if cache.k.is_contiguous() else min(size, cache.size)


def _rows(state: DecodeState, start: int, end: int) -> DecodeState:
    """A view of some slots: writes to it are writes to the desk."""
    c = state.cache
    return DecodeState(
        state.hidden[start:end],
        Cache(c.k[:, start:end], c.v[:, start:end], c.lengths[start:end]),
        state.seen[start:end],
    )


def _put(items: tuple, j: int, item: object) -> tuple:
    return (*items[:j], item, *items[j + 1 :])
