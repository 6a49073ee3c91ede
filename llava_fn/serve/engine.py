"""Continuous batching: requests come and go in the slots of one cache, and a step gives each a token.

    Desk -> admit -> Desk -> step -> Desk, pieces -> release -> Desk

A Desk is a value but for the tensors of its state, which are written: only the newest may be continued. What a slot
holds stays when its answer is done, and a prompt that begins like it computes only the rest: the next turn of a
conversation, another sample of the same question, the same system prompt. Each answer is what its prompt alone gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_fn.cache import Cache
from llava_fn.generate import assistant
from llava_fn.generate import decode as generate
from llava_fn.generate.assistant import Assistant, Picture
from llava_fn.generate.decode import ROOM
from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import sample, uniforms
from llava_fn.generate.types import DecodeState, PartialAnswer, Prompt, Words

Name = tuple[str, int]  # of an answer: its request's, and which of its samples
Key = int | str  # a token, or the picture's key at one of its positions


@dataclass(frozen=True)
class Job:
    """One answer to write. keys: the token, or the picture's key, at each position of the prompt, ids beside it."""

    name: Name
    ids: tuple[int, ...]
    keys: tuple[Key, ...]
    pictures: tuple[Picture, ...]
    decoding: Decoding  # its stop texts are those of the template too; one sample, no beams


@dataclass(frozen=True)
class Piece:
    """What a step added to an answer. ids and logprobs: of the new token, if it is shown; finish: stop or length."""

    name: Name
    new: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Seat:
    """A job in its slot, as far as it has come. uniform: f32[tokens], its random numbers."""

    job: Job
    uniform: Tensor
    row: PartialAnswer = PartialAnswer()
    steps: int = 0
    shown: str = ""


@dataclass(frozen=True)
class Desk:
    """b slots. state: of all of them. held: the keys that each row of the cache holds."""

    state: DecodeState
    seats: tuple[Seat | None, ...]
    held: tuple[tuple[Key, ...], ...]
    feats: Mapping[str, Tensor]  # of the newest pictures, key -> f[p, d]

    @property
    def free(self) -> int:
        """Slots without a job."""
        return self.seats.count(None)


def empty(a: Assistant, slots: int) -> Desk:
    """A desk whose every slot has room for the assistant's whole context. ValueError without a slot."""
    if slots < 1:
        raise ValueError(f"slots={slots}: must be at least 1")
    like = a.params["llama"]["embed"]
    cache = Cache.empty(a.model.llama, slots, a.context, like)
    seen = torch.zeros(slots, assistant.words(a).size, dtype=torch.bool, device=like.device)
    state = DecodeState(like.new_zeros(slots, a.model.llama.width), cache, seen)
    return Desk(state, (None,) * slots, ((),) * slots, {})


def admit(a: Assistant, desk: Desk, job: Job) -> Desk:
    """With the job in a free slot, its prompt computed. The desk has one, and the context has room for the answer."""
    feats = assistant.features(a, job.pictures, desk.feats)
    common = [assistant.common(job.keys[:-1], held) for held in desk.held]
    best = max(range(len(common)), key=lambda j: (common[j], desk.seats[j] is None))
    slot = _slot(desk, best, common)
    if slot != best and common[best]:
        _copy(desk.state.cache, best, slot, common[best])
    none = a.params["llama"]["embed"][:0]
    prompt = Prompt(job.ids, torch.cat([none, *(feats[p.key] for p in job.pictures)]))
    part = _rows(desk.state, slot, slot + 1)
    new = generate.prefill(a.params, [prompt], part.cache, assistant.words(a), a.model, [common[best]], a.run)
    part.hidden.copy_(new.hidden)
    part.seen.copy_(new.seen)
    seat = Seat(job, uniforms([job.decoding.seed], job.decoding.tokens)[0])
    return Desk(desk.state, _put(desk.seats, slot, seat), _put(desk.held, slot, job.keys), feats)


def _slot(desk: Desk, best: int, common: Sequence[int]) -> int:
    """The slot that holds the most of the prompt if it is free; else the free one whose loss costs least."""
    if desk.seats[best] is None and common[best] >= len(desk.held[best]) // 2:
        return best
    return min((j for j, seat in enumerate(desk.seats) if seat is None), key=lambda j: (len(desk.held[j]), j))


def _copy(cache: Cache, source: int, target: int, n: int) -> None:
    for x in (cache.k, cache.v):
        x[:, target, :n] = x[:, source, :n]


def release(desk: Desk, request: str) -> Desk:
    """Without the answers of a request, which nobody waits for any more."""
    return replace(desk, seats=tuple(s if s and s.job.name[0] != request else None for s in desk.seats))


