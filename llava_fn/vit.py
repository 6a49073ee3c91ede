"""CLIP's vision transformer, up to the hidden state that LLaVA reads (Radford et al. 2021; HF modeling_clip.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange, repeat
from tensordict import TensorDict
from torch import Tensor

from llava_fn.config import Vision
from llava_fn.grad import scan
from llava_fn.kernels import Segments, attention, gelu, layer_norm, patch_embedding, quick_gelu
from llava_fn.linear import linear
from llava_fn.spec import Param, Spec, bias, norm
from llava_fn.spec import linear as weight


def spec(c: Vision) -> Spec:
    """Parameters of the patch embedding and of the blocks that run."""
    d = c.width
    return {
        "patch": weight(d, 3 * c.patch**2),  # the convolution of CLIP, flattened: a patch is (channel, row, column)
        "cls": Param((d,), (None,), d**-0.5),
        "positions": Param((c.patches + 1, d), (None, None), d**-0.5),
        "norm_g": norm(d),
        "norm_b": bias(d),
        "blocks": {str(i): _block_spec(d, c.ffn) for i in range(c.used)},
    }


def _block_spec(d: int, f: int) -> Spec:
    return {
        "norm1_g": norm(d), "norm1_b": bias(d),
        "wq": weight(d, d), "bq": bias(d), "wk": weight(d, d), "bk": bias(d),
        "wv": weight(d, d), "bv": bias(d), "wo": weight(d, d), "bo": bias(d),
        "norm2_g": norm(d), "norm2_b": bias(d),
        "w_up": weight(f, d), "b_up": bias(f), "w_down": weight(d, f), "b_down": bias(d),
    }  # fmt: skip


def block(p: TensorDict, x: Tensor, segments: Segments, c: Vision) -> Tensor:
    """One pre-norm block. x: t d -> t d, where a segment is an image."""
    h = layer_norm(x, p["norm1_g"], p["norm1_b"], c.eps)
    q, k, v = (
        rearrange(linear(h, p[w], p[b]), "t (n h) -> t n h", n=c.heads)
        for w, b in (("wq", "bq"), ("wk", "bk"), ("wv", "bv"))
    )
    h = rearrange(attention(q, k, v, segments, causal=False), "t n h -> t (n h)")
    x = x + linear(h, p["wo"], p["bo"])
    h = linear(layer_norm(x, p["norm2_g"], p["norm2_b"], c.eps), p["w_up"], p["b_up"])
    h = quick_gelu(h) if c.act == "quick_gelu" else gelu(h)
    return x + linear(h, p["w_down"], p["b_down"])


def normalise(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """pixels: uint8[i, 3, h, w] -> dtype[i, 3, h, w] on the same device: (pixels / 255 - mean) / std in float32.

    In float32 on the CPU bit for bit what transformers' CLIPImageProcessorPil gives. Raises ValueError for pixels of
    another shape, or not uint8 (they may be normalised already).
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels are {pixels.dtype}{list(pixels.shape)}: must be uint8[images, 3, height, width]")
    mean, std = (_channels(x, pixels.device) for x in (Vision.mean, Vision.std))
    return ((pixels.float() / 255 - mean) / std).to(dtype)


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    """f32[3, 1, 1], filled on the device: a copy of a list would make the host wait."""
    return torch.stack([torch.full((1, 1), x, device=device) for x in values])


def encode(p: TensorDict, pixels: Tensor, c: Vision, blocks: Callable = scan(block)) -> Tensor:
    """Patch features without the class token: hidden state `c.feature_layer`, no final norm.

    pixels: f[i, 3, image, image], normalised -> f[i, p, d] in the weights' dtype. Patches in row-major order.
    blocks: grad.scan of this module's `block`, or of a form that computes the same (remat, compiled, sharded).
    """
    patches = patch_embedding(pixels.to(p["patch"].dtype), p["patch"], c.patch)
    x = torch.cat([repeat(p["cls"], "d -> i 1 d", i=len(pixels)), patches], 1)
    x = rearrange(x + p["positions"], "i p d -> (i p) d")
    x = layer_norm(x, p["norm_g"], p["norm_b"], c.eps)
    segments = Segments.of([c.patches + 1] * len(pixels)).to(x.device)
    x = blocks([p["blocks"][str(i)] for i in range(c.used)], x, [(segments, c)] * c.used)
    return rearrange(x, "(i p) d -> i p d", i=len(pixels))[:, 1:]
