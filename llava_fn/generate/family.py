"""A base and the adapters of it in one memory: each is an assistant of its own, and their rows share a batch.

For rows of several adapters, the `a` of all adapters stand one above another, and their `b` beside each other. A row's
scale is its adapter's in the columns of that adapter, and 0 in the others, which then add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import lora, tree
from llava_fn.generate.assistant import Assistant, Placement, form_of, open_weights, place
from llava_fn.generate.options import ChatOptions
from llava_fn.generate.types import Model
from llava_fn.parallel.mesh import Mesh
from llava_fn.weights import model
from llava_fn.weights.source import Weights, open_adapter


@dataclass(frozen=True)
class Stack:
    """The decoder's adapters together. params: of the base. pairs: path -> a: f[r, in], b: f[out, r], r of them all.

    scales: path -> f[adapters + 1, r], of rows of the base and of each adapter. names: of the adapters, in order.
    """

    params: TensorDict
    pairs: Mapping[tree.Path, Mapping[str, Tensor]]
    scales: Mapping[tree.Path, Tensor]
    names: tuple[str, ...]

    def rows(self, who: Sequence[str]) -> TensorDict:
        """The parameters for a batch whose row i is of the adapter who[i]; "" is the base."""
        numbers = [self.names.index(name) + 1 if name else 0 for name in who]
        pairs = {path: {**pair, "scale": self.scales[path][numbers]} for path, pair in self.pairs.items()}
        return lora.attached(self.params, pairs)


@dataclass(frozen=True)
class Family:
    """A base, and its adapters by name."""

    base: Assistant
    adapters: Mapping[str, Assistant] = field(default_factory=dict)
    stack: Stack | None = None

    def member(self, name: str) -> Assistant:
        """An adapter's assistant; the base's for ""."""
        return self.adapters[name] if name else self.base

    def model(self, who: Sequence[str]) -> Model:
        """The model that decodes a batch of rows of these members."""
        if len(set(who)) == 1:
            return self.member(who[0]).model
        assert self.stack is not None  # without adapters all rows are the base's
        return replace(self.base.model, params=self.stack.rows(who))


def load(m: ChatOptions, adapters: Mapping[str, Path], mesh: Mesh = Mesh()) -> Family:
    """The base that the options name, and adapters of it from PEFT folders or runs. ValueError if one does not fit."""
    weights, to = open_weights(m.weights), Placement.of(m, mesh)
    to = replace(to, arrange=to.arrange and not adapters)
    if weights.lora and adapters:
        raise ValueError(f"{weights.where} holds adapters itself; give its base as weights, and each adapter by name")
    base = place(weights, form_of(weights, m.preset, m.template, m.image_mode), to, m.context)
    opened = {name: open_adapter(path, m.weights[0]) for name, path in adapters.items()}
    members, pairs = {}, {}
    for name, own in opened.items():
        members[name], pairs[name] = _member(base, weights, own, m, to)
    return Family(base, members, _stack(base.model.params, pairs) if members else None)


def _member(
    base: Assistant, weights: Weights, own: Weights, m: ChatOptions, to: Placement
) -> tuple[Assistant, Mapping[tree.Path, Mapping[str, Tensor]]]:
    """The assistant of one adapter, which shares the base's tensors, and its adapters."""
    others = [part for part in own.parts if part != "projector"]
    if others:
        raise ValueError(f"{own.where} trained {', '.join(others)} beside its adapters; serve it by itself")
    both = model.merge([weights, own])
    pairs = model.adapters(both, to.mesh, to.device, to.dtype)
    params = base.model.params
    if "projector" in own.parts:
        _, rest = tree.split(params, lambda path: path[0] == "projector")
        trained = model.load(own, to.mesh)
        params = tree.merge(tree.rebuild(trained, [x.to(to.device, to.dtype) for x in tree.values(trained)]), rest)
    form = form_of(both, m.preset, m.template, m.image_mode)
    of = replace(base.model, params=lora.attached(params, pairs))
    return replace(base, model=of, form=form, trained=own.template or base.trained), pairs


def _stack(params: TensorDict, adapters: Mapping[str, Mapping[tree.Path, Mapping[str, Tensor]]]) -> Stack:
    pairs, scales = {}, {}
    for path in dict.fromkeys(path for of in adapters.values() for path in of if path[0] == "llama"):
        own = [of.get(path) for of in adapters.values()]
        there = [pair for pair in own if pair]
        pairs[path] = {"a": torch.cat([pair["a"] for pair in there]), "b": torch.cat([pair["b"] for pair in there], 1)}
        table, first = pairs[path]["a"].new_zeros(len(own) + 1, len(pairs[path]["a"])), 0
        for i, pair in enumerate(own):
            if pair:
                table[i + 1, first : first + len(pair["a"])] = pair["scale"]
                first += len(pair["a"])
        scales[path] = table
    return Stack(params, pairs, scales, tuple(adapters))
