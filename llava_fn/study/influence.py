"""How much each training record raised or lowered the log-probability of an answer, from gradients sample by sample.

A record's gradient g and the answer's q give its influence as q^T A g: how far a small step against the record's loss
moves the answer's. A > 0 that the record raised the answer's probability, < 0 that it lowered it.

tracin          A = 1, summed over checkpoints, each with its learning rate (Pruthi et al. 2020, arXiv 2002.08484)
gauss_newton    A = (H + damping * mean of H's eigenvalues)^-1, with H = the mean of g g^T over the training records,
                averaged over checkpoints (Park et al. 2023, TRAK, arXiv 2303.14186; Choe et al. 2024, arXiv 2405.13954)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LARGEST = 8192  # numbers of a gradient whose square matrix is still solved

Chunks = Callable[[], Iterable[Tensor]]  # the gradients of the training records, f[n, d] at a time, from the start


def tracin(chunks: Chunks, queries: Tensor) -> Tensor:
    """queries: f[q, d] -> fp32[q, records]."""
    return torch.cat([queries @ g.to(queries).T for g in chunks()], 1)


def gauss_newton(chunks: Chunks, queries: Tensor, damping: float) -> Tensor:
    """queries: f[q, d] -> fp32[q, records]. The data are read twice; in memory is one chunk, and fp64[d, d].

    ValueError if d is above LARGEST.
    """
    d = queries.shape[1]
    if d > LARGEST:
        raise ValueError(f"gradients of {d} numbers are too long for gauss_newton (at most {LARGEST}); lower --rank")
    h, n = torch.zeros(d, d, dtype=torch.float64), 0
    for g in chunks():
        h.addmm_(g.double().T, g.double())
        n += len(g)
    h /= n
    h.diagonal().add_(damping * h.diagonal().mean())
    return tracin(chunks, torch.linalg.solve(h, queries.double().T).T.float())
