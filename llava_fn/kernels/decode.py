"""Attention of one new token per row to a preallocated KV cache: a step of autoregressive decoding.

Contract: q: b n h, k and v: p s m h, pages of s tokens -> b n h, all of one dtype. n is a multiple of m (grouped KV
heads: query head j reads KV head j // (n/m)). Scores are scaled by h**-0.5. `Held` tells which keys each row sees, and
in which pages they are. The rest of the cache does not change the result, as long as it is finite. No shape depends on
a length and no step synchronises with the device, so that one graph serves all steps.
The fused op of an NPU reads the lengths on the host; its limits are raised as ValueError. On CUDA the flash attention
that torch ships reads the keys that a row holds and no others. Where it cannot (torch before 2.12, fp32), a mask hides
the rest, and pages are gathered into rows. The memory order of a cache depends on the device, too: `empty_cache`
allocates it, and `page_size` is the size of a page that the device's attention reads best.
Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245; pages: Kwon et al. 2023, arXiv
2309.06180.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.dispatch import choose, npu_op, require, require_float
from llava_fn.kernels.varlen import varlen_attn


@dataclass(frozen=True)
class Held:
    """The keys that each of b rows sees, for the attention of all blocks of a step.

    lengths: int64[b], on the device of the cache: row j sees its tokens 0 .. lengths[j]-1, the new one included.
    table: int32[b, n], the pages of each row in order; page j is row j if None.
    numbers: the lengths on the host, which a CPU and an NPU read.
    runs: for a CPU with a table. Of each row the place of its first token, counted through all pages, or of all of its
    tokens, int32[t], where its pages do not follow one another.
    stream: for CUDA, int32[b], the lengths, and int32[b + 1] twice, starts of the queries and of the rows' room.
    """

    lengths: Tensor
    table: Tensor | None = None
    numbers: tuple[int, ...] | None = None
    runs: tuple[int | Tensor, ...] = ()
    stream: tuple[Tensor, Tensor, Tensor] | None = None

    @staticmethod
    def of(lengths: Tensor, room: int, table: Tensor | None = None, numbers: tuple[int, ...] | None = None) -> Held:
        """What attention on the device of `lengths` reads. room: tokens of a row. numbers: only an NPU wants them."""
        match lengths.device.type:
            case "npu":
                return Held(lengths, table, numbers)
            case "cpu" if torch.compiler.is_compiling():
                return Held(lengths, table)
            case "cpu":
                numbers = tuple(lengths.tolist())
                return Held(lengths, table, numbers, () if table is None else _runs(numbers, room, table))
        return Held(lengths, table, stream=streamed(lengths, room))


def _runs(lengths: tuple[int, ...], room: int, table: Tensor) -> tuple[int | Tensor, ...]:
    """See `Held.runs`."""
    size, runs = room // table.shape[1], []
    for n, pages, row in zip(lengths, table.tolist(), table, strict=True):
        used = -(-n // size)
        if pages[:used] == list(range(pages[0], pages[0] + used)):
            runs.append(pages[0] * size)
        else:
            runs.append((row[:used, None] * size + torch.arange(size)).flatten()[:n])
    return tuple(runs)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, held: Held) -> Tensor:
    """q: b n h, k v: p s m h -> b n h; see the module's contract.

    ValueError if the shapes do not fit. The lengths and the pages are not checked: that would synchronise with the
    device.
    """
    (b, n, h), m, table = q.shape, k.shape[2], held.table
    fits = k.shape[0] == b if table is None else table.shape[:1] == (b,) and table.dtype == torch.int32
    if k.shape != v.shape or k.shape[3] != h or n % m or held.lengths.shape != (b,) or not fits:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, lengths {tuple(held.lengths.shape)}, table "
            f"{table if table is None else (table.dtype, tuple(table.shape))} do not fit: need b n h, p s m h twice, "
            "b, and int32 b n or None, where p is b, with n a multiple of m"
        )
    return choose(q, reference, npu=npu, cpu=cpu, cuda=cuda)(q, k, v, held)


def page_size(like: Tensor) -> int:
    """Tokens of a page, for a cache in the dtype and on the device of `like`."""
    if like.device.type == "cuda" and flash(like.dtype):
        return 256  # flash attention reads pages of a multiple of it
    return 128 if like.device.type == "npu" else 64  # the fused op's document recommends 128


def empty_cache(like: Tensor, blocks: int, pages: int, size: int, heads: int, head: int) -> Tensor:
    """Zeros in the dtype and on the device of `like`, l p s m h.

    In memory l m p s h, so that the keys of a head are contiguous; l p s m h where the fused op needs that.
    """
    if like.device.type == "npu" or (like.device.type == "cuda" and flash(like.dtype)):
        return like.new_zeros(blocks, pages, size, heads, head)
    return like.new_zeros(blocks, heads, pages, size, head).permute(0, 2, 3, 1, 4)


def in_rows(k: Tensor, v: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of each row, b (n s) m h, in the memory order of the cache; copies where there is a table."""
    if table is None:
        return k, v
    (b, n), pages = table.shape, table.flatten()
    if k.is_contiguous():
        k, v = (x.index_select(0, pages) for x in (k, v))
    else:
        k, v = (x.permute(2, 0, 1, 3).index_select(1, pages).permute(1, 2, 0, 3) for x in (k, v))
    return k.unflatten(0, (b, n)).flatten(1, 2), v.unflatten(0, (b, n)).flatten(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, held: Held) -> Tensor:
    """Dense attention in which the query heads of a KV head are the queries, so that no key is repeated."""
    k, v = in_rows(k, v, held.table)
    seen = torch.arange(k.shape[1], device=q.device) < held.lengths[:, None]  # b s
    q, k, v = q.unflatten(1, (k.shape[2], -1)), k.transpose(1, 2), v.transpose(1, 2)  # b m g h, b m s h
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None]).flatten(1, 2)


