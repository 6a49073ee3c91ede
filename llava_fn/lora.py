"""Low-rank adapters as values (Hu et al. 2021, arXiv 2106.09685): a fourth part of the parameters, `lora`.

    spec(base, c)                   adapters of the base's linear layers: lora/llama/blocks/0/wq/{a, b}
    attach(params, c)               the tree that the model reads: an adapted leaf is {w, lora}, see linear.py
    merge(params, nodes)            plain weights with the adapters in them

Nothing else in the model knows of adapters. `a` has the sharding of the weight's inputs and `b` that of its outputs, so
that a tensor-parallel mesh needs no rule of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import spec as specs
from llava_fn import tree
from llava_fn.config import Lora
from llava_fn.dropout import Keys
from llava_fn.spec import Param, Spec

PART = "lora"


def spec(base: Spec, c: Lora) -> Spec:
    """The adapters of all linear layers of `base` that a pattern of `c.targets` matches, under the base's paths.

    a: r in, of the variance of PEFT's U(-1, 1) / sqrt(in); b: out r, zeros. ValueError if a pattern matches none.
    """
    paths = {"/".join(path): (path, p) for path, p in specs.leaves(base) if path[-1].startswith("w")}
    out: dict = {}
    for pattern in c.targets:
        matched = [paths[name] for name in paths if re.fullmatch(pattern, name)]
        if not matched:
            raise ValueError(f"lora.targets: {pattern!r} matches no linear layer; they are {_brief(list(paths))}")
        for path, p in matched:
            (rows, columns), (out_axis, in_axis) = p.shape, p.axes
            node = out
            for name in path:
                node = node.setdefault(name, {})
            node["a"] = Param((c.rank, columns), (None, in_axis), (3 * columns) ** -0.5)
            node["b"] = Param((rows, c.rank), (out_axis, None), 0.0)
    return out


def _brief(names: list[str]) -> str:
    """The names with every number as N, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"/\d+/", "/N/", name) for name in names))


def extended(base: Spec, c: Lora | None) -> Spec:
    """The base's spec with the part `lora`, if there are adapters."""
    return base if c is None else {**base, PART: spec(base, c)}


def nodes(adapters: TensorDict) -> dict[tree.Path, dict[str, Tensor]]:
    """Path of an adapted weight -> its leaves by their last name."""
    out: dict[tree.Path, dict[str, Tensor]] = {}
    for path, leaf in zip(tree.paths(adapters), tree.values(adapters), strict=True):
        out.setdefault(path[:-1], {})[path[-1]] = leaf
    return out


def attach(params: TensorDict, c: Lora | None, keys: Keys | None = None) -> TensorDict:
    """Parameters with a part `lora` -> those that the model reads. Without adapters: `params`. keys: of a dropout."""
    if c is None:
        return params
    adapters, base = tree.split(params, lambda path: path[0] == PART)
    out, scale = {}, torch.tensor(c.scale)
    for path, pair in nodes(adapters[PART]).items():
        out[path] = pair | {"scale": scale} | (keys.of(path, pair["a"].shape[1]) if keys else {})
    return attached(base, out)


def attached(base: TensorDict, pairs: Mapping[tree.Path, Mapping[str, Tensor]]) -> TensorDict:
    """The base with each adapted weight as {w, lora}. pairs: path -> a, b, scale. No number is copied.

    ValueError if there is an adapter without a weight.
    """
    out, left = TensorDict({}), set(pairs)
    for path, leaf in zip(tree.paths(base), tree.values(base), strict=True):
        at = next((p for p in (path, path[:-1]) if p in pairs), None)  # the leaf, or the node of a compressed one
        left.discard(at)
        out[path if at is None else (*at, "w", *path[len(at) :])] = leaf
    if left:
        raise ValueError(f"adapters without a weight: {', '.join(sorted('/'.join(path) for path in left))}")
    for path, pair in pairs.items():
        for name, leaf in pair.items():
            out[(*path, "lora", name)] = leaf
    return out.lock_()


def merge(base: TensorDict, pairs: Mapping[tree.Path, Mapping[str, Tensor]]) -> TensorDict:
    """Plain weights W + scale B A, each summed in fp32 and rounded once to W's dtype, as PEFT's default merge.

    ValueError for an adapter of a weight that is not there, or is compressed.
    """
    there = dict(zip(tree.paths(base), tree.values(base), strict=True))
    odd = sorted("/".join(path) for path in pairs.keys() - there)
    if odd:
        raise ValueError(f"adapters without a plain weight: {', '.join(odd)}; merge them before weights are compressed")
    return tree.rebuild(base, [merged(w, **pairs[path]) if path in pairs else w for path, w in there.items()])


def merged(w: Tensor, a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """One weight of `merge`."""
    return (w.float() + (b.float() @ a.float()) * scale).to(w.dtype)
