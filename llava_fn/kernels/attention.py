"""Attention over a ragged stream: samples are concatenated, and `Segments` holds the length of each.

Contract: q: t n h, k and v: s m h -> t n h, all of one dtype. n is a multiple of m (grouped KV heads: query head j
reads KV head j // (n/m)). Scores are scaled by h**-0.5. Each segment attends to itself alone. `causal` is anchored
bottom right: the last query of a segment sees all of its keys, the one before sees one fewer. A segment with fewer
queries than keys thus has the queries of its last rows. Every query sees at least one key: no row is fully masked.
The layout is TND of npu_fusion_attention (sparse_mode 3) and of the varlen form of flash attention. Their limits are
raised as ValueError: on an NPU, heads of at most 768, a million rows and 256 query heads; on CUDA, heads of at most
256, a multiple of 8.
Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from inspect import signature
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from llava_fn.kernels.chunked_attention import LEAST, MOST, chunked_attention
from llava_fn.kernels.dispatch import choose, in_transform, npu_op, require, require_float
from llava_fn.kernels.transfer import to_device
from llava_fn.kernels.varlen import varlen_attn


@dataclass(frozen=True)
class Segments:
    """Lengths, on the host: sample j has queries[j] query rows and keys[j] key rows of the stream.

    starts: of the queries and of the keys, each int32[b + 1] with the end of the last, on the device that `to` named.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    starts: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.queries) != len(self.keys):
            raise ValueError(f"{len(self.queries)} query segments but {len(self.keys)} key segments")
        wrong = [j for j, (q, k) in enumerate(zip(self.queries, self.keys, strict=True)) if not 1 <= q <= k]
        if wrong:
            j = wrong[0]
            raise ValueError(f"segment {j} has {self.queries[j]} queries and {self.keys[j]} keys; need 1 <= q <= k")

    @staticmethod
    def of(lengths: Sequence[int]) -> Segments:
        """Segments of these lengths, in which every row is a query and a key."""
        return Segments(tuple(lengths), tuple(lengths))

    def to(self, device: torch.device) -> Segments:
        """The same segments, for many calls on `device`: on CUDA attention reads their starts there."""
        lengths_alone = device.type in ("cpu", "npu")  # attention reads them on the host
        return self if lengths_alone else replace(self, starts=self.starts_on(device))

    def starts_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of queries and of keys; see `starts`."""
        return _starts(self.queries, device), _starts(self.keys, device)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(b, queries, keys) for each run of b neighbouring segments of one size: each run is a dense batch."""
        for (q, k), run in groupby(zip(self.queries, self.keys, strict=True)):
            yield sum(1 for _ in run), q, k


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    n, total = lengths[0], sum(lengths)
    if n * len(lengths) == total and min(lengths) == n:  # images: nothing is copied from the host
        return torch.arange(0, total + 1, n, dtype=torch.int32, device=device)
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


SEGMENTS = 1024  # in one call on an NPU: one page of its documentation allows 2048, another 1024
ROWS = 2**20  # of the stream in one call on an NPU


