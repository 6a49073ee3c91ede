"""From prompts to answers: prefill, then one token a row and step. Pure, but that the cache's tensors are written.

    features of images -> Prompt -> prefill -> DecodeState -> step -> DecodeState -> step -> ...

The shapes of a step do not depend on lengths, and a step never waits for the device: ids are copied to the host
asynchronously, and on an accelerator the check whether every row has ended lags `BEHIND` steps. Rows that have ended
are still computed, and not read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, llava
from llava_fn.batch import IMAGE, Sample, Stream
from llava_fn.cache import Cache
from llava_fn.generate import beams
from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import RowOptions, at, sample, uniforms
from llava_fn.generate.types import Answer, DecodeState, Model, PartialAnswer, Prompt, StepInputs, Vocabulary
from llava_fn.kernels.transfer import to_device
from llava_fn.parallel import vocab
from llava_fn.parallel.collectives import agree, join

BEHIND = 4  # steps


def compiled_step(backend: str | Callable) -> Callable:
    """`llama.decode_step`, compiled if `backend` is given. ValueError if there is no such backend.

    The compiled function gets one tensor for each block of the cache: torch.compile turns a write into a slice of an
    argument into a copy of the slice, a write into the argument not.
    """
    if not backend:
        return llama.decode_step
    compiled = llava.compiled(llama.decode_step, backend)

    def step(p: TensorDict, ids: Tensor, cache: Cache, *rest: object) -> tuple[Tensor, Cache]:
        x, after = compiled(p, ids, replace(cache, k=cache.k.unbind(), v=cache.v.unbind()), *rest)
        return x, replace(after, k=cache.k, v=cache.v)

    return step


@torch.no_grad()
def prompts(m: Model, samples: Sequence[Sample]) -> list[Prompt]:
    """Prompts from samples, of which only ids and pixels are read."""
    feats = features(m, torch.cat([s.pixels for s in samples]))
    parts = feats.split([len(s.pixels) * m.config.vision.patches for s in samples])
    return [Prompt(s.ids, f) for s, f in zip(samples, parts, strict=True)]


@torch.no_grad()
def features(m: Model, pixels: Tensor) -> Tensor:
    """`llava.features` without a gradient; i may be 0. pixels: uint8[i, 3, h, w] -> f[(i p), d]."""
    return llava.features(m.params, pixels, m.config) if len(pixels) else m.embed[:0]


@torch.no_grad()
def prefill(
    m: Model, prompts: Sequence[Prompt], cache: Cache, vocabulary: Vocabulary, cached: Sequence[int] | None = None
) -> DecodeState:
    """All tokens of the prompts in one pass; prompt j goes to row j of the cache, whose tensors are written.

    cached: length of each prompt's prefix that the cache holds already, less than the prompt's; None for none.
    """
    cached = cached if cached is not None else [0] * len(prompts)
    new = [_without_prefix(s, n) for s, n in zip(prompts, cached, strict=True)]
    x = embed(m, new)
    stream = Stream.of([len(s.ids) for s in new], [1] * len(new), cached).to(x.device)
    hidden, cache = llama.prefill(m.params["llama"], x, stream, cache, m.config.llama, m.tp)
    seen = torch.zeros(len(prompts), vocabulary.size, dtype=torch.bool)
    for row, s in zip(seen, prompts, strict=True):
        row[[i for i in s.ids if 0 <= i < vocabulary.size]] = True
    return DecodeState(hidden, cache, to_device(seen, x.device))


def _without_prefix(s: Prompt, n: int) -> Prompt:
    return Prompt(s.ids[n:], s.feats[s.ids[:n].count(IMAGE) :])


def embed(m: Model, prompts: Sequence[Prompt]) -> Tensor:
    """The decoder's input, f[t, d]: all prompts, packed. ValueError if ids and features do not match."""
    feats = torch.cat([s.feats for s in prompts])
    ids = torch.tensor([i for s in prompts for i in s.ids])
    rows = (ids == IMAGE).nonzero()[:, 0]
    if len(rows) != len(feats):
        raise ValueError(f"{len(rows)} image tokens do not match {len(feats)} features of images")
    x = vocab.embed(m.embed, to_device(ids.clamp(min=0), feats.device), m.tp.axis)
    return llava.splice(x, feats, to_device(rows, feats.device))


def logits(m: Model, state: DecodeState) -> Tensor:
    """f32[b, v], of each row's next token."""
    rows = join(llama.logits(m.params["llama"], state.hidden, m.config.llama), m.tp.axis, 1)
    return rows[:, : state.seen.shape[1]].float()


@torch.no_grad()
def step(m: Model, state: DecodeState, ids: Tensor, mark: bool = True) -> DecodeState:
    """Appends a token to each row; the cache's tensors are written. ids: int64[b]. mark: put them into `seen`."""
    hidden, cache = m.step(m.params["llama"], ids, state.cache, m.config.llama, m.tp)
    return DecodeState(hidden, cache, state.seen.scatter(1, ids[:, None], True) if mark else state.seen)


