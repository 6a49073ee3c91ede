"""Beam search: k open hypotheses for each of b prompts, and the k best finished ones.

Source: transformers generation/utils.py, _beam_search with early_stopping=False, which it equals token for token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import penalise
from llava_fn.generate.types import DecodeState, Vocabulary
from llava_fn.kernels.transfer import to_device

Step = Callable[[DecodeState, Tensor], DecodeState]  # appends a token to each row
Hypothesis = tuple[tuple[int, ...], bool, float]  # ids, whether it ended by itself, score


@dataclass(frozen=True)
class Beams:
    """k open and k finished hypotheses of each prompt, best first."""

    ids: Tensor  # int64[b, k, t], of the open ones
    scores: Tensor  # f32[b, k], their log-probabilities
    ended: Tensor  # int64[b, k, t], the finished ones
    ended_scores: Tensor  # f32[b, k], log-probabilities over length ** penalty; -inf where there is none yet
    open: Tensor  # bool[b, 1]: whether an open hypothesis may still beat the worst finished one


def _empty(b: int, d: Decoding, fill: int, device: torch.device) -> Beams:
    """Before the first token. All hypotheses of a prompt are equal then, so all but one score -inf."""
    ids = torch.full((b, d.beams, d.tokens), fill, device=device)
    none = torch.full((b, d.beams), -torch.inf, device=device)
    return Beams(ids, none.index_fill(1, torch.zeros(1, dtype=torch.long, device=device), 0.0), ids, none,
                 torch.ones(b, 1, dtype=torch.bool, device=device))  # fmt: skip


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x: b n ..., index: int64[b, k] -> b k ..."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def extend(
    s: Beams, logprobs: Tensor, t: int, ends: Tensor, penalty: float, stops: Callable[[Tensor], Tensor] | None = None
) -> tuple[Beams, Tensor, Tensor]:
    """Token t of every hypothesis.

    logprobs: f32[b, k, v], of token t. ends: int64[e], the tokens that end a hypothesis. stops: int64[b, n, t + 1]
    -> bool[b, n], which hypotheses end by a stop text. Returns the beams, and each open hypothesis's parent and token,
    int64[b, k].

    Takes the (1 + e) k best continuations, so that at least k unfinished ones remain. A finished one counts only if it
    is among the k best; at the last token all finish.
    """
    b, k, v = logprobs.shape
    best, flat = (s.scores[..., None] + logprobs).flatten(1).topk(min((1 + len(ends)) * k, k * v))
    parent, token = flat // v, flat % v
    ids = _take(s.ids, parent).index_copy(2, torch.full((1,), t, device=flat.device), token[..., None])
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
    logits: Callable[[DecodeState], Tensor], step: Step, state: DecodeState, d: Decoding, vocabulary: Vocabulary
) -> list[list[Hypothesis]]:
    """The `d.beams` best answers to each row of the state, best first."""
    b, k = len(state.hidden), d.beams
    start = int(state.cache.lengths.min())
    first, state = torch.arange(b, device=state.hidden.device)[:, None] * k, state.repeat(k)
    ends = to_device(torch.tensor(vocabulary.ends), first.device)
    s = _empty(b, d, vocabulary.ends[0], first.device)

    def stopped(ids: Tensor) -> Tensor:
        rows = [[vocabulary.stopped(row, d.stop) for row in rows] for rows in ids.tolist()]
        return torch.tensor(rows, device=ids.device)

    stops = stopped if d.stop else None
    for t in range(d.tokens):
        scores = logits(state).log_softmax(-1)
        if d.repetition_penalty != 1:
            scores = penalise(scores, state.seen, d.repetition_penalty)
        s, parent, token = extend(s, scores.unflatten(0, (b, k)), t, ends, d.length_penalty, stops)
        if t + 1 == d.tokens or not s.open.any():
            break
        rows = (first + parent).flatten()
        state = replace(state, cache=state.cache.reorder(rows, start), seen=state.seen[rows])
        state = step(state, token.flatten())
    rows = zip(s.ended.tolist(), s.ended_scores.tolist(), strict=True)
    return [[_hypothesis(ids, score, d, vocabulary) for ids, score in zip(*row, strict=True)] for row in rows]


def _hypothesis(ids: list[int], score: float, d: Decoding, vocabulary: Vocabulary) -> Hypothesis:
    """Cut at its end: what follows is padding, the first token of `vocabulary.ends`."""
    n = next((j for j, token in enumerate(ids) if token in vocabulary.ends), len(ids))
    return tuple(ids[:n]), n < len(ids) or vocabulary.stopped(ids[:n], d.stop), score
