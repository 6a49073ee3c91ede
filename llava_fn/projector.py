"""The projector: two linears with an erf GELU between (LLaVA multimodal_projector/builder.py, mlp2x_gelu)."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor

from llava_fn.kernels import gelu
from llava_fn.linear import linear
from llava_fn.spec import Spec, bias
from llava_fn.spec import linear as weight


def spec(vision_width: int, width: int) -> Spec:
    """Parameters from the width of the image tower to the width of the decoder."""
    return {"w1": weight(width, vision_width), "b1": bias(width), "w2": weight(width, width), "b2": bias(width)}


def project(p: TensorDict, x: Tensor) -> Tensor:
    """x: ... vision_width -> ... width."""
    return linear(gelu(linear(x, p["w1"], p["b1"])), p["w2"], p["b2"])
