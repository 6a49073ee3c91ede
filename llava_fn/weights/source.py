"""Import of weights: files of any public layout become leaves under our paths; no tensor is ignored silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llava_fn import fields, lora
from llava_fn import spec as specs
from llava_fn.checkpoint import boxes
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.archive import Archive, open_archive, open_download, open_folder
from llava_fn.checkpoint.folder import Checkpoint
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.config import Llama, Llava, Vision
from llava_fn.weights import configs, peft, peft_config, placing, vocabulary
from llava_fn.weights.configs import Stated
from llava_fn.weights.image_processor import image_mode_of
from llava_fn.weights.placing import Tensors

OURS = "llava_fn"
CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", peft.CONFIG)
PARTS = ("vision", "projector", "llama")
SHOWN = 100  # tensors that an error lists
UNUSED = "unused.safetensors"  # file of a checkpoint with the spare leaves, for a later export


@dataclass(frozen=True)
class Weights:
    """The content of files or folders of weights; None for what they lack."""

    where: str
    layout: str
    leaves: Mapping[str, Leaf]  # "llama/blocks/0/wq" -> leaf
    spare: Mapping[str, Leaf]  # leaves of public layouts that LLaVA does not read
    archives: tuple[Archive, ...]
    vision: Vision | None = None
    llama: Llama | None = None
    lora: peft.Adapters = field(default_factory=dict)
    trained: tuple[str, ...] = ()  # parts that were trained together with the adapters
    base: str | None = None  # name of the base in PEFT's config
    tower: str | None = None  # name of the image tower in LLaVA's config
    tokenizer: bytes | None = None
    image_mode: str | None = None
    template: str | None = None
    compat: str | None = None  # see data/text.py
    image_reading: str | None = None  # see data/options.py

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that have leaves."""
        held = {path.partition("/")[0] for path in self.leaves}
        return tuple(part for part in PARTS if part in held)

    def release(self) -> None:
        """Free the memory of the pages that were read."""
        for archive in self.archives:
            archive.release()


