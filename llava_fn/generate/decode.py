"""From prompts to answers: prefill, then one token a row and step, with a cache. Pure but for the cache's tensors.

    features of images -> Prompt -> prefill -> DecodeState -> step -> DecodeState -> step -> ...

No shape depends on a length and no step waits for the device: the ids are copied to the host on the side, and the check
whether every row has ended runs `BEHIND` steps behind on an accelerator. Rows that have ended go on unread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, llava
from llava_fn.batch import IMAGE, Sample, Stream
from llava_fn.cache import Cache
from llava_fn.config import Llava
from llava_fn.generate import beams
from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import sample, uniforms
from llava_fn.generate.types import Answer, Decoder, DecodeState, PartialAnswer, Prompt, Words
from llava_fn.parallel import vocab
from llava_fn.parallel.collectives import agree, join

BEHIND = 4
ROOM = 64  # a cache has room for a multiple of this many tokens, so that few sizes are ever compiled


def compiled_step(backend: str | Callable) -> Callable:
    """`llama.decode_step`, compiled if `backend` names one. It is given a tensor for each block of the cache.

    A write into a slice of an argument would be compiled into a copy of that slice, a write into the argument is not.
    """
    if not backend:
        return llama.decode_step
    compiled = llava.compiled(llama.decode_step, backend)

    def step(p: TensorDict, ids: Tensor, cache: Cache, *rest: object) -> tuple[Tensor, Cache]:
        x, after = compiled(p, ids, replace(cache, k=cache.k.unbind(), v=cache.v.unbind()), *rest)
        return x, replace(cache, lengths=after.lengths)

    return step


@torch.no_grad()
def prompts(p: TensorDict, samples: Sequence[Sample], c: Llava) -> list[Prompt]:
    """Prompts from samples, of which only ids and pixels are read."""
    feats = features(p, torch.cat([s.pixels for s in samples]), c)
    parts = feats.split([len(s.pixels) * c.vision.patches for s in samples])
    return [Prompt(s.ids, f) for s, f in zip(samples, parts, strict=True)]


@torch.no_grad()
def features(p: TensorDict, pixels: Tensor, c: Llava) -> Tensor:
    """`llava.features` without a gradient, and of no image at all too. pixels: uint8[i, 3, h, w] -> f[(i p), d]."""
    return llava.features(p, pixels, c) if len(pixels) else p["llama"]["embed"][:0]


@torch.no_grad()
def prefill(
    p: TensorDict, prompts: Sequence[Prompt], cache: Cache, words: Words, c: Llava, held: Sequence[int] | None = None,
    run: Decoder = Decoder(),
) -> DecodeState:  # fmt: skip
    """All tokens of the prompts in one pass; row j of the cache is prompt j. The cache's tensors are written.

    held: how many of each prompt's first tokens the cache holds already, fewer than the prompt has; None for none.
    """
    held = held if held is not None else [0] * len(prompts)
    new = [_after(s, n) for s, n in zip(prompts, held, strict=True)]
    x = embed(p, new, run)
    stream = Stream.of([len(s.ids) for s in new], [1] * len(new), held).to(x.device)
    hidden, cache = llama.prefill(p["llama"], x, stream, cache, c.llama, run.tp)
    seen = torch.zeros(len(prompts), words.size, dtype=torch.bool)
    for row, s in zip(seen, prompts, strict=True):
        row[[i for i in s.ids if 0 <= i < words.size]] = True
    return DecodeState(hidden, cache, seen.to(x.device))


def _after(s: Prompt, held: int) -> Prompt:
    return Prompt(s.ids[held:], s.feats[s.ids[:held].count(IMAGE) :])


def embed(p: TensorDict, prompts: Sequence[Prompt], run: Decoder = Decoder()) -> Tensor:
    """The decoder's input of all prompts, one after another, f[t, d]. ValueError if ids and features do not match."""
    feats = torch.cat([s.feats for s in prompts])
    ids = torch.tensor([i for s in prompts for i in s.ids])
    rows = (ids == IMAGE).nonzero()[:, 0]
    if len(rows) != len(feats):
        raise ValueError(f"{len(rows)} image tokens do not match {len(feats)} features of images")
    x = vocab.embed(p["llama"]["embed"], ids.clamp(min=0).to(feats.device), run.tp.axis)
    return llava.splice(x, feats, rows.to(feats.device))


