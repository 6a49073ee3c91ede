"""The gradient that each sample of a batch has by itself, of chosen weights, from one backward pass.

    sites(model, parts)                           the weights in the parts, and their sizes
    per_sample(model, batch, sites, projection)   loss of each sample, and its gradients: path -> f[n, o, i]

The samples of a stream never see each other, so the gradient of a weight is a sum over samples, and probe.py takes the
sum apart. With a Projection no gradient is ever whole: each is a matrix of at most rank x rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llava, lora, tree
from llava_fn.batch import Batch
from llava_fn.config import Llava, Lora
from llava_fn.grad import value_and_grad
from llava_fn.kernels.precision import at_least_fp32
from llava_fn.spec import under


@dataclass(frozen=True)
class Site:
    """A weight f[out, inp] whose gradient is taken: of a linear layer, an adapter's a or b, embeddings, the head.

    The gain of a norm is one with a single input. bias: whether the layer has one; its gradient is then the last of
    inp + 1 columns.
    """

    path: tree.Path
    out: int
    inp: int
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of one sample's whole gradient."""
        return self.out, self.inp + self.bias


@dataclass(frozen=True)
class Projection:
    """Random projections of a layer's outputs and inputs to `rank` numbers each; a smaller side is left as it is.

    The entries are normal with variance 1 / rank, so that products of projected gradients have the expectation of those
    of whole ones. They follow from the seed and the path.
    """

    rank: int
    seed: int = 0

    def shape(self, site: Site) -> tuple[int, int]:
        """Of one sample's projected gradient."""
        out, inp = site.shape
        return min(out, self.rank), min(inp, self.rank)

    def matrices(self, site: Site) -> dict[str, Tensor]:
        """fp32 `out` [rank, out] and `inp` [rank, inp], on the CPU, of the sides that are projected."""
        sides = zip(("out", "inp"), site.shape, strict=True)
        return {name: self._matrix(f"{name} {'/'.join(site.path)}", n) for name, n in sides if n > self.rank}

    def _matrix(self, name: str, size: int) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
        return torch.randn(self.rank, size, generator=rng) * self.rank**-0.5


@dataclass(frozen=True)
class Studied:
    """A model whose gradients are taken. params: with a part `lora` if there are adapters."""

    params: TensorDict
    config: Llava
    lora: Lora | None
    run: llava.Execution = llava.Execution()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.params["projector", "w1"].device


def sites(model: Studied, parts: Sequence[str]) -> list[Site]:
    """The linear layers that lie in the parts, and of the decoder embeddings, norms and head too.

    ValueError names a part in which there is none of these, or which is none of the model's.
    """
    found = []
    for path, leaf in zip(tree.paths(model.params), tree.values(model.params), strict=True):
        if _is_probed(path):
            bias = path[0] != lora.PART and (*path[:-1], bias_of(path[-1])) in model.params
            out, inp = leaf.shape if leaf.ndim == 2 else (len(leaf), 1)
            found.append(Site(path, out, inp, bias))
    empty = [part for part in parts if not any(under(site.path, [part]) for site in found)]
    if empty:
        known = ", ".join(dict.fromkeys(site.path[0] for site in found))
        raise ValueError(
            f"{', '.join(empty)}: no part of the model with a weight that can be looked at; there are {known}, and "
            "paths in them"
        )
    return [site for site in found if under(site.path, parts)]


def bias_of(weight: str) -> str:
    """The name of a weight's bias: b1 of w1, b_up of w_up."""
    return f"b{weight[1:]}"


def _is_probed(path: tree.Path) -> bool:
    if path[0] in (lora.PART, "llama"):
        return True
    return path[-1].startswith("w") and (path[0] == "projector" or "blocks" in path)


def size(chosen: Sequence[Site], projection: Projection | None) -> int:
    """Numbers in the gradient of one sample."""
    return sum(math.prod(projection.shape(site) if projection else site.shape) for site in chosen)


@dataclass(frozen=True)
class Taken:
    """Of n samples, in the order of the stream. loss: fp32[n], nats; count: int64[n], labelled tokens.

    gradients: of each sample's loss, path -> f[n, o, i].
    """

    records: tuple[str, ...]
    loss: Tensor
    count: Tensor
    gradients: TensorDict

    def flat(self) -> Tensor:
        """The gradients of each sample as one row, f[n, size]."""
        return torch.cat([g.flatten(1) for g in tree.values(self.gradients)], 1)


