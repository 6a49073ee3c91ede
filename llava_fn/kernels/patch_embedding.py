"""CLIP's patch embedding: a convolution whose stride is its kernel size, hence a matrix product of flattened patches.

Contract: pixels: i 3 y x, weight: d (3 a a) -> i p d, patches in row-major order, a patch flattened as (channel, row,
column). The same code runs on every device. By default an NPU computes fp32 convolutions in HF32 (10 bits of mantissa)
and CUDA in TF32, but neither rounds matrix products so.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear


def patch_embedding(pixels: Tensor, weight: Tensor, patch: int) -> Tensor:
    """pixels: i 3 y x, weight: d (3 patch patch) -> i p d."""
    patches = rearrange(pixels, "i c (y a) (x b) -> i (y x) (c a b)", a=patch, b=patch)
    return linear(patches, weight)
