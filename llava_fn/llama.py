"""Llama (Touvron et al. 2023; HF modeling_llama.py) on a ragged stream of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn.batch import Stream
from llava_fn.cache import Cache
from llava_fn.config import Llama
from llava_fn.grad import remat, scan
from llava_fn.kernels import (
    Segments,
    attention,
    decode_attention,
    rotary,
    rotary_tables,
    write_kv,
)
from llava_fn.kernels.transfer import to_device
from llava_fn.linear import add_rms_norm, linear, rms_norm, swiglu
from llava_fn.parallel import vocab
from llava_fn.parallel.collectives import TP
from llava_fn.probe import part
from llava_fn.spec import Param, Spec, norm
from llava_fn.spec import linear as weight

LOGIT_ROWS = 2048
Rotation = tuple[Tensor, Tensor]  # cos and sin of the rotary embedding, each t 1 h
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q: t n h, k and v: s m h -> t n h


def spec(c: Llama) -> Spec:
    """Parameters; the head is absent where it is the embedding table."""
    d = c.width
    return {
        "embed": Param((c.vocab, d), ("vocab", None), d**-0.5 if c.tied else 0.02),
        "blocks": {str(i): _block_spec(c) for i in range(c.blocks)},
        "norm": norm(d),
        **({} if c.tied else {"head": weight(c.vocab, d, ("vocab", None))}),
    }


def _block_spec(c: Llama) -> Spec:
    d, f, kv = c.width, c.ffn, c.kv_heads * c.head
    column, row = ("heads", None), (None, "heads")
    return {
        "norm1": norm(d),
        "wq": weight(d, d, column), "wk": weight(kv, d, column), "wv": weight(kv, d, column),
        "wo": weight(d, d, row),
        "norm2": norm(d),
        "w_gate": weight(f, d, ("ffn", None)), "w_up": weight(f, d, ("ffn", None)),
        "w_down": weight(d, f, (None, "ffn")),
    }  # fmt: skip


def check_tp(c: Llama, tp: int) -> None:
    """ValueError if `tp` ranks cannot share the decoder: heads, KV heads, FFN and vocabulary must divide."""
    sizes = {"heads": c.heads, "kv_heads": c.kv_heads, "ffn": c.ffn, "vocab": c.vocab}
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % tp]
    if wrong:
        common = math.gcd(*sizes.values())
        fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(f"tp={tp} does not divide the decoder's {' and '.join(wrong)}; tp can be one of {fits}")


def block(p: TensorDict, x: Tensor, rot: Rotation, segments: Segments, rows: Tensor | None, c: Llama, tp: TP) -> Tensor:
    """One decoder block. x: t d -> t d, V on tp.

    rows: int64[r] or None. In the last block, the rows that are read: x: t d -> r d, and the other rows only give keys
    and values. `segments.queries` then counts `rows`.
    """
    return block_with(p, x, rot, rows, lambda q, k, v: attention(q, k, v, segments, causal=True), c, tp)


def block_with(
    p: TensorDict, x: Tensor, rot: Rotation, rows: Tensor | None, attend: Attend, c: Llama, tp: TP
) -> Tensor:  # fmt: skip
    """`block` whose attention is `attend`. x: t d -> t d or r d, V on tp."""
    h = tp.enter(rms_norm(x, p["norm1"], c.eps))
    h = attend(*_rotated(p, h, rot, rows, c)).flatten(1)
    x = x if rows is None else tp.select(x, rows)
    x, h = add_rms_norm(x, tp.leave(linear(h, p["wo"])), p["norm2"], c.eps)
    return x + tp.leave(linear(swiglu(tp.enter(h), p), p["w_down"]))


def _rotated(p: TensorDict, h: Tensor, rot: Rotation, rows: Tensor | None, c: Llama) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of `rows`, or of all, t n h or r n h; keys and values of all, t m h. h: t d."""
    if "wqkv" in p:
        x = linear(h, p["wqkv"]).unflatten(1, (-1, c.head))  # t n+m+m h
        m = x.shape[1] * c.kv_heads // (c.heads + 2 * c.kv_heads)
        q, k = rotary(x[:, :-m], *rot).tensor_split([-m], 1)
        return q if rows is None else q[rows], k, x[:, -m:]
    k, v = (linear(h, p[w]).unflatten(1, (-1, c.head)) for w in ("wk", "wv"))
    k = rotary(k, *rot)
    if rows is not None:
        h, rot = h[rows], (rot[0][rows], rot[1][rows])
    return rotary(linear(h, p["wq"]).unflatten(1, (-1, c.head)), *rot), k, v


