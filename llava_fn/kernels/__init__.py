"""Operations with fused forms on accelerators, one a file: contract, reference, fused forms."""

from llava_fn.kernels.adamw import Coefficients, adamw
from llava_fn.kernels.add_rms_norm import add_rms_norm
from llava_fn.kernels.attention import Segments, attention
from llava_fn.kernels.cross_entropy import cross_entropy
from llava_fn.kernels.decode import Held, decode_attention, empty_cache, page_size
from llava_fn.kernels.gelu import gelu
from llava_fn.kernels.int8_linear import int8_linear
from llava_fn.kernels.layer_norm import layer_norm
from llava_fn.kernels.linear import linear
from llava_fn.kernels.parallel_linear import column_linear, row_linear
from llava_fn.kernels.patch_embedding import patch_embedding
from llava_fn.kernels.quick_gelu import quick_gelu
from llava_fn.kernels.rms_norm import rms_norm
from llava_fn.kernels.rotary import rotary, rotary_tables
from llava_fn.kernels.swiglu import swiglu, swiglu_joined, swiglu_products
from llava_fn.kernels.write_kv import write_kv

__all__ = [
    "Coefficients", "Held", "Segments", "adamw", "add_rms_norm", "attention", "column_linear",
    "cross_entropy", "decode_attention", "empty_cache", "gelu", "int8_linear", "layer_norm", "linear", "page_size",
    "patch_embedding", "quick_gelu", "rms_norm", "rotary", "rotary_tables", "row_linear", "swiglu", "swiglu_joined",
    "swiglu_products", "write_kv",
]  # fmt: skip
