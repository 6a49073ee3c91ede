"""The precision in which references compute."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is if it is wider: so that finite differences in fp64 can check a gradient."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
