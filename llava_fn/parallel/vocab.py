"""The embedding table and the head, sharded over the vocabulary; a row of logits is never gathered."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from llava_fn import kernels
from llava_fn.kernels.precision import at_least_fp32
from llava_fn.parallel.collectives import join, leave
from llava_fn.parallel.mesh import Axis


def _mine(ids: Tensor, size: int, axis: Axis) -> tuple[Tensor, Tensor]:
    local = ids - axis.rank * size
    mine = (local >= 0) & (local < size)
    return torch.where(mine, local, 0), mine


def embed(table: Tensor, ids: Tensor, axis: Axis) -> Tensor:
    """table: v d, V on `axis` along v; ids: int64[t] -> t d, I."""
    if axis.size == 1:
        return embedding(ids, table)
    local, mine = _mine(ids, table.shape[0], axis)
    return leave(embedding(local, table) * mine[:, None], axis, 0)


def cross_entropy(logits: Tensor, targets: Tensor, axis: Axis) -> Tensor:
    """logits: r v, V on `axis` along v; targets: int64[r] -> fp32[r], I. Source: Shoeybi et al. 2019, section 3."""
    if axis.size == 1:
        return kernels.cross_entropy(logits, targets)
    logits = at_least_fp32(logits)
    local, mine = _mine(targets, logits.shape[1], axis)
    top = join(logits.detach().amax(1, keepdim=True), axis, 1).amax(1)
    total = leave((logits - top[:, None]).exp().sum(1), axis, 0)
    rows = torch.arange(len(local), device=local.device)
    hit = leave(logits[rows, local] * mine, axis, 0)  # by indexing: Ascend 950 has no gather
    return total.log() + top - hit
