"""LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744): image features take the place of the image's tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, projector, vit
from llava_fn.batch import Batch
from llava_fn.config import Llava, Vision
from llava_fn.grad import remat, scan
from llava_fn.linear import embedding
from llava_fn.parallel.collectives import TP
from llava_fn.parallel.zero import Zero
from llava_fn.spec import Spec

TOWERS = {Vision: vit}  # config of an image tower -> the module that has its spec, block, normalise and encode


def tower(c: Vision) -> ModuleType:
    """The module of the image tower that this config describes."""
    return TOWERS[type(c)]


@dataclass(frozen=True)
class Execution:
    """How the blocks of both transformers run. It changes time and memory, never what is computed.

    tower_blocks, llama_blocks: grad.scan of a `block`, or a form that computes the same. None: the block of the model's
    own tower.
    """

    tower_blocks: Callable | None = None
    llama_blocks: Callable = scan(llama.block)
    tp: TP = TP()
    min_images: int = 0  # with ZeRO 3 a rank without images runs the tower on black ones, to join its all-gathers


def execution(
    recompute: bool = False,
    backend: str = "",
    zero: Zero = Zero(),
    vision: Vision = Vision(),
) -> Execution:
    """recompute: keep only each block's input for the backward pass.

    backend: compile blocks by that of torch.compile; one graph serves all blocks and all batches. zero: how
    the trained parts are kept. vision: config of the model's tower, whose blocks run. ValueError if the level of `zero`
    needs recompute and that is off, or if there is no such backend.
    """
    blocks = [compiled(b, backend, dynamic=True) for b in (tower(vision).block, llama.block)]
    if zero.level == 3 and not recompute:
        raise ValueError("zero=3 gathers a block's weights again in the backward pass; it needs recompute")
    sharded = [zero.sharded(part) for part in ("vision", "llama")]
    run = [
        zero.scan(b, part) if gathered_late else scan(remat(b) if recompute else b)
        for b, part, gathered_late in zip(blocks, ("vision", "llama"), sharded, strict=True)
    ]
    return Execution(*run, tp=TP(zero.mesh.tp), min_images=zero.mesh.tp.size if sharded[0] else 0)


def compiled(fn: Callable, backend: str | Callable, dynamic: bool | None = None) -> Callable:
    """fn through a backend of torch.compile, or itself without one. ValueError if there is no such backend."""
    if not backend:
        return fn
    if isinstance(backend, str) and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"compile={backend} is no backend of torch.compile; there are: {', '.join(known)}")
    return torch.compile(fn, backend=backend, dynamic=dynamic)


def spec(c: Llava) -> Spec:
    """Parameters of the three parts."""
    return {
        "vision": tower(c.vision).spec(c.vision),
        "projector": projector.spec(c.vision.width, c.llama.width),
        "llama": llama.spec(c.llama),
    }


def features(p: TensorDict, pixels: Tensor, c: Llava, run: Execution = Execution()) -> Tensor:
    """What the decoder sees of images. pixels: uint8[i, 3, image, image] -> f[(i p), d], I on tp.

    Each rank of the tensor axis sees its share of the images, filled up with black ones where they do not divide.
    """
    i, size = len(pixels), run.tp.axis.size if run.tp.sequence else 1
    black = pixels.new_zeros(max(run.min_images - i, -i % size), *pixels.shape[1:])
    pixels = run.tp.split(torch.cat([pixels, black]) if len(black) else pixels)
    vision = tower(c.vision)
    blocks = run.tower_blocks or scan(vision.block)
    x = vision.encode(p["vision"], vision.normalise(pixels), c.vision, blocks)
    x = projector.project(p["projector"], x)
    return rearrange(run.tp.join(x)[:i], "i p d -> (i p) d")


def splice(x: Tensor, feats: Tensor, rows: Tensor) -> Tensor:
    """x: t d with feats: r d put at rows: int64[r]."""
    return x.index_copy(0, rows, feats)


def embed(p: TensorDict, batch: Batch, c: Llava, run: Execution = Execution()) -> Tensor:
    """The decoder's input, f[t, d]: embeddings of the text, features of the images. ValueError if they do not match."""
    x = embedding(batch.ids.clamp(min=0), p["llama"]["embed"], run.tp.axis)
    if len(batch.image_rows) != len(batch.pixels) * c.vision.patches:
        raise ValueError(
            f"{len(batch.image_rows)} image tokens do not match {len(batch.pixels)} images of "
            f"{c.vision.patches} patches (records {', '.join(batch.records)})"
        )
    if len(batch.pixels) == run.min_images == 0:
        return x
    return splice(x, features(p, batch.pixels, c, run), batch.image_rows)


def forward(p: TensorDict, batch: Batch, c: Llava, run: Execution = Execution()) -> Tensor:
    """The decoder's last hidden states at the rows that the batch reads, f[r, d]."""
    x = run.tp.split(embed(p, batch, c, run))
    return llama.decode(p["llama"], x, batch.stream, c.llama, run.tp, run.llama_blocks)


def nll(p: TensorDict, batch: Batch, c: Llava, run: Execution = Execution()) -> Tensor:
    """Negative log-likelihood in nats of each labelled token, fp32[n], in the order of the stream."""
    x = forward(p, batch, c, run)[batch.labelled]
    return llama.nll(p["llama"], x, batch.targets, c.llama, run.tp)
