"""From logits to the next token: the logits processors of the decoding options, and sampling.

Pure functions of f32[b, v], whose shapes never depend on values. Each row has options of its own, as tensors, so that
one call serves rows of different requests, and one captured graph every value of an option. Random numbers are an
argument: they are drawn from each row's own seed before the first token, so that a row's answer does not depend on the
rest of the batch.
Source: transformers generation/logits_process.py, whose order is kept: penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_fn.generate.options import Decoding
from llava_fn.kernels.transfer import to_device

Number = float | Tensor  # of all rows, or f32[b, 1]


@dataclass(frozen=True)
class RowOptions:
    """The decoding options of b rows. used: what any row asks for, known without reading the device."""

    values: Tensor  # f32[6, b]: temperature, 1 if greedy; top_k; 1 - top_p; min_p; repetition penalty; 1 if sampled
    used: frozenset[str]  # of "penalty", "greedy", "sampled", "top_k", "top_p", "min_p"
    most: int = 1  # a power of two, at least the largest top_k

    @staticmethod
    def of(rows: Sequence[Decoding]) -> RowOptions:
        """The options of these rows, on the host."""
        columns = [
            (d.temperature or 1.0, d.top_k, 1 - d.top_p, d.min_p, d.repetition_penalty, d.temperature > 0) for d in rows
        ]
        asked = {
            "penalty": lambda d: d.repetition_penalty != 1,
            "greedy": lambda d: d.temperature == 0,
            "sampled": lambda d: d.temperature > 0,
            "top_k": lambda d: d.top_k > 0,
            "top_p": lambda d: d.top_p < 1,
            "min_p": lambda d: d.min_p > 0,
        }
        used = frozenset(name for name, asks in asked.items() if any(map(asks, rows)))
        most = 1 << (max(d.top_k for d in rows) - 1).bit_length() if "top_k" in used else 1
        return RowOptions(torch.tensor(columns, dtype=torch.float32).t().contiguous(), used, most)

    def to(self, device: torch.device) -> RowOptions:
        """The same options on `device`."""
        return replace(self, values=to_device(self.values, device))


def penalise(scores: Tensor, seen: Tensor, penalty: Number) -> Tensor:
    """scores: f32[b, v]; seen: bool[b, v], tokens that occur in a row. Source: Keskar et al. 2019, arXiv 1909.05858."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, k: Tensor, most: int) -> Tensor:
    """-inf below the k-th highest score of each row; ties with it stay. k: int64[b, 1], at most `most`; 0 keeps all."""
    best = scores.topk(min(most, scores.shape[-1]), -1).values
    lowest = at(best, (k[:, 0] - 1).clamp(0, best.shape[1] - 1))[:, None]
    return scores.masked_fill((scores < lowest) & (k > 0), -torch.inf)


def at(x: Tensor, columns: Tensor) -> Tensor:
    """One entry of each row. x: f32[b, n]; columns: int64[b] -> f32[b]. By indexing: Ascend 950 has no gather."""
    return x[torch.arange(len(x), device=x.device), columns]


def keep_top_p(scores: Tensor, tail: Number) -> Tensor:
    """-inf outside the fewest highest scores with probability 1 - tail. Source: Holtzman et al. 2020, arXiv 1904.09751.

    A tail of 0 keeps all that have a probability.
    """
    ascending, order = scores.sort(-1)
    beyond = ascending.softmax(-1).cumsum(-1) <= tail
    beyond[:, -1] = False
    return scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)


def keep_min_p(scores: Tensor, p: Number) -> Tensor:
    """-inf below p times the highest probability of each row. Source: Nguyen et al. 2024, arXiv 2407.01082."""
    probs = scores.softmax(-1)
    return scores.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)


def warp(scores: Tensor, options: RowOptions) -> Tensor:
    """Temperature, top-k, top-p and min-p. scores: f32[b, v] -> f32[b, v]; a greedy row has temperature 1."""
    temperature, top_k, tail, min_p, *_ = options.values[:, :, None]
    scores = scores / temperature
    if "top_k" in options.used:
        scores = keep_top_k(scores, top_k.long(), options.most)
    if "top_p" in options.used:
        scores = keep_top_p(scores, tail)
    if "min_p" in options.used:
        scores = keep_min_p(scores, min_p)
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
    beyond = total > (uniform * total.amax(-1))[:, None]  # not the last: rounding may make a parallel sum fall
    places = torch.arange(total.shape[1], dtype=torch.int32, device=total.device)
    return torch.where(beyond, places, total.shape[1]).amin(-1).long()  # argmax may give any of several on an NPU


def sample(logits: Tensor, seen: Tensor, uniform: Tensor, options: RowOptions) -> Tensor:
    """The next token of each row, int64[b]. logits: f32[b, v]; seen: bool[b, v]; uniform: f32[b]."""
    scores = penalise(logits, seen, options.values[4, :, None]) if "penalty" in options.used else logits
    if "sampled" not in options.used:
        return scores.argmax(-1)
    drawn = draw(warp(scores, options), uniform)
    return drawn if "greedy" not in options.used else torch.where(options.values[5] > 0, drawn, scores.argmax(-1))
