"""One model from the weights of several sources, and its parameters in memory."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, projector
from llava_fn import spec as specs
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.config import Llava, Vision
from llava_fn.llava import tower
from llava_fn.parallel.mesh import Mesh
from llava_fn.weights import peft, placing, vocabulary
from llava_fn.weights.configs import Stated
from llava_fn.weights.source import PARTS, Weights, interpret, trimmed

TOWERS = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224}  # OpenAI's, equal but for pixels per side


def _common(sources: Sequence[Weights], field: str):
    """The value of a field on which the sources agree; None if none has one. ValueError names two that differ."""
    stated = [(source, getattr(source, field)) for source in sources if getattr(source, field) is not None]
    other = [source for source, value in stated if value != stated[0][1]]
    if other:
        raise ValueError(f"{stated[0][0].where} and {other[0].where} differ in {field}; give only sources that agree")
    return stated[0][1] if stated else None


def _form(sources: Sequence[Weights], adapted: Weights | None, field: str) -> str | None:
    """The form of questions or images: the adapters', with a warning if the base's differs, or else `_common`."""
    own = getattr(adapted, field, None)
    if adapted is None or own is None:
        return _common(sources, field)
    others = [value for source in sources if (value := getattr(source, field)) not in (None, own)]
    if others:
        print(f"{field} {own}, with which {adapted.where} was trained, in place of {others[0]}", file=sys.stderr)
    return own


def merge(sources: Sequence[Weights]) -> Weights:
    """The weights of all sources in one, and the adapters of at most one source, not merged into the weights.

    ValueError if two sources hold the same part, if parts do not fit each other, or if adapters do not fit the weights.
    """
    sources, adapted = _with_trained_last(sources)
    owner: dict[str, Weights] = {}
    for source in sources:
        for part in source.parts:
            if part in owner and source is not adapted:
                raise ValueError(f"{owner[part].where} and {source.where} both bring the {part}; give one of them")
            owner[part] = source
    leaves = {path: leaf for source in sources for path, leaf in source.leaves.items()}
    vision = next((s.vision for s in sources if "vision" in s.parts), None)
    adapters = {
        path: adapter for path, adapter in (adapted.lora.items() if adapted else ())
        if not (vision and placing.is_spare(path, vision))  # PEFT also adapts blocks that LLaVA does not read
    }  # fmt: skip
    peft.check(leaves, adapters, adapted.where if adapted else "")
    whole = Weights(
        " + ".join(source.where for source in sources), "merged", leaves,
        {path: leaf for source in sources for path, leaf in source.spare.items()},
        tuple(archive for source in sources for archive in source.archives),
        vision=vision,
        llama=next((s.llama for s in sources if "llama" in s.parts), None),
        lora=adapters, trained=adapted.trained if adapted else (),
        tokenizer=_common(sources, "tokenizer"), image_mode=_form(sources, adapted, "image_mode"),
        template=_form(sources, adapted, "template"), compat=_form(sources, adapted, "compat"),
        image_reading=_form(sources, adapted, "image_reading"),
    )  # fmt: skip
    _check_widths(whole)
    _check_towers(sources)
    return whole if whole.tokenizer is None else with_tokenizer(whole, whole.tokenizer)


def with_tokenizer(source: Weights, tokenizer: bytes) -> Weights:
    """The weights with this tokenizer, the rows that it has no piece for set apart. ValueError if it does not fit."""
    if source.llama is None:
        return dataclasses.replace(source, tokenizer=tokenizer)
    text = vocabulary.rows(source.where, tokenizer, source.llama.vocab)
    return dataclasses.replace(trimmed(source, text), tokenizer=tokenizer)


def _with_trained_last(sources: Sequence[Weights]) -> tuple[list[Weights], Weights | None]:
    """The sources, with the source of adapters, or of a run without its base, last; and the latter alone or None.

    What the latter trained replaces another source's, with a message. ValueError if there are two such sources, or if
    a tensor has another shape than the one that it replaces.
    """
    adapted = [source for source in sources if source.lora or (source.trained and set(source.parts) < set(PARTS))]
    if len(adapted) > 1:
        raise ValueError(f"{adapted[0].where} and {adapted[1].where} both hold adapters; give one of them")
    if not adapted:
        return list(sources), None
    own, others = adapted[0], [source for source in sources if source is not adapted[0]]
    _warn_of_base(own, others)
    for source in others:
        both = [path for path in own.leaves if path in source.leaves]
        unfit = [path for path in both if own.leaves[path].shape != source.leaves[path].shape]
        if unfit:
            raise ValueError(f"{own.where} does not fit {source.where}: {', '.join(unfit)} has another shape there")
        for part in dict.fromkeys(path.partition("/")[0] for path in both):
            print(f"the {part} of {own.where} replaces that of {source.where}", file=sys.stderr)
    return [*others, own], own


def _warn_of_base(adapted: Weights, others: Sequence[Weights]) -> None:
    """A warning if PEFT's config names another base than the given folders, or than their repository on the hub.

    A snapshot in the hub's cache is models--OWNER--NAME/snapshots/COMMIT.
    """
    if not adapted.base or not others:
        return
    name = Path(adapted.base).name
    parts = [part for source in others for part in Path(source.where).parts]
    if not any(part == name or part.endswith(f"--{name}") for part in parts):
        given = ", ".join(source.where for source in others)
        print(f"warning: the adapters of {adapted.where} name the base {adapted.base}, not {given}", file=sys.stderr)


def merge_lora(source: Weights) -> Weights:
    """The weights with the adapters added to them. ValueError if there are no adapters."""
    if not source.lora:
        raise ValueError(f"--merge-lora is given, but {source.where} holds no adapters")
    return dataclasses.replace(source, leaves={**source.leaves, **peft.merge(source.leaves, source.lora)}, lora={})


def cast(source: Weights, dtype: torch.dtype) -> Weights:
    """The weights in another dtype. Reading a leaf is a ValueError if a number exceeds the dtype's range."""

    def to(name: str, leaf: Leaf) -> Leaf:
        return Leaf(leaf.shape, dtype, lambda: _rounded(name, leaf.read(), dtype))

    leaves, spare = ({path: to(path, x) for path, x in group.items()} for group in (source.leaves, source.spare))
    adapters = {
        path: (to(f"{path}'s A", a), to(f"{path}'s B", b), scale) for path, (a, b, scale) in source.lora.items()
    }
    return dataclasses.replace(source, leaves=leaves, spare=spare, lora=adapters)


