"""AdamW, gradient clipping and the learning-rate schedule, as functions of trees and step numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import kernels, tree
from llava_fn.config import Optim, matches


@dataclass(frozen=True)
class Moments:
    """AdamW's running means of the gradient and of its square, fp32, with the paths of the parameters."""

    first: TensorDict
    second: TensorDict


def init(params: TensorDict) -> Moments:
    """Zero moments for these fp32 parameters."""
    zeros = [tree.rebuild(params, [torch.zeros_like(p) for p in tree.values(params)]) for _ in range(2)]
    return Moments(*zeros)


def learning_rate(c: Optim, step: int, steps: int) -> float:
    """Rate of update number `step` (from 1) of `steps`: linear from 0 over the warm-up, then half a cosine.

    As HF's get_cosine_schedule_with_warmup, whose first update has rate 0: update k uses the factor of k - 1.
    """
    warmup, done = math.ceil(c.warmup * steps), step - 1
    if done < warmup:
        return c.lr * done / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))
    return c.lr * (c.min_lr + (1 - c.min_lr) * cosine)


def clip(grads: TensorDict, norm: Tensor, limit: float) -> None:
    """Scale grads, whose global norm is `norm`, in place to one of at most `limit`, as torch's clip_grad_norm_."""
    if limit:
        torch._foreach_mul_(tree.values(grads), (limit / (norm + 1e-6)).clamp(max=1.0))


def groups(c: Optim, params: TensorDict) -> dict[tuple[float, float], list[int]]:
    """(peak rate, weight decay) -> the leaves that have them, numbered in the order of `tree.values`.

    By default there are two groups: tensors of two or more dims decay, norms and biases do not.
    """
    out: dict[tuple[float, float], list[int]] = {}
    for i, (path, p) in enumerate(zip(tree.paths(params), tree.values(params), strict=True)):
        out.setdefault((c.rate(path), c.decay(path, p.ndim)), []).append(i)
    return out


def check(c: Optim, paths: Sequence[tree.Path]) -> None:
    """ValueError names a pattern of `rates` or `decays` that no trained parameter matches."""
    for field in ("rates", "decays"):
        for pattern, _ in getattr(c, field):
            if not any(matches(pattern, path) for path in paths):
                parts = ", ".join(dict.fromkeys(path[0] for path in paths))
                raise ValueError(f"optim.{field}: {pattern!r} matches nothing that is trained (parts: {parts})")


def adamw(params: TensorDict, grads: TensorDict, moments: Moments, step: int, lr: float, c: Optim) -> None:
    """Update number `step` (from 1), in place: params and moments are consumed.

    lr: what `learning_rate` says; leaves with a peak of their own have a rate in proportion.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.
    """
    trees = [tree.values(t) for t in (params, grads, moments.first, moments.second)]
    for (rate, decay), group in groups(c, params).items():
        p, g, first, second = ([leaves[i] for i in group] for leaves in trees)
        own = c.scheduled(rate, lr)
        kernels.adamw(p, g, first, second, step, kernels.Coefficients(own, c.beta1, c.beta2, c.eps, decay))