def per_sample(
    model: Studied, batch: Batch, chosen: Sequence[Site], projection: Projection | None = None, mean: bool = False
) -> Taken:
    """Loss and gradients of each sample. batch: on the model's device.

    mean: the loss of a sample is the mean over its labelled tokens instead of their sum. Memory beside that of an
    ordinary step: n times `size` numbers. Dropout of adapters is off. ValueError if the batch has padding, or tp shares
    the model.
    """
    n = len(batch.records)
    if model.run.tp.axis.size > 1:
        raise ValueError(
            f"a rank of tp={model.run.tp.axis.size} has a part of each gradient; use a whole model on every device"
        )
    if n != len(batch.stream.segments.queries):
        raise ValueError("the batch has a segment of padding, which is no sample; collate it with multiple=1")
    shapes = {site.path: projection.shape(site) if projection else site.shape for site in chosen}
    zero = at_least_fp32(model.params["projector", "w1"].new_zeros(()))
    deltas = tree.build((path, zero.expand(n, *shape)) for path, shape in shapes.items())
    probes = {site.path: _probe(site, batch, model.config, projection, zero) for site in chosen}
    owner = owners(batch)
    count = torch.bincount(owner, minlength=n)

    def loss(deltas: TensorDict) -> tuple[Tensor, Tensor]:
        nll = llava.nll(_attached(model, deltas, probes), batch, model.config, model.run)
        sums = nll.new_zeros(n).index_add(0, owner, nll) / (count if mean else 1)
        return sums.sum(), sums.detach()

    (_, losses), gradients = value_and_grad(loss)(deltas)
    return Taken(batch.records, losses, count, gradients)


def owners(batch: Batch) -> Tensor:
    """The sample of each labelled token, counted in the order of the stream, int64[labelled]."""
    return _samples(batch.labelled, batch.stream.read_segments.queries)


def _samples(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The sample of each row, int64. lengths: rows of each sample."""
    return torch.bucketize(rows, torch.tensor(lengths, device=rows.device).cumsum(0), right=True)


def _probe(site: Site, batch: Batch, c: Llava, projection: Projection | None, like: Tensor) -> dict[str, Tensor]:
    """The leaves of a probe but `delta`."""
    matrices = projection.matrices(site) if projection else {}
    return {**_rows(site, batch, c), **{name: m.to(like) for name, m in matrices.items()}}


def _rows(site: Site, batch: Batch, c: Llava) -> dict[str, Tensor]:
    """How many rows of each sample the layer reads, and the table embeds: `rows` and `tokens`, int64[n] on the host."""
    part, *inner = site.path[site.path[0] == lora.PART :]
    stream = batch.stream
    if part != "llama":
        images = torch.bincount(_samples(batch.image_rows, stream.segments.queries), minlength=len(batch.records))
        return {"rows": images.cpu() // c.vision.patches * (c.vision.patches + (part == "vision"))}
    if inner[0] in ("embed", "head"):  # the table may be the head too
        labelled = torch.bincount(owners(batch), minlength=len(batch.records)).cpu()
        return {"rows": labelled, "tokens": torch.tensor(stream.segments.queries)}
    # the last block computes queries, output and feed-forward layer of the rows that are read alone
    late = inner[0] == "norm" or inner[1] == str(c.llama.blocks - 1) and not {"norm1", "wk", "wv"} & set(inner)
    return {"rows": torch.tensor((stream.read_segments if late else stream.segments).queries)}


def _attached(model: Studied, deltas: TensorDict, probes: Mapping[tree.Path, Mapping[str, Tensor]]) -> TensorDict:
    """The parameters that the model reads, with each chosen weight as {w, probe}."""
    p = lora.attach(model.params, model.lora)
    leaves = dict(zip(tree.paths(p), tree.values(p), strict=True))
    for path, delta in zip(tree.paths(deltas), tree.values(deltas), strict=True):
        place = (*path[1:-1], lora.PART, path[-1]) if path[0] == lora.PART else path
        place = place if place in leaves else (*place, "w")  # an adapted weight
        leaves[(*place, "w")] = leaves.pop(place)
        leaves |= {(*place, "probe", name): leaf for name, leaf in {**probes[path], "delta": delta}.items()}
    return tree.build(leaves.items())
