"""Trees of tensors: TensorDicts that are taken apart, put together and mapped, never edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn.kernels.precision import at_least_fp32

Path = tuple[str, ...]


def paths(tree: TensorDict) -> list[Path]:
    """The path of every leaf, in order."""
    # not keys(True, True): a locked tree caches that in a cycle, which keeps its tensors until Python looks for cycles
    return [(k,) if isinstance(k, str) else k for k, _ in tree.items(True, True)]


def values(tree: TensorDict) -> list[Tensor]:
    """Every leaf, in the order of `paths`."""
    return [leaf for leaf in tree.values(True, True) if isinstance(leaf, Tensor)]


def rebuild(like: TensorDict, leaves: Sequence[Tensor]) -> TensorDict:
    """A locked tree with the paths of `like` and these leaves, in the order of `values(like)`."""
    return build(zip(paths(like), leaves, strict=True))


def build(leaves: Iterable[tuple[Path, Tensor | TensorDict]]) -> TensorDict:
    """A locked tree of these leaves, some of which may be trees."""
    tree = TensorDict({})
    for path, leaf in leaves:
        tree[path] = leaf
    return tree.lock_()


def each(fn: Callable[[Tensor], Tensor], leaf: Tensor | TensorDict) -> Tensor | TensorDict:
    """fn of a leaf, or of every leaf of a tree."""
    return fn(leaf) if isinstance(leaf, Tensor) else rebuild(leaf, [fn(x) for x in values(leaf)])


def split(tree: TensorDict, wanted: Callable[[Path], bool]) -> tuple[TensorDict, TensorDict]:
    """(leaves whose path is wanted, the others). Freezing is splitting: there are no flags on tensors."""
    parts = TensorDict({}), TensorDict({})
    for path, leaf in zip(paths(tree), values(tree), strict=True):
        parts[not wanted(path)][path] = leaf
    return parts[0].lock_(), parts[1].lock_()


def merge(a: TensorDict, b: TensorDict) -> TensorDict:
    """The union of two trees. ValueError on a leaf that both hold."""
    tree = TensorDict({})
    for part in (a, b):
        for path, leaf in zip(paths(part), values(part), strict=True):
            if path in tree:
                raise ValueError(f"both trees hold {'/'.join(path)}")
            tree[path] = leaf
    return tree.lock_()


def cast(tree: TensorDict, dtype: torch.dtype) -> TensorDict:
    """Every leaf in `dtype`; a leaf that has it already is not copied."""
    return rebuild(tree, [leaf.to(dtype) for leaf in values(tree)])


def global_norm(tree: TensorDict) -> Tensor:
    """The 2-norm of all leaves as one vector, fp32[]."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([at_least_fp32(leaf) for leaf in values(tree)])))