def decode(p: TensorDict, x: Tensor, stream: Stream, c: Llama, tp: TP = TP(), blocks: Callable = scan(block)) -> Tensor:
    """All blocks and the final norm. x: t d, V on tp -> r d, R on tp: the rows that `stream` reads.

    blocks: grad.scan of this module's `block`, or of a form of it that computes the same (remat, compiled, sharded).
    """
    rot = rotary_tables(stream.positions, c.head, c.theta)
    rests = [(rot, stream.segments, None, c, tp)] * (c.blocks - 1)
    rests += [(rot, stream.read_segments, stream.read, c, tp)]
    x = blocks([p["blocks"][str(i)] for i in range(c.blocks)], x, rests)
    return tp.enter(rms_norm(x, p["norm"], c.eps))


def prefill(p: TensorDict, x: Tensor, stream: Stream, cache: Cache, c: Llama, tp: TP = TP()) -> tuple[Tensor, Cache]:
    """`decode` that also writes the keys and values of its tokens into the cache. x: t d -> r d and the cache.

    Segment j of the stream belongs to row j of the cache. Where the cache holds a prefix of the row already, the stream
    was made with `held`, and the segment's keys count the prefix too. tp must not shard the sequence.
    """
    queries, lengths = stream.segments.queries, stream.segments.keys
    slots, held = cache.slots(to_device(_rows(queries), x.device), stream.positions), None
    if queries != lengths:
        at = to_device(torch.cat([torch.arange(n) for n in lengths]), x.device)
        held = cache.slots(to_device(_rows(lengths), x.device), at)
    rot = rotary_tables(stream.positions, c.head, c.theta)
    for i in range(c.blocks):
        last = i == c.blocks - 1
        segments, read = (stream.read_segments, stream.read) if last else (stream.segments, None)

        def attend(q: Tensor, k: Tensor, v: Tensor, i: int = i, segments: Segments = segments) -> Tensor:
            write_kv(cache.k[i], cache.v[i], k, v, slots)
            if held is not None:
                k, v = cache.k[i].flatten(0, 1)[held], cache.v[i].flatten(0, 1)[held]
            return attention(q, k, v, segments, causal=True)

        x = block_with(p["blocks"][str(i)], x, rot, read, attend, c, tp)
    return tp.enter(rms_norm(x, p["norm"], c.eps)), cache.holding(lengths)


def _rows(counts: Sequence[int]) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def decode_step(p: TensorDict, ids: Tensor, cache: Cache, c: Llama, tp: TP = TP()) -> tuple[Tensor, Cache]:
    """One more token in every row. ids: int64[b] -> hidden states b d, which predict the next token, and the cache.

    Shapes do not depend on the lengths. The caller makes sure that every row of the cache has room.
    """
    x = vocab.embed(p["embed"], ids, tp.axis)
    slots, after = cache.slots(torch.arange(len(ids), device=x.device), cache.lengths), cache.longer()
    held, rot = after.held(), rotary_tables(cache.lengths, c.head, c.theta)
    for i in range(c.blocks):

        def attend(q: Tensor, k: Tensor, v: Tensor, i: int = i) -> Tensor:
            write_kv(cache.k[i], cache.v[i], k, v, slots)
            return decode_attention(q, cache.k[i], cache.v[i], held)

        x = block_with(p["blocks"][str(i)], x, rot, None, attend, c, tp)
    return tp.enter(rms_norm(x, p["norm"], c.eps)), after


def head(p: TensorDict, c: Llama) -> Tensor:
    """The weight of the output layer, v d."""
    return p["embed" if c.tied else "head"]


def logits(p: TensorDict, x: Tensor, c: Llama) -> Tensor:
    """x: r d -> r v, V on tp along v."""
    return linear(x, head(p, c))


def nll(p: TensorDict, x: Tensor, targets: Tensor, c: Llama, tp: TP = TP()) -> Tensor:
    """Negative log-likelihood of each row's target, fp32[r]. x: r d, R on tp; targets: int64[r].

    The logits of at most LOGIT_ROWS rows exist at a time; where there are more rows they are computed again in the
    backward pass.
    """

    def chunk(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return vocab.cross_entropy(linear(x, weight), targets, tp.axis)

    if len(x) <= LOGIT_ROWS:
        return chunk(x, head(p, c), targets)
    parts = zip(range(0, len(x), LOGIT_ROWS), x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return torch.cat([remat(chunk)(x, part(head(p, c), at, at + len(x)), t) for at, x, t in parts])