def cpu(q: Tensor, k: Tensor, v: Tensor, held: Held) -> Tensor:
    """Two batched products over the keys of the longest row, or, for grouped heads of equally long rows, torch's own.

    With pages torch's own row by row: to copy the pages of all rows together takes as long as their attention.
    The reference in half precision, whose products would round the scores, and in a compiled graph, in which no shape
    may depend on a length.
    """
    seen = held.numbers
    if q.dtype.itemsize < 4 or seen is None:
        return reference(q, k, v, held)
    s, (m, h) = max(seen), k.shape[2:]
    if held.table is not None:
        rows = zip(q.unflatten(1, (m, -1)).split(1), held.runs, seen, strict=True)
        k, v = (x.view(-1, m, h).transpose(0, 1)[None] for x in (k, v))  # 1 m (p s) h
        parts = [F.scaled_dot_product_attention(x, _row(k, run, n), _row(v, run, n)) for x, run, n in rows]
        return torch.cat(parts).flatten(1, 2)
    q = q.unflatten(1, (m, -1)).transpose(0, 1).contiguous()  # m b g h; products of other orders are slow
    k, v = k[:, :s].permute(2, 0, 1, 3), v[:, :s].permute(2, 0, 1, 3)  # m b s h
    if min(seen) == s and q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1, 2)
    scores = (k @ (q * h**-0.5).mT).mT  # m b g s; matrix times vector without groups
    if min(seen) < s:
        scores = scores.masked_fill(torch.arange(s) >= held.lengths[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1, 2)


def _row(x: Tensor, run: int | Tensor, n: int) -> Tensor:
    """The first n tokens of a row, of x: 1 m (p s) h. run: where it begins, or where its tokens are."""
    return x.narrow(2, run, n) if isinstance(run, int) else x.index_select(2, run)


def flash(dtype: torch.dtype) -> bool:
    """Whether torch's flash attention serves a cache of this dtype on CUDA."""
    return dtype.itemsize == 2 and _takes(varlen_attn, "seqused_k")


@cache  # every block of every step asks
def _takes(fn: Callable, parameter: str) -> bool:
    return parameter in signature(fn).parameters


def streamed(lengths: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Held.stream`: once for all blocks of a step, for each of which it would be three kernels."""
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    return lengths.int(), starts, starts * room


def cuda(q: Tensor, k: Tensor, v: Tensor, held: Held) -> Tensor:
    """varlen_attn on the pages of a table, or on the whole cache as a stream; of each row what it holds is used."""
    if not flash(q.dtype):
        return reference(q, k, v, held)
    (n, h), (s, m), table = q.shape[1:], k.shape[1:3], held.table
    require(h % 8 == 0 and h <= 256, "varlen_attn", f"heads of 8, 16 .. 256, not {h}")
    require(k.is_contiguous() and v.is_contiguous(), "varlen_attn", "a contiguous cache: pass the whole buffer")
    if table is None:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    else:
        require(s % 256 == 0, "varlen_attn", f"pages of a multiple of 256 tokens, not {s}")
        s *= table.shape[1]
    lengths, q_starts, k_starts = held.stream or streamed(held.lengths, s)
    x = varlen_attn(q, k, v, q_starts, k_starts, 1, s, seqused_k=lengths, block_table=table, enable_gqa=n != m)
    assert isinstance(x, Tensor)  # a pair only with return_aux
    return x


def npu(q: Tensor, k: Tensor, v: Tensor, held: Held) -> Tensor:
    """npu_fused_infer_attention_score on the whole cache, with lengths and without a mask; `masked` for fp32.

    The fused op has neither fp32 nor a gradient. It wants as many pages as the rows have together, so that pages are
    gathered where rows share more of them than are left.
    """
    op, (n, h), (s, m), table = "npu_fused_infer_attention_score", q.shape[1:], k.shape[1:3], held.table
    require_float(op, q)
    require(q.dtype == k.dtype == v.dtype, op, f"one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dtype == torch.float32:
        return masked(q, k, v, held)
    require(h <= 512 and h % 8 == 0, op, f"heads of 8, 16 .. 512, not {h}")
    require(n <= 256 and n // m <= 64, op, f"at most 256 query heads, 64 to a KV head, not {n} with {m} KV heads")
    require(k.is_contiguous() and v.is_contiguous(), op, "a contiguous cache: pass the whole buffer, never a slice")
    require(held.numbers is not None, op, "the lengths on the host: give Held.of its numbers")
    require(not (torch.is_grad_enabled() and q.requires_grad), op, "torch.no_grad(): it gives no gradient, silently")
    seen = list(held.numbers or ())
    room = s if table is None else s * table.shape[1]
    require(room <= 262_144, op, f"a cache of at most 262144 keys a row, not {room}")
    require(1 <= min(seen) and max(seen) <= room, op, f"lengths from 1 to {room}, not {seen}")
    if table is not None and sum(-(-x // s) for x in seen) > len(k):
        k, v, table = *in_rows(k, v, table), None
    if table is not None:
        require(s % 16 == 0 and s <= 512, op, f"pages of 16, 32 .. 512 tokens, not {s}")
        fits = k.numel() < 2**31 and m * h < 2**16
        require(fits, op, f"less than 2**31 numbers in all pages and 2**16 a token, not {k.numel()} and {m * h}")
        k, v = k.flatten(2), v.flatten(2)  # p s (m h)
    return npu_op("npu_fused_infer_attention_score")(
        q[:, None].contiguous(), k, v, actual_seq_lengths_kv=seen, num_heads=n, num_key_value_heads=m, scale=h**-0.5,
        input_layout="BSND", block_table=table, block_size=0 if table is None else s,
    )[0][:, 0]  # fmt: skip


def masked(q: Tensor, k: Tensor, v: Tensor, held: Held) -> Tensor:
    """npu_fusion_attention, the kernel for training, with a mask that is True where a key is hidden."""
    (n, h), (k, v) = q.shape[1:], in_rows(k, v, held.table)
    require(n <= 256 and h <= 768, "npu_fusion_attention", f"at most 256 heads of at most 768, not {n} of {h}")
    hidden = torch.arange(k.shape[1], device=q.device) >= held.lengths[:, None]  # b s
    return npu_op("npu_fusion_attention")(
        q[:, None].contiguous(), k.contiguous(), v.contiguous(), n, "BSND", atten_mask=hidden[:, None, None],
        scale=h**-0.5, keep_prob=1.0, sparse_mode=1,
    )[0][:, 0]  # fmt: skip
