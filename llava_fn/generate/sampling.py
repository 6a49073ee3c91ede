"""From logits to the next token: the logits processors of the decoding options, and sampling.

Pure functions of f32[b, v], whose shapes never depend on values. Random numbers are an argument: they are drawn from
each row's own seed before the first token, so that a row's answer does not depend on the rest of the batch.
Source: transformers generation/logits_process.py, whose order is kept: penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_fn.generate.options import Decoding


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """scores: f32[b, v]; seen: bool[b, v], tokens that occur in a row. Source: Keskar et al. 2019, arXiv 1909.05858."""
    if penalty == 1:
        return scores
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf below the k-th highest score of each row; ties with it stay."""
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
    """Temperature, top-k, top-p and min-p. scores: f32[b, v]; d.temperature is above 0."""
    scores = scores / d.temperature
    if d.top_k:
        scores = keep_top_k(scores, d.top_k)
    if d.top_p < 1:
        scores = keep_top_p(scores, d.top_p)
    if d.min_p:
        scores = keep_min_p(scores, d.min_p)
    return scores


def uniforms(seeds: Sequence[int], n: int) -> Tensor:
    """f32[b, n] in [0, 1), on the host: n numbers from each row's seed, of 64 bits."""
    return torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(_bits32(seed))) for seed in seeds])


def _bits32(seed: int) -> int:
    """A seed of torch's generator for the CPU, which reads 32 bits: those below 2**32, and a digest of longer ones."""
    if seed < 2**32:
        return seed
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Samples each row's softmax by inverse transform. scores: f32[b, v]; uniform: f32[b] -> int64[b].

    A token of probability 0 is never drawn: the sum rises at the token that is drawn.
    """
    total = scores.softmax(-1).cumsum(-1)
    total = total.cummax(-1).values  # rounding may make a parallel sum fall
    return (total > (uniform * total[:, -1])[:, None]).int().argmax(-1)


def sample(logits: Tensor, seen: Tensor, uniform: Tensor, d: Decoding) -> Tensor:
    """The next token of each row, int64[b]. logits: f32[b, v]; seen: bool[b, v]; uniform: f32[b]."""
    scores = penalise(logits, seen, d.repetition_penalty)
    return scores.argmax(-1) if d.temperature == 0 else draw(warp(scores, d), uniform)
