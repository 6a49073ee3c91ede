"""Linear layers. What a weight is, its leaf says:

    Tensor               f[out, in]
    {int8, scale}        int8[out, in] and fp32[out, 1]: symmetric, one scale for each row of outputs
    {nf4, scale}         uint8[out, in / 2] and fp32[out, in / 64]: two 4-bit codes a byte, one scale for 64 inputs
    {w, lora}            w of any kind above, and lora = {a: f[r, in], b: f[out, r], scale}: x w^T + scale (x a^T) b^T
    {w, probe}           w of any kind above, or an adapter's a or b, with gradients sample by sample: probe.py;
                         so may be an embedding table, f[v, d], and the gain of a norm, f[d]

A compressed weight is made whole just before its product, in the forward pass and again in the backward pass, so that
one weight at a time exists in full. It has no gradient. Activations are not rounded, except where no gradient is taken
and int8 has a product of its own: kernels/int8_linear.py says where and how. bench/quantise.py measures what is lost.

Another kind of weight is another row of `whole`, or, where its product is not that of one matrix, of `linear`.
Sources: int8: Dettmers et al. 2022, arXiv 2208.07339, section 2; nf4: Dettmers et al. 2023, arXiv 2305.14314, section
3, with the codes of bitsandbytes and without its double quantisation; lora: Hu et al. 2021, arXiv 2106.09685, eq. 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from llava_fn import kernels, tree
from llava_fn.dropout import dropped
from llava_fn.kernels.int8_linear import whole as int8_whole
from llava_fn.kernels.linear import pack
from llava_fn.kernels.transfer import to_device
from llava_fn.parallel import vocab
from llava_fn.parallel.collectives import join
from llava_fn.parallel.mesh import Axis
from llava_fn.probe import probed, probed_embedding

Weight = Tensor | TensorDict
Kind = Literal["int8", "nf4"]
COLUMN = ("wq", "wk", "wv", "w_gate", "w_up")  # a tensor-parallel rank has some of the rows
ROW = ("wo", "w_down")  # a tensor-parallel rank has some of the columns
TOP = 127  # -128 is left out: the range is symmetric
JOINED = {"wqkv": ("wq", "wk", "wv"), "w_gate_up": ("w_gate", "w_up")}  # weights of one input, as one; in memory alone
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # inputs that share a scale in nf4


def linear(x: Tensor, w: Weight, bias: Tensor | None = None) -> Tensor:
    """x: f[..., in], w: out in, bias: f[out] -> f[..., out]."""
    if isinstance(w, Tensor):
        return kernels.linear(x, w, bias)
    if "lora" in w:
        return _adapted(x, linear(x, w["w"], bias), w["lora"])
    if "probe" in w:
        return probed(x, linear(x, w["w"], bias), w["probe"], bias is not None)
    if x.requires_grad:
        y = _Frozen.apply(x, *_pair(w))
    elif "int8" in w:
        y = kernels.int8_linear(x, *_pair(w))
    else:
        y = F.linear(x, whole(w, x.dtype))
    return y if bias is None else y + bias


def embedding(ids: Tensor, table: Weight, axis: Axis) -> Tensor:
    """ids: int64[t], table: v d, V on `axis` along v -> f[t, d], I."""
    if isinstance(table, Tensor):
        return vocab.embed(table, ids, axis)
    return probed_embedding(vocab.embed(table["w"], ids, axis), ids, table["probe"])


def rms_norm(x: Tensor, gain: Weight, eps: float) -> Tensor:
    """x: t d, gain: d -> t d; see kernels/rms_norm.py."""
    if isinstance(gain, Tensor):
        return kernels.rms_norm(x, gain, eps)
    rows = probed(x.new_ones(len(x), 1), gain["w"].expand_as(x), gain["probe"], False)
    return kernels.rms_norm(x, torch.ones_like(gain["w"]), eps) * rows


def add_rms_norm(x: Tensor, y: Tensor, gain: Weight, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its rms_norm; see kernels/add_rms_norm.py."""
    if isinstance(gain, Tensor):
        return kernels.add_rms_norm(x, y, gain, eps)
    return (x := x + y), rms_norm(x, gain, eps)


