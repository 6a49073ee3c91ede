"""Export of weights: leaves under the names of another layout, written one tensor at a time, and configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint import leaf
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.config import Llava
from llava_fn.weights import companions, model, peft, placing, tables
from llava_fn.weights.source import OURS, UNUSED, Weights
from llava_fn.weights.tables import Rule

LAYOUTS = (OURS, *tables.WRITTEN)


def _join(rule: Rule, leaves: Mapping[str, Leaf], part: str) -> Leaf:
    """The tensor of a rule, computed from our leaves when it is read."""
    ours = [leaves[f"{part}/{path}"] for path in rule.ours]
    shape = placing.their_shape(rule, {path: o.shape for path, o in zip(rule.ours, ours, strict=True)})
    return Leaf(shape, ours[0].dtype, lambda: rule.reshape.join(*[o.read() for o in ours]))


def names(layout: str, source: Weights, c: Llava) -> dict[str, Leaf]:
    """Name in the layout -> leaf, for every tensor of the layout. ValueError names a part that the source lacks."""
    leaves, out = {**source.spare, **source.leaves}, {}
    for slot in tables.WRITTEN[layout]:
        if slot.part not in source.parts:
            raise ValueError(f"{source.where} does not bring the {slot.part}, part of {layout}; name its source too")
        for rule in slot.rules(c):
            if f"{slot.part}/{rule.ours[0]}" in leaves:  # a tied decoder has no head; a source may lack spare leaves
                out[slot.prefix + rule.theirs] = _join(rule, leaves, slot.part)
    return out


def _padded(source: Weights, rows: int) -> dict[str, Leaf]:
    """The embedding and the head with `rows` rows, the added ones from the llava-hf source, or else their mean.

    The mean of all rows is what HF's script takes; it adds noise of 1e-5 variances.
    """
    out = {}
    for path in {"llama/embed", "llama/head"} & source.leaves.keys():
        text, added = source.leaves[path], source.spare.get(path)
        if added is None or text.shape[0] + added.shape[0] != rows:
            added = text.then(lambda t: _mean_row(t).expand(rows - t.shape[0], -1))
        shape = (rows, text.shape[1])
        out[path] = Leaf(shape, text.dtype, lambda text=text, added=added: torch.cat([text.read(), added.read()]))
    return out


def _mean_row(t: Tensor) -> Tensor:
    """The mean of all rows, summed in fp32 chunk by chunk, without an fp32 copy of t."""
    if t.is_meta:
        return t[0]
    return (reduce(torch.add, (part.float().sum(0) for part in t.split(4096))) / len(t)).to(t.dtype)


def _complete(source: Weights, c: Llava) -> tuple[Weights, Llava]:
    """The weights with CLIP's last norm and the config with the source's number of blocks, which HF's code expects.

    If the source lacks the norm, it becomes the identity; LLaVA does not read it.
    """
    blocks = {path.split("/")[2] for path in (*source.leaves, *source.spare) if path.startswith("vision/blocks/")}
    vision = dataclasses.replace(c.vision, blocks=len(blocks), feature_layer=c.vision.used - len(blocks) - 1)
    width, dtype = (vision.width,), source.leaves["vision/norm_g"].dtype
    norm = {
        "vision/post_g": Leaf(width, dtype, lambda: torch.ones(width, dtype=dtype)),
        "vision/post_b": Leaf(width, dtype, lambda: torch.zeros(width, dtype=dtype)),
    }
    return dataclasses.replace(source, spare=norm | dict(source.spare)), dataclasses.replace(c, vision=vision)


def size(source: Weights) -> int:
    """Bytes of all leaves, for a progress bar."""
    return sum(x.nbytes for x in (*source.leaves.values(), *source.spare.values()))


def export(source: Weights, to: Path, layout: str, progress: Callable[[int], None] = lambda n: None) -> None:
    """Write `source` in a layout of `LAYOUTS` or tables.PEFT to the folder `to`, or to a file for mm_projector.

    `to` must not exist, and appears complete or not at all. progress: called with the size of each written tensor, in
    bytes. ValueError if the source lacks a part of the layout or a tokenizer; OSError if the disk is full.
    """
    if to.exists():
        raise ValueError(f"{to} exists; name another place, or remove it")
    if layout in tables.PEFT:
        _adapter(source, to, layout)
        return
    if source.lora:
        raise ValueError(
            f"{source.where} holds LoRA adapters; give --merge-lora to add them to the weights, or --to peft to write "
            "only the adapters"
        )
    if layout == "mm_projector":
        with checkpoint.appearing(to) as part, part.open("wb") as f:
            torch.save({name: x.read().clone() for name, x in names(layout, source, Llava()).items()}, f)
        return
    _check_delta(source)
    if source.tokenizer is None:
        raise ValueError(f"{source.where} has no tokenizer.model; give one with --tokenizer")

    def done(size: int) -> None:
        source.release()
        progress(size)

    with checkpoint.appearing(to) as part:
        part.mkdir()
        write = _ours if layout == OURS else partial(_theirs, layout)
        write(source, source.tokenizer, part, done)


def _check_delta(source: Weights) -> None:
    """ValueError if all norm weights of the decoder are near 0, as in the difference of two models."""
    norms = [leaf.read() for path, leaf in source.leaves.items() if path.startswith("llama/") and "norm" in path]
    if norms and not norms[0].is_meta and all(norm.float().abs().max() < 0.01 for norm in norms):
        raise ValueError(f"{source.where} is a delta, not a model: all its norms are near 0; add it to its base first")


def _adapter(source: Weights, to: Path, style: str) -> None:
    """Write the adapters and a trained projector. PEFT saves a module or adapts it, so a projector's are merged."""
    inside = {k: x for k, x in source.lora.items() if "projector" in source.trained and k.startswith("projector/")}
    adapters = {k: x for k, x in source.lora.items() if k not in inside}
    others = [part for part in source.trained if part != "projector"]
    if not adapters or others:
        why = f"{', '.join(others)} was trained too" if others else "there are no adapters"
        raise ValueError(f"{source.where}: {style} is for adapters and a projector, and {why}; write a whole layout")
    leaves = {**source.leaves, **peft.merge(source.leaves, inside)}.items() if "projector" in source.trained else ()
    projector = {path.removeprefix("projector/"): x for path, x in leaves if path.startswith("projector/")}
    blocks = source.llama.blocks if source.llama else None
    with checkpoint.appearing(to) as part:
        part.mkdir()
        peft.write(part, adapters, projector, style, source.archives, blocks)
        if style == "peft-liuhaotian":
            (part / "config.json").write_bytes(_whole_config(source))


