"""Random weights of any model, made on the device: those of a 7B never stand in the host's memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from tensordict import TensorDict

from llava_fn import config, llava, spec, tree
from llava_fn.parallel.mesh import Mesh


def random(
    c: config.Llava, device: torch.device, dtype: torch.dtype, trained: Callable[[tree.Path], bool], mesh: Mesh = Mesh()
) -> TensorDict:
    """This rank's block of each parameter: fp32 where `trained`, else `dtype`. Replicas are equal on all ranks."""

    def leaf(path: tree.Path, p: spec.Param) -> torch.Tensor:
        rng = torch.Generator(device).manual_seed(zlib.crc32("/".join(path).encode()))
        shape = [part.stop - part.start for part in spec.shard(p, mesh)]
        x = torch.empty(shape, device=device, dtype=torch.float32 if trained(path) else dtype)
        return x.fill_(1.0) if p.std is None else x.normal_(0.0, p.std, generator=rng) if p.std else x.zero_()

    return spec.build(llava.spec(c), leaf)
