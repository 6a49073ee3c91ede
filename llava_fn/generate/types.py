"""What generation takes and gives: a model, prompts, the vocabulary, rows of text as they grow, answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama
from llava_fn.cache import Cache
from llava_fn.config import Llava
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.generate.options import Decoding
from llava_fn.parallel.collectives import TP


@dataclass(frozen=True)
class Model:
    """Parameters, their config, and how the decoder runs.

    tp: ranks that share the decoder. step: `llama.decode_step`, or a form that computes the same.
    """

    params: TensorDict
    config: Llava
    tp: TP = TP()
    step: Callable = llama.decode_step

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
    seen: Tensor  # bool[b, v]: the tokens that occur in a row

    def repeat(self, n: int) -> DecodeState:
        """n copies of each row, one after another."""
        return DecodeState(self.hidden.repeat_interleave(n, 0), self.cache.repeat(n), self.seen.repeat_interleave(n, 0))


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