def swiglu(x: Tensor, p: TensorDict) -> Tensor:
    """silu(x w_gate^T) * (x w_up^T) of a block's weights, joined or not, f[..., f]; see kernels/swiglu.py."""
    if "w_gate_up" in p:
        return kernels.swiglu_joined(linear(x, p["w_gate_up"]))
    w_gate, w_up = p["w_gate"], p["w_up"]
    if isinstance(w_gate, Tensor) and isinstance(w_up, Tensor):
        return kernels.swiglu(x, w_gate, w_up)
    return kernels.swiglu_products(linear(x, w_gate), linear(x, w_up))


def whole(w: Weight, dtype: torch.dtype) -> Tensor:
    """A weight without an adapter as one tensor, f[out, in]. dtype: of one that is made whole here."""
    return w if isinstance(w, Tensor) else _decoded(*_pair(w), dtype)


def _pair(w: TensorDict) -> tuple[Tensor, Tensor]:
    return w["int8" if "int8" in w else "nf4"], w["scale"]


def _decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if codes.dtype == torch.int8:
        return int8_whole(codes, scale, dtype)
    table = to_device(torch.tensor(NF4), codes.device)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # both values of each possible byte
    values = pairs[codes.int()].view(*scale.shape, BLOCK)
    return (values * scale[..., None]).to(dtype).view(len(codes), -1)


