"""CLIP's patch embedding: a convolution whose stride is its size, and so a matrix product over flattened patches.

Contract: pixels: i 3 y x, weight: d (3 a a) -> i p d, patches in row-major order, a patch flattened as (channel, row,
column). It is the same code on every device. An NPU runs fp32 convolutions in HF32 (10 bits of mantissa) unless it is
told otherwise, and CUDA in TF32; neither does so to a matrix product by default.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear


def patch_embedding(pixels: Tensor, weight: Tensor, patch: int) -> Tensor:
    """pixels: i 3 y x, weight: d (3 patch patch) -> i p d."""
    patches = rearrange(pixels, "i c (y a) (x b) -> i (y x) (c a b)", a=patch, b=patch)
    return linear(patches, weight)