def _rounded(name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    out = t.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(t.dtype).max and (out.isinf() & t.isfinite()).any():
        raise ValueError(f"{name} holds {t.abs().max().item():.4g}, beyond the range of {dtype}; write another dtype")
    return out


def _check_towers(sources: Sequence[Weights]) -> None:
    """ValueError if the image tower is the published one for other images than the one that another source names."""
    given = next((source for source in sources if "vision" in source.parts), None)
    for source in sources:
        image = TOWERS.get(Path(source.tower or "").name)
        if given is None or given is source or given.vision is None or image in (None, given.vision.image):
            continue
        if dataclasses.replace(given.vision, image=image) == Vision(image=image):
            raise ValueError(
                f"{source.where}: mm_vision_tower={source.tower!r} takes images of {image} pixels, {given.where} those "
                f"of {given.vision.image}; give the tower that is named"
            )


def _check_widths(source: Weights) -> None:
    if "projector" in source.parts:
        out, inp = source.leaves["projector/w1"].shape
        for side, width, part in ((inp, source.vision, "vision"), (out, source.llama, "llama")):
            if width is not None and width.width != side:
                raise ValueError(f"{source.where}: the projector fits a {part} of width {side}, not {width.width}")


def config(source: Weights) -> Llava:
    """The config of the whole model. ValueError if the image tower or the decoder is missing."""
    if source.vision is None or source.llama is None:
        missing = [part for part in ("vision", "llama") if getattr(source, part) is None]
        raise ValueError(f"{source.where} does not bring the {' and the '.join(missing)}; name a source for it too")
    return Llava(source.vision, source.llama)


def spec(source: Weights) -> specs.Spec:
    """The declared parameters of the source's parts, in our order."""
    w1 = source.leaves.get("projector/w1")
    parts = {
        "vision": source.vision and tower(source.vision).spec(source.vision),
        "projector": w1 and projector.spec(*reversed(w1.shape)),
        "llama": source.llama and llama.spec(source.llama),
    }
    return {part: params for part, params in parts.items() if params and part in source.parts}


def from_state_dict(tensors: Mapping[str, Tensor], c: Llava) -> TensorDict:
    """The parameters in a state dict of any public layout, such as a `transformers` model's.

    c: the model's config, of which parts that the state dict lacks are not read. ValueError lists what does not fit.
    """
    return load(interpret("the state dict", tensors, Stated(), c))


def load(source: Weights, mesh: Mesh = Mesh()) -> TensorDict:
    """The parameters in memory, locked: this rank's tensor-parallel shard of each leaf, in the dtype of its file.

    Other shards of a mapped file are not read. Adapters are loaded by `adapters`.
    """

    def shard(path: tuple[str, ...], p: specs.Param) -> Tensor:
        own = source.leaves["/".join(path)].read()[specs.shard(p, mesh)].clone()
        source.release()
        return own

    return specs.build(spec(source), shard)


def adapters(
    source: Weights, mesh: Mesh, device: torch.device, dtype: torch.dtype
) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """Path of an adapted weight -> this rank's tensor-parallel shards of a and b, and scale, for lora.attached."""
    params, out = {"/".join(path): (path, p) for path, p in specs.leaves(spec(source))}, {}
    for name, (a, b, scale) in source.lora.items():
        path, p = params[name]
        rows, columns = specs.shard(p, mesh)
        shards = {"a": a.read()[:, columns], "b": b.read()[rows]}
        out[path] = {k: x.to(device, dtype, copy=True) for k, x in shards.items()} | {"scale": torch.tensor(scale)}
        source.release()
    return out