def interpret(
    where: str, tensors: Tensors, stated: Stated, c: Llava | None = None, archives: Sequence[Archive] = ()
) -> Weights:
    """The weights that named tensors hold. stated: what their config.json says. c: the model, if known.

    archives: the files of the tensors, whose sums are checked when a leaf is read. ValueError lists every tensor that
    is missing, unexpected, duplicate, or of a wrong shape or dtype.
    """
    layout = placing.detect(where, tensors)
    wrong: list[str] = []
    slots = placing.assign(tensors, layout, wrong)
    vision = llama = None
    leaves: dict[str, Leaf] = {}
    try:
        for slot, own in slots.items():
            if slot.part == "vision":
                config = c.vision if c else stated.vision
                vision = config or configs.vision_from_shapes(slot, own, stated.layer)
            if slot.part == "llama":
                llama = c.llama if c else stated.llama or configs.llama_from_shapes(slot, own)
        if vision is None and stated.layer != -2:
            raise ValueError(
                f"the projector reads hidden state {stated.layer} of an image tower that is not in the source"
            )
        if vision is None and stated.tower_trained:
            raise ValueError("unfreeze_mm_vision_tower=true: its image tower was trained, and is not in the source")
        for slot, own in slots.items():
            part = placing.leaves(slot, own, vision, llama, wrong, partial(_check, archives))
            leaves |= {f"{slot.part}/{path}": leaf for path, leaf in part.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        lines = "\n  ".join(wrong[:SHOWN] + more)
        raise ValueError(f"{where} ({layout.name}) does not fit its model, {len(wrong)} tensors:\n  {lines}")
    spare = {k: leaves.pop(k) for k in list(leaves) if vision and placing.is_spare(k, vision)}
    return trimmed(Weights(where, layout.name, leaves, spare, tuple(archives), vision, llama), stated.image_row)


def _check(archives: Sequence[Archive], t: Tensor) -> None:
    for archive in archives:
        archive.check(t)


def trimmed(source: Weights, first: int | None) -> Weights:
    """The weights with the rows of the vocabulary from `first` on in `spare`: `<image>`, `<pad>` and padding."""
    if source.llama is None or first is None or first >= source.llama.vocab:
        return source
    leaves, spare = dict(source.leaves), dict(source.spare)
    for path in ("llama/embed", "llama/head"):
        if path in leaves:
            if path in spare:
                row = f"image_token_index={source.llama.vocab}, but its tokenizer has {first} pieces"
                raise ValueError(f"{source.where}: {row}; give the tokenizer that the decoder was trained with")
            whole = leaves[path]
            leaves[path], spare[path] = whole.then(lambda t: t[:first]), whole.then(lambda t: t[first:])
    return dataclasses.replace(source, leaves=leaves, spare=spare, llama=dataclasses.replace(source.llama, vocab=first))


def open_source(path: Path, c: Llava | None = None) -> Weights:
    """The weights of a file or folder; of a run folder, those of its newest checkpoint.

    c: the model, if the source does not state it (from MindSpeed-MM's model.json). ValueError if the file holds no
    tensors, has an unknown layout, or holds a tensor that does not fit.
    """
    path = checkpoint.newest(path)
    if path.is_file():
        archive = open_download(path)
        return interpret(str(path), _model(archive), Stated(), c, [archive])
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if checkpoint.is_checkpoint(path):
        return _from_checkpoint(checkpoint.open_checkpoint(path, verified=True))
    if (rank := _megatron(path)) is not None:
        return open_source(rank, c)
    return _hugging_face(path, c)


def _model(archive: Archive) -> Tensors:
    """The tensors under "model", as in Megatron's checkpoints, or else all tensors."""
    inner = {name.removeprefix("model/"): t for name, t in archive.tensors.items() if name.startswith("model/")}
    return inner or archive.tensors


def _megatron(folder: Path) -> Path | None:
    """The file of the newest iteration in Megatron's folder; None if the folder is not Megatron's.

    ValueError if several ranks wrote the iteration: MindSpeed-MM's LLaVA has no tensor or pipeline parallelism.
    """
    tracker = folder / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        step = tracker.read_text().strip()
        folder = folder / (f"iter_{int(step):07d}" if step.isdigit() else step)
        if not folder.is_dir():
            raise ValueError(f"{tracker} names {step!r}, but there is no {folder}")
    ranks = sorted(folder.glob("mp_rank_*/model_optim_rng.pt")) or sorted(folder.glob("model_optim_rng.pt"))
    if len(ranks) > 1:
        raise ValueError(f"{folder} was written by {len(ranks)} ranks; only one is supported (tp 1, pp 1)")
    return ranks[0] if ranks else None


def _hugging_face(folder: Path, c: Llava | None) -> Weights:
    """The weights of a folder with config.json, or of a PEFT folder of adapters."""
    archives = open_folder(folder)
    tensors = {name: t for archive in archives for name, t in archive.tensors.items()}
    files = {name: fields.load(folder / name) for name in CONFIGS if (folder / name).is_file()}
    is_peft = peft.CONFIG in files
    adapter = peft_config.read(folder / peft.CONFIG, files[peft.CONFIG]) if is_peft else {}
    if is_peft:
        for t in tensors.values():
            _check(archives, t)  # all of a PEFT folder is read at once
    adapters, rest = peft.read(folder, adapter, tensors) if is_peft else ({}, tensors)
    if is_peft:
        files.get("config.json", {}).pop("quantization_config", None)  # of the base in QLoRA; not of this folder
    stated = configs.stated(folder / "config.json", files.get("config.json", {}))
    source = Weights(str(folder), "PEFT", {}, {}, tuple(archives))
    source = interpret(str(folder), rest, stated, c, archives) if rest else source
    whole = {"projector", "llama"} <= set(source.parts)
    mode = image_mode_of(folder, files, stated.image_mode, stated.vision)
    return dataclasses.replace(
        source,
        lora=adapters,
        trained=source.parts if is_peft else (),
        base=adapter.get("base_model_name_or_path") or None,
        tower=stated.tower,
        tokenizer=vocabulary.read(folder, stated.tokens),
        image_mode=mode if whole or (is_peft and stated.image_mode) else None,  # LLaVA's adapters have it too
        template="v1" if whole else None,
    )


def has_base(path: Path) -> bool:
    """Whether it is a run, or a checkpoint of one, that goes on from a base."""
    path = checkpoint.newest(path)
    return checkpoint.is_checkpoint(path) and checkpoint.read_manifest(path).base is not None


def open_trained(path: Path, base: Path) -> Weights:
    """What a run of ours trained, adapters or parts, without its base, which may have moved since.

    ValueError if it was trained on another base than the checkpoint or run `base`.
    """
    path, base = checkpoint.newest(path), checkpoint.newest(base)
    c = checkpoint.open_checkpoint(path, verified=True)
    own = c.manifest.base
    if own and checkpoint.is_checkpoint(base) and checkpoint.fingerprint(base) != own.fingerprint:
        raise ValueError(f"{path} was trained on {own.path}, and {base} is another base")
    return _from_checkpoint(c, with_base=False)


def open_sources(paths: Sequence[Path], c: Llava | None = None) -> list[Weights]:
    """The weights of each path. A run of ours beside other weights stands for what it trained alone.

    c: as of `open_source`. ValueError as of `open_source` and `open_trained`.
    """
    runs = [path for path in paths if len(paths) > 1 and has_base(path)]
    bases = [path for path in paths if path not in runs] or runs[:1]
    others = [path for path in runs if path not in bases]
    return [open_source(path, c) for path in bases] + [open_trained(path, bases[0]) for path in others]


def open_adapter(path: Path, base: Path) -> Weights:
    """The adapters of a PEFT folder or of a run, and the other parts trained with them, without the base.

    ValueError if there are no adapters, or as of `open_trained`.
    """
    source = open_trained(path, base) if checkpoint.is_checkpoint(checkpoint.newest(path)) else open_source(path)
    if not source.lora:
        raise ValueError(f"{path} holds no adapters; name a PEFT folder, or a run that trained some")
    return source


def _from_checkpoint(c: Checkpoint, with_base: bool = True) -> Weights:
    """The weights of a checkpoint of ours; the parts that it lacks come from its base."""
    m = c.manifest
    unused = [open_archive(c.folder / UNUSED)] if (c.folder / UNUSED).is_file() else []
    own, archives = _leaves(c)
    leaves = {path: leaf for path, leaf in own.items() if not path.startswith(f"{lora.PART}/")}
    spare = {name: Leaf.of(t) for archive in unused for name, t in archive.tensors.items()}
    archives = unused + archives
    if with_base and c.base:
        base = _from_checkpoint(c.base)
        archives += base.archives
        leaves |= {path: leaf for path, leaf in base.leaves.items() if not specs.under(path.split("/"), m.parts)}
        spare = {**base.spare, **spare}
    return Weights(
        str(c.folder), OURS, leaves, spare, tuple(archives), m.model.vision, m.model.llama, _adapters(c, own),
        tuple(part for part in m.parts if part != lora.PART), tokenizer=c.tokenizer, image_mode=m.image_mode,
        template=m.template, compat=m.compat, image_reading=m.image_reading,
    )  # fmt: skip


def _adapters(c: Checkpoint, own: Mapping[str, Leaf]) -> dict[str, tuple[Leaf, Leaf, float]]:
    """Path of an adapted weight -> A, B and scale, of the checkpoint's adapters."""
    if c.manifest.lora is None:
        return {}
    paths = [path.removesuffix("/a") for path in own if path.startswith(f"{lora.PART}/") and path.endswith("/a")]
    scale = c.manifest.lora.scale
    return {path.removeprefix(f"{lora.PART}/"): (own[f"{path}/a"], own[f"{path}/b"], scale) for path in paths}


def _leaves(c: Checkpoint) -> tuple[dict[str, Leaf], list[Archive]]:
    """The leaves of the checkpoint without its base, and their mapped files.

    A leaf that several ranks wrote is assembled when it is read.
    """
    params = [(path, p.shape) for path, p in specs.leaves(checkpoint.spec_of(c.manifest))]
    if (c.folder / boxes.INDEX).is_file():
        read = c.tensors.read
        return {"/".join(k): Leaf(shape, torch.float32, partial(read, "params", k)) for k, shape in params}, []
    archive = c.tensors.archive(boxes.file_of("params", None))
    return {(name := "/".join(path)): Leaf.of(archive.tensors[name]) for path, _ in params}, [archive]
