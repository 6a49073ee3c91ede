"""The decoder's linear layers. What a weight is, its leaf says:

    Tensor             f[out, in]
    {int8, scale}      int8[out, in] and fp32[out, 1]: symmetric, one scale for each row of outputs

Activations are never rounded. A compressed weight is made whole just before its product, so that one weight at a time
exists in full. int8 takes a quarter of fp32's memory and half of bf16's; bench/quantise.py measures what is lost.

Another kind of weight is another row of `whole`, or, where its product is not that of one matrix, of `linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from llava_fn import kernels, tree
from llava_fn.parallel.collectives import join
from llava_fn.parallel.mesh import Axis

Weight = Tensor | TensorDict
COLUMN = ("wq", "wk", "wv", "w_gate", "w_up")  # a tensor-parallel rank has some of the rows
ROW = ("wo", "w_down")  # a tensor-parallel rank has some of the columns
TOP = 127  # -128 is left out: the range is symmetric


def linear(x: Tensor, w: Weight) -> Tensor:
    """x: f[..., in], w: out in -> f[..., out]."""
    return F.linear(x, whole(w, x.dtype))


def swiglu(x: Tensor, w_gate: Weight, w_up: Weight) -> Tensor:
    """silu(x w_gate^T) * (x w_up^T), f[..., f]; see kernels/swiglu.py."""
    return kernels.swiglu(x, whole(w_gate, x.dtype), whole(w_up, x.dtype))


def whole(w: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as one tensor, f[out, in]. dtype: of one that is made whole here."""
    return w if isinstance(w, Tensor) else (w["int8"] * w["scale"]).to(dtype)


def quantise(
    params: TensorDict, device: torch.device | None = None, dtype: torch.dtype | None = None, axis: Axis = Axis("tp")
) -> TensorDict:
    """A model's parameters, on `device` and in `dtype` if given, with each linear of the decoder as int8 and scale.

    Every leaf is moved by itself, so that the whole never stands on the device. axis: on which the parameters are
    sharded; the values are those of the whole model's shards. ValueError if there is no decoder, or an infinite weight.
    """
    out = TensorDict({})
    for path, leaf in zip(tree.paths(params), tree.values(params), strict=True):
        leaf, compressed = leaf.to(device, dtype), path[:2] == ("llama", "blocks") and path[-1] in COLUMN + ROW
        out[path] = to_int8(leaf, "/".join(path), axis if path[-1] in ROW else Axis("none")) if compressed else leaf
    if "llama" not in out:
        raise ValueError("int8 is for the decoder's linears, and these parameters have no decoder")
    return out.lock_()


def to_int8(w: Tensor, name: str, axis: Axis = Axis("none")) -> TensorDict:
    """w: f[out, in], V on `axis` along in -> int8[out, in] and scale, fp32[out, 1]. A row of zeros stays one.

    name: of the weight, for the ValueError if it holds an infinite value or NaN.
    """
    w = w.float()
    top = join(w.abs().amax(1, keepdim=True), axis, 1).amax(1, keepdim=True)
    if not top.isfinite().all():
        raise ValueError(f"{name} holds an infinite value or NaN, which int8 cannot hold; repair the weights")
    scale = torch.where(top > 0, top / TOP, 1.0)
    return TensorDict({"int8": (w / scale).round().clamp(-TOP, TOP).to(torch.int8), "scale": scale})
