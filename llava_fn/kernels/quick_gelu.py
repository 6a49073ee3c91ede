"""CLIP's activation.

Contract: x * sigmoid(1.702 x), elementwise. Source: OpenAI clip/model.py, QuickGELU.
npu_fast_gelu is this formula on Atlas A2 and A3, and a rearrangement of the formula on older cards (910A, 310P).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fn.kernels.dispatch import choose, npu_op, require_float


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return choose(x, reference, npu=npu)(x)


def reference(x: Tensor) -> Tensor:
    """The formula."""
    return x * torch.sigmoid(1.702 * x)


def npu(x: Tensor) -> Tensor:
    """npu_fast_gelu."""
    require_float("npu_fast_gelu", x)
    return npu_op("npu_fast_gelu")(x)