def _whole_config(source: Weights) -> bytes:
    """The whole model's config.json, which LLaVA's builder.py reads from a folder of adapters."""
    if source.tokenizer is None or source.vision is None or source.llama is None:
        raise ValueError(
            f"{source.where}: LLaVA's code wants the whole model's config.json in a folder of adapters; name the "
            "sources of the image tower and the decoder too, and a --tokenizer if they have none"
        )
    dtype = source.leaves["llama/embed"].dtype
    files = companions.liuhaotian(model.config(source), dtype, source.tokenizer, source.image_mode or "square")
    return files["config.json"]


def _ours(source: Weights, tokenizer: bytes, part: Path, progress: Callable[[int], None]) -> None:
    c = model.config(source)
    files = {"params.safetensors": source.leaves} | ({UNUSED: source.spare} if source.spare else {})
    digests = {name: leaf.write(part / name, leaves, source.archives, progress) for name, leaves in files.items()}
    modes = source.image_mode or "square", source.template or "plain", source.compat
    reading = source.image_reading or "original"
    manifest = checkpoint.Manifest(c, source.parts, *modes, image_reading=reading)
    checkpoint.seal(part, manifest, tokenizer, digests)


def _theirs(layout: str, source: Weights, tokenizer: bytes, part: Path, progress: Callable[[int], None]) -> None:
    source, c = _complete(source, model.config(source))
    dtype = source.leaves["llama/embed"].dtype
    image_mode, template = source.image_mode or "square", source.template or "plain"
    if layout == "llava-hf":
        leaves = {**source.leaves, **_padded(source, companions.padded(c.llama.vocab))}
        source = dataclasses.replace(source, leaves=leaves)
        files = companions.llava_hf(c, dtype, tokenizer, image_mode, template)
    else:
        files = companions.liuhaotian(c, dtype, tokenizer, image_mode)
    leaf.write(part / "model.safetensors", names(layout, source, c), source.archives, progress)
    for name, content in files.items():
        (part / name).write_bytes(content)
