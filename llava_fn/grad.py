"""The transforms that training needs: value_and_grad, remat, and scan over blocks.

Not torch.func.grad_and_value: it builds the gradient's own graph (create_graph=True), which keeps every activation
alive: 2.9 times the peak memory, and remat saves nothing. The models work under torch.func all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from llava_fn import tree


def value_and_grad(fn: Callable) -> Callable:
    """fn(params, *args) -> (loss, aux)  becomes  (params, *args) -> ((loss, aux), grads).

    grads has the paths of params; a leaf that the loss does not depend on has a gradient of zeros. params may hold
    fp32 masters that fn casts: gradients then arrive in fp32. Nothing is written to `.grad`.
    """

    def call(params: TensorDict, *args):
        leaves = [leaf.detach().requires_grad_() for leaf in tree.values(params)]
        with torch.enable_grad():
            loss, aux = fn(tree.rebuild(params, leaves), *args)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        else:  # it depends on none of them: a projector is trained, and the batch is text alone
            grads = [torch.zeros_like(leaf) for leaf in leaves]
        return (loss.detach(), aux), tree.rebuild(params, grads)

    return call


class _Remat(torch.autograd.Function):
    @staticmethod
    def forward(fn, tree_spec, *flat):
        with torch.no_grad():
            return fn(*tree_unflatten(list(flat), tree_spec))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.fn, ctx.tree_spec, *flat = inputs
        ctx.rest = [None if isinstance(x, Tensor) else x for x in flat]
        ctx.is_tensor = [isinstance(x, Tensor) for x in flat]
        ctx.save_for_backward(*(x for x in flat if isinstance(x, Tensor)))

    @staticmethod
    def backward(ctx, *gs):
        (g,) = gs
        saved = iter(ctx.saved_tensors)
        flat = [next(saved) if tensor else x for tensor, x in zip(ctx.is_tensor, ctx.rest, strict=True)]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        with torch.enable_grad():
            for i in wanted:
                flat[i] = flat[i].detach().requires_grad_()
            out = ctx.fn(*tree_unflatten(flat, ctx.tree_spec))
            grads = dict(zip(wanted, torch.autograd.grad(out, [flat[i] for i in wanted], g), strict=True))
        return None, None, *(grads.get(i) for i in range(len(flat)))


def remat(fn: Callable) -> Callable:
    """Recompute fn(*args) -> Tensor in the backward pass instead of keeping its activations.

    args: TensorDicts, tensors, and anything else, which passes through. fn must be pure: no random numbers, no
    autocast (neither state is restored). It is also the boundary at which fn may be compiled.
    Source: Chen et al. 2016, arXiv 1604.06174.
    """

    def call(*args) -> Tensor:
        flat, tree_spec = tree_flatten(args)
        return _Remat.apply(fn, tree_spec, *flat)

    return call


def scan(block: Callable) -> Callable:
    """block(p, x, *rest) -> x  becomes  (params, x, rests) -> x: one block after another, each with its parameters."""

    def call(params: Sequence[TensorDict], x: Tensor, rests: Sequence[tuple]) -> Tensor:
        for p, rest in zip(params, rests, strict=True):
            x = block(p, x, *rest)
        return x

    return call
