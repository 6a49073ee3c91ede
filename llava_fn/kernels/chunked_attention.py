"""Causal attention on a CPU in chunks of queries, each with the keys up to its last query's.

Contract: b segments of one size, q: (b t) n h, k and v: (b s) n h, t <= s, fp32 or fp64 -> (b t) n h, as `attention`
with causal=True. For the backward pass a call keeps the probabilities, n b t (s + CHUNK) / 2 numbers if t = s, where
they are at most KEPT; else, and for a second gradient, they are computed again, of one chunk at a time.
torch's attention for a CPU skips hidden keys in blocks of 512. This skips them in blocks of CHUNK: with 603 keys and 8
heads of 64 both passes take 0.66 of its time, 0.74 with probabilities computed again; above MOST more than its time.
Source: Dao et al. 2022, arXiv 2205.14135, appendix B.4, the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 64  # queries
LEAST, MOST = 160, 1024  # keys
KEPT = 2**23  # numbers: 32 MiB


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, b: int) -> Tensor:
    """q: (b t) n h, k and v: (b s) n h -> (b t) n h; see the module's contract."""
    out = _Chunked.apply(q, k, v, b)
    assert isinstance(out, Tensor)
    return out


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, b: int) -> Tensor:
        out, (heads, keys, values), ps = torch.empty_like(q), _heads_first(q, k, v), []
        ctx.b, chunks = b, list(_chunks(b, len(q) // b, len(k) // b))
        numbers = q.shape[1] * sum((rows.stop - rows.start) * (seen.stop - seen.start) for rows, seen in chunks)
        keep = any(ctx.needs_input_grad) and numbers <= KEPT
        for rows, seen in chunks:
            p = _probabilities(heads[:, rows], keys[:, seen])
            out[rows] = (p @ values[:, seen]).transpose(0, 1)
            if keep:
                ps.append(p)
        ctx.save_for_backward(q, k, v, *ps)
        return out

    @staticmethod
    def backward(ctx, *gs: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second gradient goes through the probabilities
            kept = []
        (heads, keys, values), g = _heads_first(q, k, v), gs[0].transpose(0, 1)
        d_q, d_k, d_v = torch.empty_like(q), *(torch.zeros(x.shape, dtype=x.dtype) for x in (keys, values))  # n (b s) h
        for j, (rows, seen) in enumerate(_chunks(ctx.b, len(q) // ctx.b, len(k) // ctx.b)):
            p = kept[j] if kept else _probabilities(heads[:, rows], keys[:, seen])
            d_v[:, seen].baddbmm_(p.transpose(1, 2), g[:, rows])
            d_p = g[:, rows] @ values[:, seen].transpose(1, 2)
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            d_q[rows] = (d_s @ keys[:, seen]).transpose(0, 1)
            d_k[:, seen].baddbmm_(d_s.transpose(1, 2), heads[:, rows])
        return d_q.mul_(q.shape[2] ** -0.5), d_k.transpose(0, 1), d_v.transpose(0, 1), None


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n (b t) h, n (b s) h, n (b s) h; the queries are scaled."""
    return (q * q.shape[2] ** -0.5).transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def _chunks(b: int, t: int, s: int) -> Iterator[tuple[slice, slice]]:
    """Of queries, and the keys that any of them sees."""
    for j in range(b):
        for at in range(0, t, CHUNK):
            end = min(at + CHUNK, t)
            yield slice(j * t + at, j * t + end), slice(j * s, j * s + s - t + end)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """q: n r h, the last of which sees all keys, k: n s h -> n r s."""
    scores, r = q @ k.transpose(1, 2), q.shape[1]
    scores[:, :, -r:] += torch.full((r, r), -torch.inf, dtype=q.dtype).triu_(1)
    return scores.softmax(-1)
