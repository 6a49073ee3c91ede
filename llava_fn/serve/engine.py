"""Continuous batching: requests come and go in slots, whose keys and values are in pages of one cache.

    Desk -> admit -> Desk -> step -> Desk, deltas -> release -> Desk

A step decodes a token for each answer, and prefills up to `chunk` tokens of the prompts that wait for that, so that the
time between two tokens of an answer is bounded. On an accelerator the host reads what a step has chosen while the next
one runs; a slot whose answer has ended then computes one token that nobody reads. As long as the same answers are under
way, a step sends the device nothing.

A Desk is a value but for the tensors of its state, which are written: only the newest Desk may be continued. A later
prompt with a prefix that the cache holds computes only the rest: the next turn of a conversation, another sample of the
same question, the same system prompt. An answer does not depend on the other slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_fn.batch import IMAGE
from llava_fn.cache import Cache
from llava_fn.generate import conversation, decode
from llava_fn.generate.assistant import Assistant, vocabulary
from llava_fn.generate.conversation import GrowingText, Picture, common_prefix
from llava_fn.generate.family import Family
from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import RowOptions, uniforms
from llava_fn.generate.types import DecodeState, Eager, Model, Prompt, StepInputs
from llava_fn.kernels import page_size
from llava_fn.kernels.transfer import to_device
from llava_fn.serve.pages import Pages, Stored
from llava_fn.serve.seat import AnswerRequest, Delta, Seat, grow

CHUNK = 1024  # tokens
# a captured step serves every row whose options are in one of these sets, so that few steps are captured
USED = tuple(map(frozenset, (
    {"greedy"}, {"greedy", "sampled"}, {"greedy", "sampled", "top_p"},
    {"greedy", "sampled", "top_p", "top_k", "min_p", "penalty"},
)))  # fmt: skip
MOST = 64  # top_k of such a step


@dataclass(frozen=True)
class Flight:
    """Tokens that the device chooses. read: waits for them, and gives rows of figures.

    requests: with the slot of each, and its row among those.
    """

    requests: tuple[tuple[int, int, AnswerRequest], ...]
    read: Callable[[], list]


@dataclass(frozen=True)
class Rows:
    """What rows of a batch need as long as the same requests are in them, on the device."""

    requests: tuple[AnswerRequest | None, ...]
    model: Model
    options: RowOptions
    cache: Cache  # of these rows
    uniform: Tensor  # f32[b, t], random numbers for the tokens to come
    steps: int = 0  # since it was made

    @property
    def logprobs(self) -> bool:
        """Whether any wants the log-probability of its tokens."""
        return any(r.decoding.logprobs for r in self.requests if r)

    @property
    def top(self) -> int:
        """How many of the most likely tokens any wants to be told."""
        return max((r.top for r in self.requests if r and r.decoding.logprobs), default=0)


@dataclass(frozen=True)
class Desk:
    """b slots. state: of all slots, with the cache's pages. ids: int64[b], the newest token of each."""

    state: DecodeState
    ids: Tensor
    seats: tuple[Seat | None, ...]
    pages: Pages
    width: int  # pages of a slot at most
    feats: Mapping[str, Tensor]  # of the newest pictures, key -> f[p, d]
    chunk: int  # tokens of prompts that a step prefills
    late: bool  # the host reads what a step chooses after it has launched the next one
    flights: tuple[Flight, ...] = ()
    rows: Rows | None = None  # of the last step

    @property
    def free(self) -> int:
        """The number of slots without a request."""
        return self.seats.count(None)

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return self.state.cache.k.nbytes + self.state.cache.v.nbytes

    @property
    def running(self) -> tuple[Stored, ...]:
        """What is in the pages of the slots that are not free."""
        return tuple(seat.stored for seat in self.seats if seat)