@torch.no_grad()
def choose(m: Model, state: DecodeState, uniform: Tensor, options: RowOptions, logprobs: bool) -> tuple[Tensor, Tensor]:
    """The next token of each row. uniform: f32[b] -> its id: int64[b], and what the host reads: f32[b, 1].

    With `logprobs` that is f32[b, 2], the id and its log-probability under the model, before the options. fp32 holds
    the ids of any vocabulary up to 16 million tokens.
    """
    scores = logits(m, state)
    ids = agree(sample(scores, state.seen, uniform, options), m.tp.axis)
    columns = [ids[:, None].float()]
    if logprobs:
        columns.append(at(scores.log_softmax(-1), ids)[:, None])
    return ids, torch.cat(columns, 1)


def advance(m: Model, x: StepInputs) -> tuple[Tensor, StepInputs]:
    """One step: what the host reads of the next tokens, as `choose` gives it, and the inputs of the step after it."""
    state = step(m, x.state, x.ids, mark="penalty" in x.options.used)
    ids, told = choose(m, state, x.uniform, x.options, x.logprobs)
    return told, replace(x, state=state, ids=ids)


@torch.no_grad()
def steps(m: Model, state: DecodeState, d: Decoding, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Yields the next token of each row up to `d.tokens` times, as `choose` gives it to the host.

    A tensor is valid until the next one is asked for. seeds: of each row.
    """
    uniform = to_device(uniforms(seeds, d.tokens), state.hidden.device)
    options = RowOptions.of([d] * len(seeds)).to(state.hidden.device)
    ids, told = choose(m, state, uniform[:, 0], options, d.logprobs)
    yield told
    x = StepInputs(state, ids, uniform[:, 0], options, d.logprobs)
    for t in range(1, d.tokens):
        told, x = m.launcher.run(advance, m, replace(x, uniform=uniform[:, t]))
        yield told


def on_host(items: Iterable[Tensor]) -> Iterator[list]:
    """Each tensor as a list; on an accelerator `BEHIND` items late, so that the device never waits for the host."""
    copies: deque[Callable[[], list]] = deque()
    for x in items:
        copies.append(fetch(x))
        if len(copies) > (0 if x.device.type == "cpu" else BEHIND):
            yield copies.popleft()()
    while copies:
        yield copies.popleft()()


def fetch(x: Tensor) -> Callable[[], list]:
    """Starts a copy to the host. The returned function waits for the copy and gives the list."""
    if x.device.type == "cpu":
        values = x.tolist()
        return lambda: values
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    copied = torch.Event(x.device)
    copied.record()

    def read() -> list:
        copied.synchronize()
        return host.tolist()

    return read


def room(m: Model, prompts: Sequence[Prompt], d: Decoding) -> int:
    """The size of a cache for these prompts and their answers, in tokens."""
    room = m.launcher.room
    return -(-(max(len(s.ids) for s in prompts) + d.tokens) // room) * room


def generate(
    m: Model, prompts: Sequence[Prompt], d: Decoding, vocabulary: Vocabulary, seeds: Sequence[int] | None = None
) -> list[list[Answer]]:
    """`d.samples` answers to each prompt. An answer does not depend on the other prompts of the batch.

    seeds: of each prompt's first sample; d.seed unless given.
    """
    many = d.beams > 1 or d.samples > 1
    size = room(m, prompts, d)
    cache = m.cache(len(prompts), size) if many else m.launcher.lend(m, len(prompts), size)
    state = prefill(m, prompts, cache, vocabulary)
    if d.beams > 1:
        append = partial(step, m, mark=d.repetition_penalty != 1)
        best = beams.search(partial(logits, m), append, state, d, vocabulary)
        return [[Answer(ids, ended, score=score) for ids, ended, score in rows[: d.samples]] for rows in best]
    seeds = [seed + j for seed in (seeds or [d.seed] * len(prompts)) for j in range(d.samples)]
    rows = [PartialAnswer()] * len(seeds)
    if many:
        state = state.repeat(d.samples, m.launcher.lend(m, len(rows), size))
    for new in on_host(steps(m, state, d, seeds)):
        rows = [r.grow(int(token), logprobs, d, vocabulary) for r, (token, *logprobs) in zip(rows, new, strict=True)]
        if all(r.ended for r in rows):
            break
    m.launcher.done(state.cache)
    answers = [Answer(r.ids, r.ended, r.logprobs) for r in rows]
    return [answers[j : j + d.samples] for j in range(0, len(answers), d.samples)]


def greedy(m: Model, samples: Sequence[Sample], stop: int, limit: int) -> list[list[int]]:
    """The greedy continuation of each sample, up to the token `stop` (not returned) or `limit` tokens."""
    vocabulary = Vocabulary(m.config.llama.vocab, (stop,), lambda _: "")
    return [list(row[0].ids) for row in generate(m, prompts(m, samples), Decoding(tokens=limit), vocabulary)]