class _Frozen(torch.autograd.Function):
    """x w^T of a compressed weight, which neither pass keeps whole. The weight has no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, _decoded(codes, scale, x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *gs: Tensor):
        (g,) = gs
        codes, scale = ctx.saved_tensors
        return g @ _decoded(codes, scale, g.dtype), None, None


def _adapted(x: Tensor, y: Tensor, lora: TensorDict) -> Tensor:
    """y + scale (x a^T) b^T, summed by the second product, which spares a tensor of y's size.

    lora: scale: [], or [..., r] where rows of x have adapters of their own. rows, columns, dropout: of a dropout of x,
    see dropout.py; absent without one.
    """
    if "rows" in lora:
        x = dropped(x, lora["rows"], lora["columns"], lora["dropout"])
    if isinstance(lora["a"], TensorDict) or isinstance(lora["b"], TensorDict):  # with a probe
        return y + linear(linear(x, lora["a"]) * lora["scale"].to(x.dtype), lora["b"])
    h = F.linear(x, lora["a"].to(x.dtype)) * lora["scale"].to(x.dtype)
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), lora["b"].to(x.dtype).t()).view_as(y)


def quantise(
    params: TensorDict, kind: Kind = "int8", device: torch.device | None = None, dtype: torch.dtype | None = None,
    axis: Axis = Axis("tp"),
) -> TensorDict:  # fmt: skip
    """A model's parameters, on `device` and in `dtype` if given, with each linear of the decoder compressed.

    axis: on which the parameters are sharded; the values are those of the whole model's shards. ValueError if there is
    no decoder, or as `compress`.
    """
    return tree.build(placed(params, device, dtype, kind, axis))


def placed(
    params: TensorDict, device: torch.device | None, dtype: torch.dtype | None, kind: Kind | None, axis: Axis
) -> Iterator[tuple[tree.Path, Weight]]:
    """The leaves of `quantise`, without a kind uncompressed, one by one: the model never stands on the device twice."""
    if kind and "llama" not in params:
        raise ValueError(f"{kind} is for the decoder's linears, and these parameters have no decoder")
    for path, leaf in zip(tree.paths(params), tree.values(params), strict=True):
        leaf = leaf.to(device, dtype)
        yield path, compress(path, leaf, kind, axis) if kind and compressible(path) else leaf


def arranged(
    leaves: Iterable[tuple[tree.Path, Weight]], adapters: bool, backend: str
) -> Iterator[tuple[tree.Path, Weight]]:  # fmt: skip
    """The same leaves as generation reads them fastest: joined and packed.

    adapters: whether weights will have some, which rules joining out. backend: of torch.compile for a step, which
    cannot read a packed weight; or empty.
    """
    leaves = iter(leaves) if adapters else joined(leaves)
    return leaves if backend else packed(leaves)


def joined(leaves: Iterable[tuple[tree.Path, Weight]]) -> Iterator[tuple[tree.Path, Weight]]:
    """The same leaves with the weights of each decoder block as JOINED says: one product instead of three, or of two.

    The parts of a group are held until all have come. A weight that has an adapter cannot be joined.
    """
    groups: dict[tree.Path, dict[str, Weight]] = {}
    for path, w in leaves:
        name = next((name for name, parts in JOINED.items() if compressible(path) and path[-1] in parts), None)
        if name is None:
            yield path, w
            continue
        place = (*path[:-1], name)
        groups.setdefault(place, {})[path[-1]] = w
        if len(groups[place]) == len(JOINED[name]):
            group = groups.pop(place)
            yield place, _cat([group[part] for part in JOINED[name]])


def packed(leaves: Iterable[tuple[tree.Path, Weight]]) -> Iterator[tuple[tree.Path, Weight]]:
    """The same leaves with the linears and the head of the decoder as kernels/linear.py packs them, for generation."""
    for path, w in leaves:
        product = compressible(path) or path[-1] in JOINED or path == ("llama", "head")
        yield path, pack(w) if product and isinstance(w, Tensor) else w


def _cat(parts: Sequence[Weight]) -> Weight:
    """Weights of one kind, one above another."""
    plain = [w for w in parts if isinstance(w, Tensor)]
    if plain:
        return torch.cat(plain)
    columns = zip(*(tree.values(w) for w in parts if isinstance(w, TensorDict)), strict=True)
    return tree.build(zip(tree.paths(parts[0]), map(torch.cat, columns), strict=True))


def empty(w: Tensor, kind: Kind) -> TensorDict:
    """A compressed weight of w's shape, f[out, in], whose values nobody has set."""
    out, size = w.shape
    if kind == "int8":
        return TensorDict({"int8": w.new_empty(out, size, dtype=torch.int8), "scale": w.new_empty(out, 1)})
    codes = w.new_empty(out, size // 2, dtype=torch.uint8)
    return TensorDict({"nf4": codes, "scale": w.new_empty(out, size // BLOCK)})


def compressible(path: tree.Path) -> bool:
    """Whether a leaf is a linear layer of the decoder."""
    return path[:2] == ("llama", "blocks") and path[-1] in COLUMN + ROW


def compress(path: tree.Path, w: Tensor, kind: Kind, axis: Axis = Axis("tp")) -> TensorDict:
    """w: f[out, in], this rank's shard on `axis`, of the leaf `path` -> a compressed weight.

    ValueError naming the leaf if it holds an infinite value or NaN, or if 64 does not divide its inputs (nf4).
    """
    name = "/".join(path)
    return to_nf4(w, name) if kind == "nf4" else to_int8(w, name, axis if path[-1] in ROW else Axis("none"))


def to_int8(w: Tensor, name: str, axis: Axis = Axis("none")) -> TensorDict:
    """w: f[out, in], V on `axis` along in -> int8[out, in] and scale, fp32[out, 1]. A row of zeros stays one.

    name: of the weight, for the ValueError if it holds an infinite value or NaN.
    """
    w = w.float()
    top = _finite(join(w.abs().amax(1, keepdim=True), axis, 1).amax(1, keepdim=True), name, "int8")
    scale = torch.where(top > 0, top / TOP, 1.0)
    return TensorDict({"int8": (w / scale).round().clamp(-TOP, TOP).to(torch.int8), "scale": scale})


def to_nf4(w: Tensor, name: str) -> TensorDict:
    """w: f[out, in] -> uint8[out, in / 2], the even input in the high half, and scale, fp32[out, in / 64].

    The bytes are those of bitsandbytes' quantize_4bit. ValueError as `compress`.
    """
    if w.shape[1] % BLOCK:
        raise ValueError(f"{name} has {w.shape[1]} inputs a rank, which blocks of {BLOCK} do not divide; use int8")
    blocks = w.float().unflatten(1, (-1, BLOCK))
    scale = _finite(blocks.abs().amax(2), name, "nf4")
    table = torch.tensor(NF4, device=w.device)
    codes = torch.bucketize(blocks / scale.clamp(min=1e-30)[..., None], (table[1:] + table[:-1]) / 2).to(torch.uint8)
    high, low = codes.view(len(w), -1, 2).unbind(2)
    return TensorDict({"nf4": high << 4 | low, "scale": scale})


def _finite(top: Tensor, name: str, kind: str) -> Tensor:
    if not top.isfinite().all():
        raise ValueError(f"{name} holds an infinite value or NaN, which {kind} cannot hold; repair the weights")
    return top
