"""The keys and values of new tokens, written into a cache of pages.

Contract: k and v: t m h go to k_cache and v_cache: p s m h, pages of s tokens, of the same dtype, which are written in
place. Token j goes to place slots[j], counted through all pages; two have one place only where nobody reads it.
On an NPU one fused op writes both, and needs a contiguous cache, which raises ValueError. It gives no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fn.kernels.dispatch import choose, npu_op, require, require_float


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """k_cache v_cache: p s m h, k v: t m h, slots: int64[t]; see the module's contract.

    ValueError if the shapes do not fit.
    """
    if k_cache.shape != v_cache.shape or k.shape != v.shape or k.shape != (len(slots), *k_cache.shape[2:]):
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} of {len(slots)} places do not fit a cache of "
            f"{tuple(k_cache.shape)} and {tuple(v_cache.shape)}: need t m h and p s m h"
        )
    choose(k_cache, reference, npu=npu)(k_cache, v_cache, k, v, slots)


def reference(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Two scatters. In each order of `decode.empty_cache`, pages and their tokens make one dimension without a copy."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slots, v)


def npu(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """npu_scatter_pa_kv_cache on caches in the plain memory format."""
    op, dtypes = "npu_scatter_pa_kv_cache", {x.dtype for x in (k_cache, v_cache, k, v)}
    require_float(op, k)
    require(len(dtypes) == 1, op, f"one dtype, not {dtypes}")
    require(k_cache.is_contiguous() and v_cache.is_contiguous(), op, "a contiguous cache: pass the whole buffer")
    require(not (torch.is_grad_enabled() and k.requires_grad), op, "torch.no_grad(): it gives no gradient, silently")
    npu_op("npu_scatter_pa_kv_cache")(
        k.contiguous(), v.contiguous(), k_cache, v_cache, slots, cache_mode="Norm"
    )  # fmt: skip