def pages_for(f: Family, slots: int, tokens: int | None = None) -> Pages:
    """The pages of a cache for so many tokens in all; unless given, for the whole context in each slot.

    ValueError without a slot, or with fewer pages than slots.
    """
    like = f.base.model.embed
    size = page_size(like)
    pages = Pages(size, -(-tokens // size) if tokens else slots * -(-f.base.context // size), like.device.type != "cpu")
    if slots < 1:
        raise ValueError(f"slots={slots}: must be at least 1")
    if pages.count < slots:
        raise ValueError(
            f"cache_tokens={tokens} are {pages.count} pages of {size} tokens, fewer than the {slots} slots, each of "
            "which needs one; give more tokens or fewer slots"
        )
    return pages


def empty(f: Family, slots: int, chunk: int = CHUNK, late: bool | None = None, pages: Pages | None = None) -> Desk:
    """A desk without requests. late: on an accelerator, unless given. pages: as many as `pages_for`, unless given."""
    a, pages = f.base, pages or pages_for(f, slots)
    like = a.model.embed
    seen = torch.zeros(slots, vocabulary(a).size, dtype=torch.bool, device=like.device)
    cache = a.model.cache(pages.count + 1, pages.size)
    state = DecodeState(like.new_zeros(slots, a.config.llama.width), cache, seen)
    ids = torch.zeros(slots, dtype=torch.long, device=like.device)
    late = like.device.type != "cpu" if late is None else late
    return Desk(state, ids, (None,) * slots, pages, pages.needed(a.context), {}, chunk, late)


def warm(f: Family, desk: Desk) -> Desk:
    """An empty desk after steps of every size and kind that requests lead to, so that none of them captures another.

    Steps that are not captured run once.
    """
    a, slots = f.base, len(desk.seats)
    sizes = sorted({_launched(a.model, n, slots) for n in range(1, slots + 1)}) if _captures(a.model) else [1]
    ways = [Decoding(tokens=2), Decoding(tokens=2, temperature=1.0), Decoding(tokens=2, temperature=1.0, top_p=0.9)]
    ways.append(Decoding(tokens=2, temperature=1.0, top_k=2))
    black = torch.zeros(3, *[a.config.vision.image] * 2, dtype=torch.uint8)
    image = (IMAGE,) * a.config.vision.patches
    text = AnswerRequest(("warm", 0), (a.tokenizer.bos,), (a.tokenizer.bos,), (), ways[0], vocabulary(a))
    shown = replace(
        text, ids=image + text.ids, keys=("warm",) * len(image) + text.keys, pictures=(Picture(black, "warm"),)
    )
    rounds = [[replace(text, decoding=d)] * n for n, d in product(sizes, ways if _captures(a.model) else ways[:1])]
    for requests in ([shown], *rounds):
        for request in requests:
            if fits(desk, request) and len(request.ids) + 2 <= a.context:
                desk = admit(f, desk, request)
        while desk.free < slots:
            desk, _ = step(f, desk)
        desk = replace(desk, pages=replace(desk.pages, kept=()), rows=None)
    return replace(desk, feats={})


def fits(desk: Desk, request: AnswerRequest) -> bool:
    """Whether all pages together have room for a request."""
    return desk.pages.needed(len(request.ids) + request.decoding.tokens - 1) <= desk.pages.count


def takes(desk: Desk, request: AnswerRequest) -> bool:
    """Whether to admit a request now: there is a slot, and pages, and the next step has tokens left for its prompt.

    A prompt waits for another one that is being prefilled, if it will find there most of what it would compute.
    """
    waiting = [seat for seat in desk.seats if seat and seat.left]
    if not desk.free or sum(seat.left for seat in waiting) >= desk.chunk:
        return False
    running, keys = desk.running, request.keys[:-1]
    held, source = desk.pages.best(running, keys)
    if not desk.pages.fits(running, len(request.ids) + request.decoding.tokens - 1, held, source):
        return False
    soon = max((common_prefix(keys, seat.request.keys) for seat in waiting), default=0)
    return soon - held <= (len(keys) - held) // 2


def admit(f: Family, desk: Desk, request: AnswerRequest) -> Desk:
    """Takes a request into a free slot; steps prefill its prompt.

    The caller makes sure that a slot and enough pages are free.
    """
    d, turn = request.decoding, max((seat.turn for seat in desk.seats if seat), default=0) + 1
    pages, claim = desk.pages.claim(desk.running, request.keys[:-1], len(request.ids) + d.tokens - 1)
    desk.state.cache.copy_pages(*claim.copied)
    text = GrowingText(f.member(request.adapter).tokenizer, request.goes_on)
    seat = Seat(request, turn, claim.common, claim.pages, uniforms([d.seed], d.tokens)[0], text)
    return replace(desk, seats=_put(desk.seats, desk.seats.index(None), seat), pages=pages)


def release(desk: Desk, request: str) -> Desk:
    """Frees the slots of an HTTP request. request: its name."""
    seats, pages = list(desk.seats), desk.pages
    for j, seat in enumerate(desk.seats):
        if seat and seat.request.name[0] == request:
            seats[j], pages = None, pages.keep(seat.stored)
    return replace(desk, seats=tuple(seats), pages=pages)


@torch.no_grad()
def step(f: Family, desk: Desk) -> tuple[Desk, list[Delta]]:
    """The next token of every answer, and a chunk of the prompts. An answer that has ended leaves its slot."""
    before = desk.flights
    desk = _prefill(f, _decode(f, replace(desk, flights=())))
    now, later = (before, desk.flights) if desk.late and desk.flights else ((*before, *desk.flights), ())
    seats, pages, deltas = list(desk.seats), desk.pages, []
    for flight in now:
        told = flight.read()
        for j, row, request in flight.requests:
            seat = seats[j]
            if seat and seat.request is request:
                seats[j], delta = grow(seat, told[row])
                pages = pages if seats[j] else pages.keep(seat.stored)
                deltas.append(delta)
    return replace(desk, seats=tuple(seats), pages=pages, flights=later), deltas


def _decode(f: Family, desk: Desk) -> Desk:
    """Launches a step of decoding, for all rows up to the last that decodes.

    The others among them compute too. All their pages are page 0, which they write and no answer reads.
    """
    busy = {j: seat for j, seat in enumerate(desk.seats) if seat and seat.decodes}
    if not busy:
        return desk
    n = _launched(f.base.model, max(busy) + 1, len(desk.seats))
    rows = _rows(f, desk, n)
    cache = _reach(rows.cache, max(seat.held for seat in busy.values()) + 1)
    state = DecodeState(desk.state.hidden[:n], cache, desk.state.seen[:n])
    uniform = rows.uniform[:, rows.steps]
    told, after = _launch(rows, StepInputs(state, desk.ids[:n], uniform, rows.options, rows.logprobs))
    desk.ids[:n].copy_(after.ids)
    if "penalty" in rows.options.used:
        desk.state.seen[:n].copy_(after.state.seen)
    cache = replace(after.state.cache, table=rows.cache.table)
    rows = replace(rows, cache=cache, steps=rows.steps + 1)
    return _fly(replace(desk, rows=rows), {j: j for j in busy}, told)


def _launch(rows: Rows, x: StepInputs) -> tuple[Tensor, StepInputs]:
    """A step: what the host reads of it, and the next inputs. What is asked for seldom is not captured."""
    if not rows.top:
        return rows.model.launcher.run(decode.advance, rows.model, x)
    told, after = decode.advance(rows.model, x)
    return _with_top(rows.model, after.state, told, rows.top), after


def _with_top(m: Model, state: DecodeState, told: Tensor, top: int) -> Tensor:
    """The tokens and the log-probabilities of the `top` most likely ones beside what the host reads."""
    scores = decode.logits(m, state).log_softmax(-1)
    best, tokens = scores.topk(min(top, scores.shape[1]))
    return torch.cat([told, tokens.float(), best], 1)


def _fly(desk: Desk, rows: Mapping[int, int], told: Tensor) -> Desk:
    """The desk after a token was chosen for some slots. rows: the row of `told` that each slot has."""
    seats, requests = list(desk.seats), []
    for j, row in rows.items():
        seat = seats[j]
        assert seat
        requests.append((j, row, seat.request))
        seats[j] = replace(seat, chosen=seat.chosen + 1)
    flight = Flight(tuple(requests), decode.fetch(told))
    return replace(desk, seats=tuple(seats), flights=(*desk.flights, flight))


def _rows(f: Family, desk: Desk, n: int) -> Rows:
    """Of the first n slots: those of the last step, if the same requests are in them."""
    seats = [seat if seat and seat.decodes else None for seat in desk.seats[:n]]
    requests = tuple(seat and seat.request for seat in seats)
    if desk.rows and list(map(id, desk.rows.requests)) == list(map(id, requests)):
        return desk.rows
    cache = _pages(desk, [seat.pages if seat else () for seat in seats]).holding(
        [seat.held if seat else 0 for seat in seats]
    )
    uniform = pad_sequence(
        [seat.uniform[seat.chosen :] if seat else torch.zeros(0) for seat in seats], batch_first=True
    )
    who = [r.adapter if r else "" for r in requests]
    m = f.model(who)
    if len(set(who)) > 1:
        m = replace(m, launcher=Eager())  # its parameters are of these requests alone
    options = RowOptions.of([r.decoding if r else Decoding() for r in requests])
    if _captures(m):
        options = replace(options, used=next(s for s in USED if options.used <= s), most=max(MOST, options.most))
    device = desk.ids.device
    return Rows(requests, m, options.to(device), cache, to_device(uniform, device))


def _pages(desk: Desk, rows: Sequence[tuple[int, ...]]) -> Cache:
    """The cache of rows with these pages; page 0 stands behind them."""
    table = torch.tensor([(*pages, *[0] * (desk.width - len(pages))) for pages in rows], dtype=torch.int32)
    return replace(desk.state.cache, table=to_device(table, desk.ids.device))


def _prefill(f: Family, desk: Desk) -> Desk:
    """Launches a chunk of the prompts that came first, and chooses the first token of each that is complete with it."""
    waiting = {j: seat for j, seat in enumerate(desk.seats) if seat and seat.left}
    parts, left = {}, desk.chunk
    for j, seat in sorted(waiting.items(), key=lambda item: item[1].turn):
        if n := min(seat.left, left):
            parts.setdefault(seat.request.adapter, {})[j] = seat.filled + n
            left -= n
    for name, ends in parts.items():
        desk = _prefill_member(f.member(name), desk, ends)
    return desk


def _prefill_member(a: Assistant, desk: Desk, ends: Mapping[int, int]) -> Desk:
    """Prefills slots of one adapter. ends: up to which position of the prompt of each slot."""
    seats = {j: seat for j in ends if (seat := desk.seats[j])}
    pictures = [p for seat in seats.values() for p in seat.request.pictures]
    feats = conversation.features(a, pictures, desk.feats)
    prompts = [_part(a, seat.request, ends[j], feats) for j, seat in seats.items()]
    cache = _pages(desk, [seat.pages for seat in seats.values()])
    new = decode.prefill(a.model, prompts, cache, vocabulary(a), [seat.filled for seat in seats.values()])
    filled = {j: replace(seat, filled=ends[j]) for j, seat in seats.items()}
    desk = replace(desk, seats=tuple(filled.get(j, s) for j, s in enumerate(desk.seats)), feats=feats)
    done = [i for i, seat in enumerate(filled.values()) if not seat.left]
    return _first(a.model, desk, [list(ends)[i] for i in done], _picked(new, done)) if done else desk


def _part(a: Assistant, request: AnswerRequest, end: int, feats: Mapping[str, Tensor]) -> Prompt:
    """The prompt up to a position."""
    rows = torch.cat([a.model.embed[:0], *(feats[p.key] for p in request.pictures)])
    ids = request.ids[:end]
    return Prompt(ids, rows[: ids.count(IMAGE)])


def _picked(state: DecodeState, rows: Sequence[int]) -> DecodeState:
    at = to_device(torch.tensor(rows), state.hidden.device)
    return DecodeState(state.hidden[at], state.cache, state.seen[at])


def _first(m: Model, desk: Desk, slots: Sequence[int], state: DecodeState) -> Desk:
    """Chooses the first tokens of prompts that are prefilled. state: of these slots."""
    seats, device = [seat for j in slots if (seat := desk.seats[j])], desk.ids.device
    uniform = to_device(torch.stack([seat.uniform[:1] for seat in seats]), device)
    options = RowOptions.of([seat.request.decoding for seat in seats]).to(device)
    rows = Rows(tuple(seat.request for seat in seats), m, options, state.cache, uniform)
    ids, told = decode.choose(m, state, uniform[:, 0], rows.options, rows.logprobs)
    at = to_device(torch.tensor(slots), device)
    desk.ids.index_copy_(0, at, ids)
    desk.state.seen.index_copy_(0, at, state.seen)
    told = _with_top(m, state, told, rows.top) if rows.top else told
    return _fly(desk, {j: i for i, j in enumerate(slots)}, told)


def _captures(m: Model) -> bool:
    """Whether each shape of a step is captured once, and therefore few are to be used."""
    return not isinstance(m.launcher, Eager)


def _launched(m: Model, rows: int, slots: int) -> int:
    """How many rows a step is launched with."""
    return min(1 << (rows - 1).bit_length(), slots) if _captures(m) else rows


def _reach(cache: Cache, tokens: int) -> Cache:
    """Of each row as many pages as a step is given: one of few numbers, so that its cost follows the rows' lengths.

    All where fused attention stops at each row's length by itself, as the cache's order in memory tells.
    """
    pages = 1 << (-(-tokens // cache.page) - 1).bit_length()
    return cache if cache.table is None or cache.k.is_contiguous() else replace(cache, table=cache.table[:, :pages])


def _put(items: tuple, j: int, item: object) -> tuple:
    return (*items[:j], item, *items[j + 1 :])
