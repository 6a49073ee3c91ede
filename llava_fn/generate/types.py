"""What generation takes and gives: prompts, the vocabulary, rows of text in the making, answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llava_fn import llama
from llava_fn.cache import Cache
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.generate.options import Decoding
from llava_fn.parallel.collectives import TP


@dataclass(frozen=True)
class Prompt:
    """ids: IMAGE at each position of an image. feats: f[(i p), d], what the decoder sees of its images, in order."""

    ids: tuple[int, ...]
    feats: Tensor


@dataclass(frozen=True)
class Words:
    """What generation knows of the vocabulary. decode: ids -> text, for the texts that end an answer."""

    size: int  # only ids below it are ever emitted
    ends: tuple[int, ...]  # each ends an answer and does not belong to it
    decode: Callable[[Sequence[int]], str]

    @staticmethod
    def of(tokenizer: Tokenizer, *ends: int) -> Words:
        """ends: tokens besides EOS that end an answer."""
        return Words(tokenizer.vocab_size, (tokenizer.eos, *ends), tokenizer.decode)

    def spell(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the last tokens spell one of the texts.

        A token spells a byte at least, and the first one may lose a space.
        """
        if not stop:
            return False
        tail = self.decode(ids[-max(len(s.encode()) for s in stop) - 2 :])
        return any(s in tail for s in stop)


@dataclass(frozen=True)
class Decoder:
    """How the decoder runs. tp: ranks that share it. step: `llama.decode_step`, or a form that computes the same."""

    tp: TP = TP()
    step: Callable = llama.decode_step


@dataclass(frozen=True)
class DecodeState:
    """b rows of text, each as far as it has come. hidden predicts its next token."""

    hidden: Tensor  # f[b, d]
    cache: Cache
    seen: Tensor  # bool[b, v]: tokens that the row holds

    def repeat(self, n: int) -> DecodeState:
        """n copies of each row, one after another."""
        return DecodeState(self.hidden.repeat_interleave(n, 0), self.cache.repeat(n), self.seen.repeat_interleave(n, 0))


@dataclass(frozen=True)
class Answer:
    """ids: without what ended them. logprobs: of each in nats, if asked for. score: of a beam."""

    ids: tuple[int, ...]
    ended: bool  # by itself, or by a text of Decoding.stop; not by its length
    logprobs: tuple[float, ...] = ()
    score: float | None = None


@dataclass(frozen=True)
class PartialAnswer:
    """One answer on the host as it grows."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    ended: bool = False

    def grow(self, token: int, logprobs: Sequence[float], d: Decoding, words: Words) -> PartialAnswer:
        """With one more token, if it has not ended."""
        if self.ended:
            return self
        if token in words.ends:
            return replace(self, ended=True)
        row = PartialAnswer((*self.ids, token), (*self.logprobs, *logprobs))
        return replace(row, ended=words.spell(row.ids, d.stop))