@torch.no_grad()
def step(a: Assistant, desk: Desk) -> tuple[Desk, list[Piece]]:
    """The next token of every answer. An answer that has ended leaves its slot."""
    busy = [j for j, seat in enumerate(desk.seats) if seat]
    if not busy:
        return desk, []
    words, n = assistant.words(a), busy[-1] + 1
    state = _rows(desk.state, 0, n)
    tokens, logprobs = _choose(generate.logits(a.params, state, a.model, a.run), state.seen, desk.seats[:n])
    seats, pieces = list(desk.seats), []
    for j in busy:
        seats[j], piece = _grow(a, desk.seats[j], tokens[j], logprobs[j], words)
        pieces.append(piece)
    desk = replace(desk, seats=tuple(seats))
    return (_feed(a, desk, tokens) if desk.free < len(seats) else desk), pieces


def _choose(logits: Tensor, seen: Tensor, seats: Sequence[Seat | None]) -> tuple[list[int], list[tuple[float, ...]]]:
    """A token for each slot and its log-probability, if asked for. Slots of equal options are sampled together."""
    groups: dict[Decoding, list[int]] = {}
    for j, seat in enumerate(seats):
        if seat:
            alike = replace(seat.job.decoding, tokens=1, seed=0, stop=(), logprobs=False)
            groups.setdefault(alike, []).append(j)
    ids = torch.zeros(len(seats), dtype=torch.long, device=logits.device)
    for d, rows in groups.items():
        uniform = torch.stack([seats[j].uniform[seats[j].steps] for j in rows]).to(logits.device)
        ids[rows] = sample(logits[rows], seen[rows], uniform, d)
    asked = [j for j, seat in enumerate(seats) if seat and seat.job.decoding.logprobs]
    values = logits[asked].log_softmax(-1).gather(1, ids[asked][:, None])[:, 0].tolist() if asked else []
    given = dict(zip(asked, values, strict=True))
    return ids.tolist(), [(given[j],) if j in given else () for j in range(len(seats))]


def _grow(
    a: Assistant, seat: Seat, token: int, logprobs: tuple[float, ...], words: Words
) -> tuple[Seat | None, Piece]:
    d = seat.job.decoding
    row = seat.row.grow(token, logprobs, d, words)
    ended = row.ended or seat.steps + 1 == d.tokens
    shown = assistant.shown(a.tokenizer.decode(row.ids), d.stop, ended)
    finish = ("stop" if row.ended else "length") if ended else None
    before = len(seat.row.ids)
    piece = Piece(seat.job.name, shown[len(seat.shown) :], row.ids[before:], row.logprobs[before:], finish)
    return None if ended else replace(seat, row=row, steps=seat.steps + 1, shown=shown), piece


def _feed(a: Assistant, desk: Desk, tokens: Sequence[int]) -> Desk:
    """The chosen tokens enter the cache, up to the last busy slot.

    A free row computes too. What it writes stands behind what it holds, and is never read.
    """
    n = max(j for j, seat in enumerate(desk.seats) if seat) + 1
    size = _reach(desk.state.cache, max(map(len, desk.held[:n])) + 1)
    part = _rows(desk.state, 0, n)
    lengths = torch.tensor([min(len(held), size - 1) for held in desk.held[:n]])
    c = part.cache
    part = replace(part, cache=Cache(c.k[:, :, :size], c.v[:, :, :size], lengths.to(c.lengths.device)))
    new = generate.step(a.params, part, torch.tensor(tokens[:n], device=part.hidden.device), a.model, a.run)
    part.hidden.copy_(new.hidden)
    part.seen.copy_(new.seen)
    held = [(*h, tokens[j]) if desk.seats[j] else h[: c.size - 1] for j, h in enumerate(desk.held)]
    return replace(desk, held=tuple(held))


def _reach(cache: Cache, tokens: int) -> int:
    """How much of each row a step reads: few sizes, so that it costs what the rows hold, not the context.

    On an NPU all of it: there the fused op reads as far as each row's length, and wants the whole buffer.
    """
    size = ROOM
    while size < tokens:
        size *= 2
    return cache.size if cache.k.device.type == "npu" else min(size, cache.size)


def _rows(state: DecodeState, start: int, end: int) -> DecodeState:
    """A view of some slots: writing to it writes to the desk."""
    c = state.cache
    return DecodeState(
        state.hidden[start:end],
        Cache(c.k[:, start:end], c.v[:, start:end], c.lengths[start:end]),
        state.seen[start:end],
    )


def _put(items: tuple, j: int, item: object) -> tuple:
    return (*items[:j], item, *items[j + 1 :])
