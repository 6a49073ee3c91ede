"""From scores to the next token: what the decoding options do to a row of logits, and the choice itself.

Each is a pure function of f32[b, v] and shapes never depend on values. Randomness comes in as numbers, drawn before the
first token from a row's own seed: what a row says does not depend on the rows beside it.
Source: transformers generation/logits_process.py, whose order is kept: penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_fn.generate.options import Decoding


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
