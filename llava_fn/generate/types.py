"""What generation takes and gives: a model, prompts, the vocabulary, rows of text as they grow, answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama
from llava_fn.cache import Cache
from llava_fn.config import Llava
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import RowOptions
from llava_fn.parallel.collectives import TP


class Launcher(Protocol):
    """How steps of decoding are launched. room: a cache's size is a multiple of it, so that few sizes come up."""

    @property
    def room(self) -> int: ...

    def run(self, step: Advance, m: Model, x: StepInputs) -> tuple[Tensor, StepInputs]:
        """`step(m, x)`. The next call may overwrite the results."""
        ...

    def lend(self, m: Model, rows: int, size: int) -> Cache:
        """A cache whose rows are empty, until the caller is `done` with it."""
        ...

    def done(self, cache: Cache) -> None:
        """Takes back a cache, which the caller does not use any more."""
        ...


class Eager:
    """Launches each operation of a step by itself."""

    room = 64

    def run(self, step: Advance, m: Model, x: StepInputs) -> tuple[Tensor, StepInputs]:
        """`step(m, x)`."""
        return step(m, x)

    def lend(self, m: Model, rows: int, size: int) -> Cache:
        """A new one."""
        return m.cache(rows, size)

    def done(self, cache: Cache) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class Model:
    """Parameters, their config, and how the decoder runs.

    tp: ranks that share the decoder. step: `llama.decode_step`, or a form that computes the same. launcher: of steps.
    """

    params: TensorDict
    config: Llava
    tp: TP = TP()
    step: Callable = llama.decode_step
    launcher: Launcher = Eager()

    @property
    def embed(self) -> Tensor:
        """The decoder's embedding table, or this rank's shard of it: its dtype and device are the activations'."""
        return self.params["llama"]["embed"]

    def cache(self, rows: int, size: int) -> Cache:
        """An empty cache for this rank's heads."""
        return Cache.empty(self.config.llama, rows, size, self.embed, self.tp.axis.size)


@dataclass(frozen=True)
class Prompt:
    """ids: IMAGE at each position of an image. feats: f[(i p), d], the features of its images, in order."""

    ids: tuple[int, ...]
    feats: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """What generation knows of the tokenizer."""

    size: int  # only ids below it are ever emitted
    ends: tuple[int, ...]  # each ends an answer and does not belong to it
    decode: Callable[[Sequence[int]], str]  # for the texts that end an answer

    @staticmethod
    def of(tokenizer: Tokenizer, *ends: int) -> Vocabulary:
        """ends: tokens besides EOS that end an answer."""
        return Vocabulary(tokenizer.vocab_size, (tokenizer.eos, *ends), tokenizer.decode)

    def stopped(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the last tokens hold one of the stop texts.

        Only as many tokens are decoded as a stop text can have: a token has at least a byte, and the first one may lose
        a space.
        """
        if not stop:
            return False
        tail = self.decode(ids[-max(len(s.encode()) for s in stop) - 2 :])
        return any(s in tail for s in stop)


@dataclass(frozen=True)
class DecodeState:
    """b rows of text between two steps of decoding."""

    hidden: Tensor  # f[b, d], from which each row's next token is predicted
    cache: Cache
    seen: Tensor  # bool[b, v]: the tokens that occur in a row, kept while a penalty reads them

    def repeat(self, n: int, into: Cache | None = None) -> DecodeState:
        """n copies of each row, one after another. into: a cache that they fit, which is written; a new one if None."""
        hidden, seen = (x.repeat_interleave(n, 0) for x in (self.hidden, self.seen))
        return DecodeState(hidden, self.cache.repeat(n, into), seen)


@dataclass(frozen=True)
class StepInputs:
    """All that a step reads on the device: b rows, the token that it appends to each, and how it chooses the next."""

    state: DecodeState
    ids: Tensor  # int64[b]
    uniform: Tensor  # f32[b], a random number for each row
    options: RowOptions
    logprobs: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All but the cache's keys and values, and the tokens that occur in a row where no penalty reads them."""
        s = self.state
        table = () if s.cache.table is None else (s.cache.table,)
        seen = (s.seen,) if "penalty" in self.options.used else ()
        return s.hidden, s.cache.lengths, self.ids, self.uniform, self.options.values, *table, *seen

    def on(self, tensors: Sequence[Tensor]) -> StepInputs:
        """The same cache's keys and values with other `tensors`."""
        hidden, lengths, ids, uniform, values, *more = tensors
        table = None if self.state.cache.table is None else more.pop(0)
        state = DecodeState(hidden, replace(self.state.cache, lengths=lengths, table=table), *more or [self.state.seen])
        return StepInputs(state, ids, uniform, replace(self.options, values=values), self.logprobs)


Advance = Callable[[Model, StepInputs], tuple[Tensor, StepInputs]]  # what the host reads of a step, and the next inputs


@dataclass(frozen=True)
class Answer:
    """ids: without the token that ended them. logprobs: of each id in nats, if asked for. score: of a beam."""

    ids: tuple[int, ...]
    ended: bool  # by itself, or by a text of Decoding.stop; not by its length
    logprobs: tuple[float, ...] = ()
    score: float | None = None


@dataclass(frozen=True)
class PartialAnswer:
    """An answer on the host, as far as it has been decoded."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    ended: bool = False

    def grow(self, token: int, logprobs: Sequence[float], d: Decoding, vocabulary: Vocabulary) -> PartialAnswer:
        """The answer with one more token; unchanged if it has ended."""
        if self.ended:
            return self
        if token in vocabulary.ends:
            return replace(self, ended=True)
        row = PartialAnswer((*self.ids, token), (*self.logprobs, *logprobs))
        return replace(row, ended=vocabulary.stopped(row.ids, d.stop))
