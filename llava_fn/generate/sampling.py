"""From scores to the next token: what the decoding options do to a row of logits, and the choice itself.

Each is a pure function of f32[b, v] and shapes never depend on values. Randomness comes in as numbers, drawn before the
first token from a row's own seed: what a row says does not depend on the rows beside it.
Source: transformers generation/logits_process.py, whose order is kept: penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen. ValueError names the value that cannot be."""

    tokens: int = 512  # at most, in an answer
    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # sample from this many most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the fewest most likely tokens that have this probability together
    min_p: float = 0.0  # sample from tokens at least this likely, in units of the most likely one
    repetition_penalty: float = 1.0  # above 1: tokens that the prompt or the answer holds become less likely
    beams: int = 1  # of beam search; 1: none
    length_penalty: float = 1.0  # of beams: a score is the log-probability over length ** this
    samples: int = 1  # answers to each prompt
    seed: int = 0  # of the first sample; the next ones have the next seeds
    stop: tuple[str, ...] = ()  # texts that end an answer and do not belong to it
    logprobs: bool = False  # give the log-probability of each token, under the model and not under these options

    def __post_init__(self) -> None:
        limits = {
            "tokens": (self.tokens >= 1, "at least 1"),
            "temperature": (self.temperature == 0 or 0.01 <= self.temperature < math.inf, "0, or at least 0.01"),
            "top_k": (self.top_k >= 0, "at least 0, which is off"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1, which is off"),
            "min_p": (0 <= self.min_p <= 1, "from 0, which is off, to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100; 1 is off"),
            "beams": (self.beams >= 1, "at least 1, which is off"),
            "length_penalty": (-10 <= self.length_penalty <= 10, "from -10 to 10"),
            "samples": (self.samples >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            "stop": (all(map(_is_text, self.stop)), "texts in Unicode, and none empty"),
        }
        for name, (good, legal) in limits.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {legal}")
        self._check_together()

    def _check_together(self) -> None:
        narrowed = [name for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(self, name) != off]
        if self.temperature == 0 and (narrowed or (self.samples > 1 and self.beams == 1)):
            what = ", ".join(narrowed) or f"samples={self.samples}"
            raise ValueError(f"{what} without a temperature changes nothing; give temperature above 0, or leave it out")
        if self.beams > 1 and (self.temperature or self.logprobs):
            what = "logprobs" if self.logprobs else f"temperature={self.temperature}"
            raise ValueError(f"{what} does not go with beams={self.beams}: a beam is never sampled, and has one score")
        if self.beams > 1 and self.samples > self.beams:
            raise ValueError(f"samples={self.samples} are more than the beams={self.beams} that they are taken from")


def _is_text(s: str) -> bool:
    return s != "" and not any("\ud800" <= c <= "\udfff" for c in s)  # no surrogates, which no text may hold


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """scores: f32[b, v]; seen: bool[b, v], tokens that the row holds. Source: Keskar et al. 2019, arXiv 1909.05858."""
    if penalty == 1:
        return scores
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf below the k-th highest score of each row; equals of it stay."""
    lowest = scores.topk(min(k, scores.shape[-1]), -1).values[:, -1:]
    return scores.masked_fill(scores < lowest, -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf outside the fewest highest scores with probability p. Source: Holtzman et al. 2020, arXiv 1904.09751."""
    ascending, order = scores.sort(-1)
    beyond = ascending.softmax(-1).cumsum(-1) <= 1 - p
    beyond[:, -1] = False
    return scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """-inf below p times the highest probability of each row. Source: Nguyen et al. 2024, arXiv 2407.01082."""
    probs = scores.softmax(-1)
    return scores.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)


def warp(scores: Tensor, d: Decoding) -> Tensor:
    """The scores whose softmax is sampled from. scores: f32[b, v]; d.temperature is above 0."""
    scores = scores / d.temperature
    if d.top_k:
        scores = keep_top_k(scores, d.top_k)
    if d.top_p < 1:
        scores = keep_top_p(scores, d.top_p)
    if d.min_p:
        scores = keep_min_p(scores, d.min_p)
    return scores


def uniforms(seeds: Sequence[int], n: int) -> Tensor:
    """f32[b, n] in [0, 1), on the host: n numbers from each row's seed."""
    return torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """A sample of each row's softmax, by inverting its distribution. scores: f32[b, v]; uniform: f32[b] -> int64[b].

    A token of probability 0 is never drawn: the sum rises at the token that is drawn.
    """
    total = scores.softmax(-1).cumsum(-1)
    total = total.cummax(-1).values  # a parallel sum may fall by a rounding
    return (total > (uniform * total[:, -1])[:, None]).int().argmax(-1)


def sample(logits: Tensor, seen: Tensor, uniform: Tensor, d: Decoding) -> Tensor:
    """The next token of each row, int64[b]. logits: f32[b, v]; seen: bool[b, v]; uniform: f32[b]."""
    scores = penalise(logits, seen, d.repetition_penalty)
    return scores.argmax(-1) if d.temperature == 0 else draw(warp(scores, d), uniform)
