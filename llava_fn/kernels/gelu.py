"""The projector's activation.

Contract: x * Phi(x) with the exact erf, never the tanh form. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
F.gelu on an NPU ignores `approximate` and is documented as the tanh form: hence npu_gelu.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.dispatch import choose, npu_op, require_float


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), exact."""
    return choose(x, reference, npu=npu)(x)


def reference(x: Tensor) -> Tensor:
    """torch's erf form."""
    return F.gelu(x, approximate="none")


def npu(x: Tensor) -> Tensor:
    """npu_gelu."""
    require_float("npu_gelu", x)
    return npu_op("npu_gelu")(x, approximate="none")