@torch.compiler.disable()  # lengths differ in every batch, and each would recompile the graph
def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """q: t n h, k v: s m h -> t n h; see the module's contract. ValueError if the rows do not fit the segments."""
    if (q.shape[0], k.shape[0]) != (sum(segments.queries), sum(segments.keys)):
        raise ValueError(
            f"q has {q.shape[0]} rows and k {k.shape[0]}, but the segments hold "
            f"{sum(segments.queries)} queries and {sum(segments.keys)} keys"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    return choose(q, reference, npu=npu, cuda=cuda, cpu=cpu)(q, k, v, segments, causal)


def reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Dense attention of each run of segments of one size."""
    return _by_runs(_dense, q, k, v, segments, causal)


def cpu(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """The reference; in fp32 a run of causal segments by chunked_attention where that is faster, outside torch.func."""
    plain = not causal or q.dtype != torch.float32 or in_transform()
    return _by_runs(_dense if plain else _chunked, q, k, v, segments, causal)


def _by_runs(attend: Callable, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """attend(q, k, v, b, causal) of each run of b segments of one size."""
    runs = list(segments.runs())
    rows, cols = [b * t for b, t, _ in runs], [b * s for b, _, s in runs]
    parts = zip(q.split(rows), k.split(cols), v.split(cols), runs, strict=True)  # split: one backward for all parts
    return torch.cat([attend(q, k, v, b, causal) for q, k, v, (b, _, _) in parts])


def _chunked(q: Tensor, k: Tensor, v: Tensor, b: int, causal: bool) -> Tensor:
    """As `_dense`, which it leaves other sizes to."""
    if len(q) == b or not LEAST <= len(k) // b <= MOST:
        return _dense(q, k, v, b, causal)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (repeat(x, "s m h -> s (m g) h", g=groups) for x in (k, v))
    return chunked_attention(q, k, v, b)


def _dense(q: Tensor, k: Tensor, v: Tensor, b: int, causal: bool) -> Tensor:
    """b segments of one size. q: (b t) n h, k v: (b s) m h -> (b t) n h."""
    groups = q.shape[1] // k.shape[1]
    q = rearrange(q, "(b t) n h -> b n t h", b=b)
    if groups > 1:
        k, v = (repeat(x, "(b s) m h -> b (m g) s h", b=b, g=groups) for x in (k, v))
    else:
        k, v = (rearrange(x, "(b s) m h -> b m s h", b=b) for x in (k, v))
    t, s = q.shape[2], k.shape[2]
    mask = None
    if causal and t != s and t > 1:  # torch's is_causal is anchored top left; one query sees every key
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and t == s)
    return rearrange(x, "b n t h -> (b t) n h")


def cuda(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """The flash attention that torch ships. It has no fp32, for which the reference runs torch's fused dense one."""
    if q.dtype == torch.float32:
        return reference(q, k, v, segments, causal)
    require(q.dtype in (torch.float16, torch.bfloat16), "varlen_attn", f"float16 or bfloat16, not {q.dtype}")
    require(q.shape[2] % 8 == 0 and q.shape[2] <= 256, "varlen_attn", f"heads of 8, 16 .. 256, not {q.shape[2]}")
    starts = segments.starts or segments.starts_on(q.device)
    window = (-1, 0) if causal else (-1, -1)
    grouped = q.shape[1] != k.shape[1] and "enable_gqa" in signature(varlen_attn).parameters  # 2.11 need not be told
    attend = partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn
    x = attend(q, k, v, *starts, max(segments.queries), max(segments.keys), window_size=window)
    assert isinstance(x, Tensor)  # a pair only with return_aux
    return x


def npu(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """npu_fusion_attention in TND. Without a mask it ignores sparse_mode: every query would see every key.

    Its mask is True where a key is hidden, the opposite of torch's.
    """
    n, h = q.shape[1:]
    require_float("npu_fusion_attention", q)
    require(q.dtype == k.dtype == v.dtype, "npu_fusion_attention", f"one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    require(h <= 768, "npu_fusion_attention", f"heads of at most 768, not {h}")
    require(n <= 256, "npu_fusion_attention", f"at most 256 query heads, not {n}")
    if len(segments.keys) > SEGMENTS:
        return torch.cat([npu(*part, causal) for part in _parts(q, k, v, segments)])
    require(max(len(q), len(k)) <= ROWS, "npu_fusion_attention", f"at most {ROWS} rows, not {max(len(q), len(k))}")
    ends = [list(accumulate(lengths)) for lengths in (segments.queries, segments.keys)]  # on the host; no leading 0
    return npu_op("npu_fusion_attention")(
        q.contiguous(), k.contiguous(), v.contiguous(), n, "TND", atten_mask=hidden(q.device) if causal else None,
        scale=h**-0.5, keep_prob=1.0, actual_seq_qlen=ends[0], actual_seq_kvlen=ends[1],
        sparse_mode=3 if causal else 0,
    )[0]  # fmt: skip


def _parts(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Iterator[tuple[Tensor, Tensor, Tensor, Segments]]:
    """The stream cut after every SEGMENTS segments."""
    lengths = (segments.queries, segments.keys)
    cut = [[x[j : j + SEGMENTS] for j in range(0, len(x), SEGMENTS)] for x in lengths]
    rows, cols = ([sum(part) for part in parts] for parts in cut)
    return zip(q.split(rows), k.split(cols), v.split(cols), map(Segments, *cut), strict=True)


@cache  # autograd keeps these 4 MB for every block, so all blocks of a device share one tensor
def hidden(device: torch.device) -> Tensor:
    """The compressed causal mask, which serves every size: bool[2048, 2048], True above the diagonal."""
    with torch.inference_mode(False):  # autograd could not save a mask made in inference mode
        return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)
