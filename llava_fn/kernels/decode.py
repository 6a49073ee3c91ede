"""Attention of one new token per row to a preallocated KV cache: a step of autoregressive decoding.

Contract: q: b n h, k and v: b s m h -> b n h, all of one dtype. n is a multiple of m (grouped KV heads: query head j
reads KV head j // (n/m)). Scores are scaled by h**-0.5. Row j sees keys 0 .. lengths[j]-1, the new token's included.
The rest of the cache does not change the result, as long as it is finite.
lengths: int64[b], each from 1 to s, on q's device or on the host. No shape depends on a length and no step synchronises
with the device, so that one graph serves all steps. On an NPU lengths must be on the host, because the fused op reads
host integers (see `lengths_device`); its limits are raised as ValueError. On CUDA the flash attention that torch ships
reads the keys that a row holds and no others. Where it cannot (torch before 2.12, fp32), a mask hides the rest.
The memory order of a cache depends on the device, too: `empty_cache` allocates it.
Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from llava_fn.kernels.dispatch import choose, npu_op, require, require_float


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """q: b n h, k v: b s m h, lengths: int64[b] -> b n h; see the module's contract.

    ValueError if the shapes do not fit. The values of lengths are not checked: that would synchronise with the device.
    """
    (b, n, h), m = q.shape, k.shape[2]
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (b, h) or n % m or lengths.shape != (b,):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, lengths {tuple(lengths.shape)} do not fit: "
            "need b n h, b s m h twice, and b, with n a multiple of m"
        )
    return choose(q, reference, npu=npu, cpu=cpu, cuda=cuda)(q, k, v, lengths)


def lengths_device(device: torch.device) -> torch.device:
    """The device for the lengths of a cache on `device`: the host for an NPU, else `device` itself."""
    return torch.device("cpu") if device.type == "npu" else device


def empty_cache(like: Tensor, blocks: int, rows: int, size: int, heads: int, head: int) -> Tensor:
    """Zeros in the dtype and on the device of `like`, l b s m h.

    In memory l b m s h, so that the keys of a head are contiguous; l b s m h where the fused op needs that.
    """
    if like.device.type == "npu" or (like.device.type == "cuda" and flash(like.dtype)):
        return like.new_zeros(blocks, rows, size, heads, head)
    return like.new_zeros(blocks, rows, heads, size, head).transpose(2, 3)


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Dense attention in which the query heads of a KV head are the queries, so that no key is repeated."""
    seen = torch.arange(k.shape[1], device=q.device) < lengths.to(q.device)[:, None]  # b s
    q, k, v = q.unflatten(1, (k.shape[2], -1)), k.transpose(1, 2), v.transpose(1, 2)  # b m g h, b m s h
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None]).flatten(1, 2)


def cpu(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Two batched products over the keys of the longest row, or, for grouped heads of equally long rows, torch's own.

    The reference in half precision, whose products would round the scores, and in a compiled graph, in which no shape
    may depend on a length.
    """
    if q.dtype.itemsize < 4 or torch.compiler.is_compiling():
        return reference(q, k, v, lengths)
    seen = lengths.tolist()
    s, (m, h) = max(seen), k.shape[2:]
    q, k, v = q.unflatten(1, (m, -1)), k[:, :s].transpose(1, 2), v[:, :s].transpose(1, 2)  # b m g h, b m s h
    if min(seen) == s and q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v).flatten(1, 2)
    scores = (k @ (q * h**-0.5).mT).mT  # b m g s; matrix times vector without groups
    if min(seen) < s:
        scores = scores.masked_fill(torch.arange(s) >= lengths[:, None, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).flatten(1, 2)


def flash(dtype: torch.dtype) -> bool:
    """Whether torch's flash attention serves a cache of this dtype on CUDA."""
    return dtype.itemsize == 2 and _takes(varlen_attn, "seqused_k")


@cache  # every block of every step asks
def _takes(fn: Callable, parameter: str) -> bool:
    return parameter in signature(fn).parameters


def cuda(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """varlen_attn on the whole cache as a stream, of which each row's segment is used up to its length."""
    if not flash(q.dtype):
        return reference(q, k, v, lengths)
    (b, n, h), (s, m) = q.shape, k.shape[1:3]
    require(h % 8 == 0 and h <= 256, "varlen_attn", f"heads of 8, 16 .. 256, not {h}")
    require(k.is_contiguous() and v.is_contiguous(), "varlen_attn", "a contiguous cache: pass the whole buffer")
    starts = torch.arange(b + 1, dtype=torch.int32, device=q.device)
    x = varlen_attn(
        q, k.view(b * s, m, h), v.view(b * s, m, h), starts, starts * s, 1, s, seqused_k=lengths.int(),
        enable_gqa=n != m,
    )  # fmt: skip
    assert isinstance(x, Tensor)  # a pair only with return_aux
    return x


def npu(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """npu_fused_infer_attention_score on the whole cache, with lengths and without a mask; `masked` for fp32.

    The fused op has neither fp32 nor a gradient.
    """
    op, (n, h), (s, m) = "npu_fused_infer_attention_score", q.shape[1:], k.shape[1:3]
    require_float(op, q)
    require(q.dtype == k.dtype == v.dtype, op, f"one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dtype == torch.float32:
        return masked(q, k, v, lengths)
    require(h <= 512 and h % 8 == 0, op, f"heads of 8, 16 .. 512, not {h}")
    require(n <= 256 and n // m <= 64, op, f"at most 256 query heads, 64 to a KV head, not {n} with {m} KV heads")
    require(s <= 262_144, op, f"a cache of at most 262144 keys, not {s}")
    require(k.is_contiguous() and v.is_contiguous(), op, "a contiguous cache: pass the whole buffer, never a slice")
    require(lengths.device.type == "cpu", op, f"lengths on the host, not on {lengths.device}; see lengths_device")
    require(not (torch.is_grad_enabled() and q.requires_grad), op, "torch.no_grad(): it gives no gradient, silently")
    seen = lengths.tolist()
    require(1 <= min(seen) and max(seen) <= s, op, f"lengths from 1 to {s}, not {seen}")
    return npu_op("npu_fused_infer_attention_score")(
        q[:, None].contiguous(), k, v, actual_seq_lengths_kv=seen, num_heads=n, num_key_value_heads=m, scale=h**-0.5,
        input_layout="BSND",
    )[0][:, 0]  # fmt: skip


def masked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """npu_fusion_attention, the kernel for training, with a mask that is True where a key is hidden."""
    n, h = q.shape[1:]
    require(n <= 256 and h <= 768, "npu_fusion_attention", f"at most 256 heads of at most 768, not {n} of {h}")
    hidden = torch.arange(k.shape[1], device=q.device) >= lengths.to(q.device)[:, None]  # b s
    return npu_op("npu_fusion_attention")(
        q[:, None].contiguous(), k.contiguous(), v.contiguous(), n, "BSND", atten_mask=hidden[:, None, None],
        scale=h**-0.5, keep_prob=1.0, sparse_mode=1,
    )[0][:, 0]  # fmt: skip
