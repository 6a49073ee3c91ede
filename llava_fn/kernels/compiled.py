"""Elementwise references as one kernel each, by torch.compile's inductor: the CUDA forms of several operations.

On an H200 these small kernels beat a compiled block, and torch's own where it has any (bench/RESULTS.md). A graph
serves all numbers of rows; everything else, as widths, dtypes and whether gradients are wanted, is a constant of it.
Compiling takes some seconds an operation, at the first call; inductor keeps its work on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from llava_fn.kernels.dispatch import in_transform, require

GRAPHS = 64  # of one operation; torch's 8 are too few for training, prompts and steps of a model with grouped heads


def compiled(reference: Callable) -> Callable:
    """reference(x, *rest) compiled, where dim 0 of each tensor of more than one dim are the rows of x.

    Within a transform of torch.func, which torch.compile cannot differentiate rightly, and within a larger compiled
    graph, it is the reference itself. ValueError on CUDA without Triton.
    """

    name = f"the CUDA form of {reference.__module__.rpartition('.')[2]}"

    @wraps(reference)
    def call(x: Tensor, *rest):
        if torch.compiler.is_compiling() or in_transform():
            return reference(x, *rest)
        require(x.device.type != "cuda" or has_triton(), name, "Triton, the compiler, which torch does not find here")
        for tensor in (x, *rest):
            if isinstance(tensor, Tensor) and tensor.ndim > 1:
                _mark(tensor)
        try:
            return by_inductor(reference)(x, *rest)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # pyright: ignore[reportAttributeAccessIssue]
            # Here alone: in each call the patch would take the host 40 us.
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                return by_inductor(reference)(x, *rest)

    return call


def _mark(x: Tensor) -> None:
    if len(x) > 1:  # one row is a graph of its own
        torch._dynamo.maybe_mark_dynamic(x, 0)
    for dim in range(1, x.ndim):
        torch._dynamo.mark_static(x, dim)


@cache
def by_inductor(reference: Callable) -> Callable:
    """One compiled function for each reference: it holds the graphs."""
    return torch.compile(reference, fullgraph=True)
