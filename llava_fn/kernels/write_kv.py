"""The keys and values of new tokens, written into a cache of pages.

Contract: k and v: t m h go to places of k_cache and v_cache: p s m h, pages of s tokens, of the same dtype. The caches
are written in place. Two tokens have one place only where nobody reads it.
On an NPU one fused op writes both, and needs a contiguous cache, which raises ValueError. It gives no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_fn.kernels.dispatch import choose, npu_op, require, require_float


@dataclass(frozen=True)
class Places:
    """Of t tokens, each int64[t]: the page, the place in the page, and the place counted through all pages."""

    page: Tensor
    at: Tensor
    slot: Tensor

    @staticmethod
    def of(page: Tensor, at: Tensor, size: int) -> Places:
        """size: tokens of a page."""
        return Places(page, at, page * size + at)


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, places: Places) -> None:
    """k_cache v_cache: p s m h, k v: t m h; see the module's contract. ValueError if the shapes do not fit."""
    if k_cache.shape != v_cache.shape or k.shape != v.shape or k.shape != (len(places.page), *k_cache.shape[2:]):
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} of {len(places.page)} places do not fit a cache of "
            f"{tuple(k_cache.shape)} and {tuple(v_cache.shape)}: need t m h and p s m h"
        )
    choose(k_cache, reference, npu=npu)(k_cache, v_cache, k, v, places)


def reference(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, places: Places) -> None:
    """Two scatters."""
    k_cache.index_put_((places.page, places.at), k)
    v_cache.index_put_((places.page, places.at), v)


def npu(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, places: Places) -> None:
    """npu_scatter_pa_kv_cache on caches in the plain memory format."""
    op, dtypes = "npu_scatter_pa_kv_cache", {x.dtype for x in (k_cache, v_cache, k, v)}
    require_float(op, k)
    require(len(dtypes) == 1, op, f"one dtype, not {dtypes}")
    require(k_cache.is_contiguous() and v_cache.is_contiguous(), op, "a contiguous cache: pass the whole buffer")
    require(not (torch.is_grad_enabled() and k.requires_grad), op, "torch.no_grad(): it gives no gradient, silently")
    npu_op("npu_scatter_pa_kv_cache")(
        k.contiguous(), v.contiguous(), k_cache, v_cache, places.slot, cache_mode="Norm"
    )  # fmt: skip
