"""Beam search over rows that share a prompt: k hypotheses of each of b prompts run, and the k best that ended are kept.

Source: transformers generation/utils.py, _beam_search with early_stopping=False, which it equals token for token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import penalise
from llava_fn.generate.types import DecodeState, Words

Step = Callable[[DecodeState, Tensor], DecodeState]  # each row one token further
Found = tuple[tuple[int, ...], bool, float]  # ids, whether it ended by itself, score


@dataclass(frozen=True)
class Beams:
    """Scores are log-probabilities; of those that ended, over length ** penalty, and -inf where there is none."""

    ids: Tensor  # int64[b, k, t]
    scores: Tensor  # f32[b, k]
    ended: Tensor  # int64[b, k, t]
    ended_scores: Tensor  # f32[b, k]
    open: Tensor  # bool[b, 1]: what runs may still become better than what ended


def _empty(b: int, d: Decoding, fill: int, device: torch.device) -> Beams:
    """All of a prompt's hypotheses are equal at first, so all but one are out."""
    ids = torch.full((b, d.beams, d.tokens), fill, device=device)
    none = torch.full((b, d.beams), -torch.inf, device=device)
    return Beams(ids, none.index_fill(1, torch.tensor([0], device=device), 0.0), ids, none,
                 torch.ones(b, 1, dtype=torch.bool, device=device))  # fmt: skip


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x: b n ..., index: int64[b, k] -> b k ..."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def extend(
    s: Beams, logprobs: Tensor, t: int, ends: Tensor, penalty: float, stops: Callable[[Tensor], Tensor] | None = None
) -> tuple[Beams, Tensor, Tensor]:
    """Token t of every hypothesis. logprobs: f32[b, k, v]; ends: int64[e] -> beams, and parent and token, int64[b, k].

    stops: int64[b, n, t + 1] -> bool[b, n], which hypotheses end for another reason than their last token.
    Of the (1 + e) k best continuations those that end cannot all be ends: k others go on. Only an end among the k best
    counts; at the last token everything ends.
    """
    b, k, v = logprobs.shape
    best, flat = (s.scores[..., None] + logprobs).flatten(1).topk(min((1 + len(ends)) * k, k * v))
    parent, token = flat // v, flat % v
    ids = _take(s.ids, parent).index_copy(2, torch.tensor([t], device=flat.device), token[..., None])
    end = torch.isin(token, ends) | (t + 1 == s.ids.shape[2])
    end = end | stops(ids[:, :, : t + 1]) if stops else end
    scores, on = best.masked_fill(end, -torch.inf).topk(k)
    length = (t + 1) ** penalty
    counts = end & s.open & (torch.arange(best.shape[1], device=best.device) < k)
    merged = torch.cat([s.ended_scores, (best / length).masked_fill(~counts, -torch.inf)], 1)
    ended_scores, chosen = merged.topk(k)
    ended = _take(torch.cat([s.ended, ids], 1), chosen)
    still = s.open & (scores[:, :1] / length > ended_scores[:, -1:])
    return Beams(_take(ids, on), scores, ended, ended_scores, still), _take(parent, on), _take(token, on)


@torch.no_grad()
def search(
    logits: Callable[[DecodeState], Tensor], step: Step, state: DecodeState, d: Decoding, words: Words
) -> list[list[Found]]:
    """The `d.beams` best of each row, best first."""
    b, k = len(state.hidden), d.beams
    start = int(state.cache.lengths.min())
    first, state = torch.arange(b, device=state.hidden.device)[:, None] * k, state.repeat(k)
    ends = torch.tensor(words.ends, device=first.device)
    s = _empty(b, d, words.ends[0], first.device)

    def spell(ids: Tensor) -> Tensor:
        return torch.tensor([[words.spell(row, d.stop) for row in rows] for rows in ids.tolist()], device=ids.device)

    for t in range(d.tokens):
        scores = penalise(logits(state).log_softmax(-1), state.seen, d.repetition_penalty)
        s, parent, token = extend(s, scores.unflatten(0, (b, k)), t, ends, d.length_penalty, spell if d.stop else None)
        if t + 1 == d.tokens or not s.open.any():
            break
        rows = (first + parent).flatten()
        state = replace(state, cache=state.cache.reorder(rows, start), seen=state.seen[rows])
        state = step(state, token.flatten())
    found = zip(s.ended.tolist(), s.ended_scores.tolist(), strict=True)
    return [[_found(ids, score, d, words) for ids, score in zip(*row, strict=True)] for row in found]


def _found(ids: list[int], score: float, d: Decoding, words: Words) -> Found:
    """Without what follows the end: the empty rest of a hypothesis is the first token of `words.ends`."""
    n = next((j for j, token in enumerate(ids) if token in words.ends), len(ids))
    return tuple(ids[:n]), n < len(ids) or words.spell(ids[:n], d.stop), score
