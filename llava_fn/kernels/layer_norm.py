"""LayerNorm over the last dim.

Contract: x: ... d, gain and bias: d -> (x - mean) / sqrt(var + eps) * gain + bias, in x's dtype. Computed in fp32 and
rounded once. Source: Ba et al. 2016, arXiv 1607.06450; fp32 inside as in OpenAI's clip/model.py, LayerNorm.
No op of torch_npu is needed: native_layer_norm has NPU and CUDA kernels, which accumulate in fp32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.dispatch import choose, require
from llava_fn.kernels.precision import at_least_fp32


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: ... d, gain and bias: d -> ... d in x's dtype; see the module's contract."""
    return choose(x, reference, npu=native, cuda=native)(x, gain, bias, eps)


def reference(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch's LayerNorm in fp32."""
    return F.layer_norm(at_least_fp32(x), gain.shape, at_least_fp32(gain), at_least_fp32(bias), eps).to(x.dtype)


def native(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The device's kernel on x as it is: no fp32 copy of x in memory."""
    require(
        x.dtype == gain.dtype == bias.dtype,
        "layer_norm", f"x, gain and bias of one dtype, not {x.dtype}, {gain.dtype} and {bias.dtype}",
    )  # fmt: skip
    return F.layer_norm(x, gain.shape, gain, bias, eps)
