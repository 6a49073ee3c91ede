"""Attention of one new token a row to a preallocated cache: the step of autoregressive decoding.

Contract: q: b n h, k and v: b s m h -> b n h, all of one dtype. n is a multiple of m (grouped KV heads: query head j
reads KV head j // (n/m)). Scores are scaled by h**-0.5. Row j sees keys 0 .. lengths[j]-1, where its own key already
stands; what the cache holds beyond is never read into the result, whatever it is, as long as it is finite.
lengths: int64[b], each from 1 to s, on q's device or on the host. No shape depends on a length, and nothing waits for
the device, so that one graph serves all steps.
Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """q: b n h, k v: b s m h, lengths: int64[b] -> b n h; see the module's contract.

    ValueError if the shapes do not fit. The values of lengths are not looked at: that would wait for the device.
    """
    (b, n, h), m = q.shape, k.shape[2]
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (b, h) or n % m or lengths.shape != (b,):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, lengths {tuple(lengths.shape)} do not fit: "
            "need b n h, b s m h twice, and b, with n a multiple of m"
        )
    return reference(q, k, v, lengths)


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The query heads of one KV head are the rows of one dense attention: no key is repeated."""
    seen = torch.arange(k.shape[1], device=q.device) < lengths.to(q.device)[:, None]  # b s
    q = rearrange(q, "b (m g) h -> b m g h", m=k.shape[2])
    k, v = (rearrange(x, "b s m h -> b m s h") for x in (k, v))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
    return rearrange(x, "b m g h -> b (m g) h")
