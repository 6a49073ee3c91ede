"""The operations that have fused forms on accelerators, each with its contract and its reference in plain PyTorch."""

from llava_fn.kernels.activation import gelu, quick_gelu, swiglu
from llava_fn.kernels.attention import Segments, attention
from llava_fn.kernels.cross_entropy import cross_entropy
from llava_fn.kernels.decode import decode_attention
from llava_fn.kernels.norm import layer_norm, rms_norm
from llava_fn.kernels.rotary import rotary, rotary_tables

__all__ = [
    "Segments", "attention", "cross_entropy", "decode_attention", "gelu", "layer_norm", "quick_gelu", "rms_norm",
    "rotary", "rotary_tables", "swiglu",
]  # fmt: skip
