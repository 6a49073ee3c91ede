"""The precision in which references compute."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if it is fp64, in which finite differences check gradients."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
