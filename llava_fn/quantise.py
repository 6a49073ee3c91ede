"""The decoder's linears in int8: a quarter of fp32's memory, half of bf16's. bench/quantise.py measures what is lost.

Symmetric, one scale for each row of outputs; activations are never rounded. A block's weights are made whole again
just before it runs, so that one block at a time exists in full. Embedding, head, norms, projector and image tower stay
as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, tree
from llava_fn.grad import scan
from llava_fn.llava import Execution
from llava_fn.parallel.collectives import join
from llava_fn.parallel.mesh import Axis

COLUMN = ("wq", "wk", "wv", "w_gate", "w_up")  # a tensor-parallel rank has some of the rows
ROW = ("wo", "w_down")  # a tensor-parallel rank has some of the columns
TOP = 127  # -128 is left out: the range is symmetric


def quantise(
    params: TensorDict, device: torch.device | None = None, dtype: torch.dtype | None = None, axis: Axis = Axis("tp")
) -> TensorDict:
    """A model's parameters, on `device` and in `dtype` if given, with each linear of the decoder as int8 and scale.

    Every leaf is moved by itself, so that the whole never stands on the device. axis: on which the parameters are
    sharded; the values are those of the whole model's shards. ValueError if there is no decoder, or an infinite weight.
    """
    out = TensorDict({})
    for path, leaf in zip(tree.paths(params), tree.values(params), strict=True):
        leaf, linear = leaf.to(device, dtype), path[:2] == ("llama", "blocks") and path[-1] in COLUMN + ROW
        out[path] = to_int8(leaf, "/".join(path), axis if path[-1] in ROW else Axis("none")) if linear else leaf
    if "llama" not in out:
        raise ValueError("int8 is for the decoder's linears, and these parameters have no decoder")
    return out.lock_()


def to_int8(w: Tensor, name: str, axis: Axis = Axis("none")) -> TensorDict:
    """w: f[out, in], V on `axis` along in -> int8[out, in] and scale, fp32[out, 1]. A row of zeros stays one."""
    w = w.float()
    top = join(w.abs().amax(1, keepdim=True), axis, 1).amax(1, keepdim=True)
    if not top.isfinite().all():
        raise ValueError(f"{name} holds an infinite value or NaN, which int8 cannot hold; repair the weights")
    scale = torch.where(top > 0, top / TOP, 1.0)
    return TensorDict({"int8": (w / scale).round().clamp(-TOP, TOP).to(torch.int8), "scale": scale})


def dequantise(p: TensorDict) -> TensorDict:
    """A block's parameters as the model reads them, in the dtype of its norms."""
    dtype = p["norm1"].dtype
    whole = {n: (p[n, "int8"] * p[n, "scale"]).to(dtype) for n in COLUMN + ROW}
    return TensorDict({n: whole.get(n, x) for n, x in p.items()})


def execution(run: Execution = Execution()) -> Execution:
    """How a model with quantised parameters runs, else like `run`."""
    blocks = scan(lambda p, *rest: llama.block(dequantise(p), *rest))
    return replace(run, llama_blocks=blocks, weights=dequantise)