def logits(p: TensorDict, state: DecodeState, c: Llava, run: Decoder = Decoder()) -> Tensor:
    """f32[b, v] of each row's next token."""
    rows = join(llama.logits(p["llama"], state.hidden, c.llama), run.tp.axis, 1)
    return rows[:, : state.seen.shape[1]].float()


@torch.no_grad()
def step(p: TensorDict, state: DecodeState, ids: Tensor, c: Llava, run: Decoder = Decoder()) -> DecodeState:
    """Each row one token further. ids: int64[b]."""
    hidden, cache = run.step(p["llama"], ids, state.cache, c.llama, run.tp)
    return DecodeState(hidden, cache, state.seen.scatter(1, ids[:, None], True))


@torch.no_grad()
def steps(
    p: TensorDict, state: DecodeState, d: Decoding, seeds: Sequence[int], c: Llava, run: Decoder = Decoder()
) -> Iterator[Tensor]:
    """Up to `d.tokens` times the next token of each row, and its log-probability: f64[b, 2], or int64[b, 1] without."""
    uniform = uniforms(seeds, d.tokens).to(state.hidden.device)
    for t in range(d.tokens):
        scores = logits(p, state, c, run)
        ids = agree(sample(scores, state.seen, uniform[:, t], d), run.tp.axis)
        if d.logprobs:
            logprob = scores.log_softmax(-1).gather(1, ids[:, None])
            yield torch.cat([ids[:, None].double(), logprob.double()], 1)
        else:
            yield ids[:, None]
        if t + 1 < d.tokens:
            state = step(p, state, ids, c, run)


def on_host(items: Iterable[Tensor]) -> Iterator[list]:
    """Each tensor as a list. On an accelerator `BEHIND` items late, so that the device never waits for the host."""
    waiting: deque[Callable[[], list]] = deque()
    for x in items:
        waiting.append(_fetch(x))
        if len(waiting) > (0 if x.device.type == "cpu" else BEHIND):
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _fetch(x: Tensor) -> Callable[[], list]:
    if x.device.type == "cpu":
        return x.tolist
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    there = torch.Event(x.device)
    there.record()

    def read() -> list:
        there.synchronize()
        return host.tolist()

    return read


def room(prompts: Sequence[Prompt], d: Decoding) -> int:
    """Tokens that a row of the cache needs room for."""
    return -(-(max(len(s.ids) for s in prompts) + d.tokens) // ROOM) * ROOM


def generate(
    p: TensorDict, prompts: Sequence[Prompt], d: Decoding, words: Words, c: Llava, seeds: Sequence[int] | None = None,
    run: Decoder = Decoder(),
) -> list[list[Answer]]:  # fmt: skip
    """`d.samples` answers to each prompt. Each is what the prompt alone would be answered.

    seeds: of each prompt's first sample, d.seed unless given.
    """
    cache = Cache.empty(c.llama, len(prompts), room(prompts, d), p["llama"]["embed"], run.tp.axis.size)
    state = prefill(p, prompts, cache, words, c, run=run)
    if d.beams > 1:
        found = beams.search(lambda s: logits(p, s, c, run), lambda s, ids: step(p, s, ids, c, run), state, d, words)
        return [[Answer(ids, ended, score=score) for ids, ended, score in rows[: d.samples]] for rows in found]
    seeds = [seed + j for seed in (seeds or [d.seed] * len(prompts)) for j in range(d.samples)]
    rows = [PartialAnswer()] * len(seeds)
    for new in on_host(steps(p, state.repeat(d.samples), d, seeds, c, run)):
        rows = [r.grow(int(token), logprobs, d, words) for r, (token, *logprobs) in zip(rows, new, strict=True)]
        if all(r.ended for r in rows):
            break
    answers = [Answer(r.ids, r.ended, r.logprobs) for r in rows]
    return [answers[j : j + d.samples] for j in range(0, len(answers), d.samples)]


def greedy(p: TensorDict, samples: Sequence[Sample], stop: int, limit: int, c: Llava) -> list[list[int]]:
    """The most likely continuation of each sample up to the token `stop` (not returned) or `limit` tokens."""
    words = Words(c.llama.vocab, (stop,), lambda _: "")
    return [list(row[0].ids) for row in generate(p, prompts(p, samples, c), Decoding(tokens=limit), words, c)]
