"""Import of weights: files of any public layout become leaves under our paths, and no tensor is left over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava_fn import lora
from llava_fn import spec as specs
from llava_fn.checkpoint import boxes
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.archive import Archive, open_archive, open_folder
from llava_fn.checkpoint.folder import Checkpoint
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.config import Llama, Llava, Vision
from llava_fn.weights import configs, peft, placing
from llava_fn.weights.companions import image_mode_of
from llava_fn.weights.placing import Tensors

OURS = "llava_fn"
CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
PARTS = ("vision", "projector", "llama")
UNUSED = "unused.safetensors"  # in a checkpoint: tensors that LLaVA never reads, kept for a later export


@dataclass(frozen=True)
class Weights:
    """The content of files or folders of weights. What they do not hold or state is None: a config, a tokenizer."""

    where: str
    layout: str
    leaves: Mapping[str, Leaf]  # "llama/blocks/0/wq" -> leaf
    spare: Mapping[str, Leaf]  # public layouts hold them, LLaVA never reads them
    archives: tuple[Archive, ...]
    vision: Vision | None = None
    llama: Llama | None = None
    lora: peft.Adapters = field(default_factory=dict)
    trained: tuple[str, ...] = ()  # beside the adapters
    base: str | None = None  # what PEFT's config calls the base
    tokenizer: bytes | None = None
    image_mode: str | None = None
    template: str | None = None
    compat: str | None = None  # see text.py

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that it brings, of vision, projector and llama."""
        there = {path.partition("/")[0] for path in self.leaves}
        return tuple(part for part in PARTS if part in there)

    def release(self) -> None:
        """Free the memory of the pages that were read."""
        for archive in self.archives:
            archive.release()


def interpret(where: str, tensors: Tensors, values: configs.Values, given: Llava | None = None) -> Weights:
    """Weights out of named tensors. values: of the config.json beside them. given: the model, if it is known.

    ValueError lists every tensor that is missing, unexpected, duplicate, or of a wrong shape or dtype.
    """
    layout = placing.detect(where, tensors)
    wrong: list[str] = []
    found = placing.sort(tensors, layout, wrong)
    vision = llama = None
    leaves: dict[str, Leaf] = {}
    try:
        configs.check_fixed(values)
        layer = configs.feature_layer(values)
        for place, names in found.items():
            if place.part == "vision":
                beside = given.vision if given else configs.vision_beside(values)
                vision = beside or configs.vision_of(place, names, layer)
            if place.part == "llama":
                llama = given.llama if given else configs.llama_beside(values) or configs.llama_of(place, names)
        if vision is None and layer != -2:
            raise ValueError(f"its projector reads hidden state {layer} of an image tower that it does not bring")
        for place, names in found.items():
            part = placing.leaves(place, names, vision, llama, wrong)
            leaves |= {f"{place.part}/{path}": leaf for path, leaf in part.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(f"{where} ({layout.name}) does not fit its model, {len(wrong)} tensors:\n  {lines}")
    spare = {k: leaf for k, leaf in leaves.items() if vision and placing.is_spare(k, vision)}
    kept = {k: leaf for k, leaf in leaves.items() if k not in spare}
    return _trim(Weights(where, layout.name, kept, spare, (), vision, llama), values)


def _trim(source: Weights, values: configs.Values) -> Weights:
    """Move llava-hf's rows for `<image>`, `<pad>` and padding to `spare`: no id of the text vocabulary needs them."""
    first = values.get("image_token_index", values.get("image_token_id"))
    if source.llama is None or first is None or first >= source.llama.vocab:
        return source
    leaves, spare = dict(source.leaves), dict(source.spare)
    for path in ("llama/embed", "llama/head"):
        if path in leaves:
            whole = leaves[path]
            leaves[path], spare[path] = whole.then(lambda t: t[:first]), whole.then(lambda t: t[first:])
    return dataclasses.replace(source, leaves=leaves, spare=spare, llama=dataclasses.replace(source.llama, vocab=first))


def open_source(path: Path, given: Llava | None = None) -> Weights:
    """The weights of one file or folder; a run folder stands for its newest checkpoint.

    given: the model, where the file does not state it (MindSpeed-MM's model.json). ValueError if it is no file of
    tensors, if its layout is not known, or if any tensor does not fit.
    """
    path = checkpoint.newest(path)
    if path.is_file():
        archive = open_archive(path)
        return _with(interpret(str(path), _model(archive), {}, given), [archive])
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if (path / checkpoint.SUMS).is_file():
        return _ours(checkpoint.open_checkpoint(path, verified=True))
    if (rank := _megatron(path)) is not None:
        return open_source(rank, given)
    return _hugging_face(path, given)


def _model(archive: Archive) -> Tensors:
    """The tensors under "model", as in a checkpoint of Megatron; all tensors if there are none."""
    inner = {name.removeprefix("model/"): t for name, t in archive.tensors.items() if name.startswith("model/")}
    return inner or archive.tensors


def _with(source: Weights, archives: list[Archive], **more: Any) -> Weights:
    return dataclasses.replace(source, archives=tuple(archives), **more)


def _megatron(folder: Path) -> Path | None:
    """The file of Megatron's newest iteration, or None if the folder is not Megatron's.

    ValueError if several ranks wrote it: MindSpeed-MM's LLaVA never ran with tensor or pipeline parallelism.
    """
    tracker = folder / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        step = tracker.read_text().strip()
        folder = folder / (f"iter_{int(step):07d}" if step.isdigit() else step)
        if not folder.is_dir():
            raise ValueError(f"{tracker} names {step!r}, but there is no {folder}")
    ranks = sorted(folder.glob("mp_rank_*/model_optim_rng.pt")) or sorted(folder.glob("model_optim_rng.pt"))
    if len(ranks) > 1:
        raise ValueError(f"{folder} was written by {len(ranks)} ranks; only one rank's is read (tp 1, pp 1)")
    return ranks[0] if ranks else None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object; is it the right file?")
    return values


def _hugging_face(folder: Path, given: Llava | None) -> Weights:
    """A folder with config.json and weights, or PEFT's folder of an adapter."""
    archives = open_folder(folder)
    tensors = {name: t for archive in archives for name, t in archive.tensors.items()}
    files = {name: _json(folder / name) for name in CONFIGS}
    adapter = _json(folder / peft.CONFIG)
    pairs = {name: t for name, t in tensors.items() if ".lora_" in name} if adapter else {}
    rest = {name: t for name, t in tensors.items() if name not in pairs}
    source = Weights(str(folder), "PEFT", {}, {}, ())
    if rest:
        source = interpret(str(folder), rest, files["config.json"], given)
    words = folder / "tokenizer.model"
    whole = {"projector", "llama"} <= set(source.parts)
    return _with(
        source, archives,
        lora=peft.read(folder, adapter, pairs, rest) if adapter else {},
        trained=source.parts if adapter else (),
        base=adapter.get("base_model_name_or_path") or None,
        tokenizer=words.read_bytes() if words.is_file() else None,
        image_mode=image_mode_of({k: v for k, v in files.items() if v}) if whole else None,
        template="v1" if whole else None,
    )  # fmt: skip


def is_adapter(path: Path) -> bool:
    """Whether it is a run, or a checkpoint of one, that trained adapters."""
    path = checkpoint.newest(path)
    return (path / checkpoint.SUMS).is_file() and checkpoint.read_manifest(path).lora is not None


def open_adapter(path: Path, base: Path) -> Weights:
    """The adapters of a PEFT folder or of a run, with what was trained beside them, and without the run's base.

    ValueError if it holds no adapters, or if it was trained on another base than the checkpoint or run `base`.
    """
    path = checkpoint.newest(path)
    if not (path / checkpoint.SUMS).is_file():
        source = open_source(path)
    else:
        c, there = checkpoint.open_checkpoint(path, verified=True), checkpoint.newest(base)
        own = c.manifest.base
        if own and (there / checkpoint.SUMS).is_file() and checkpoint.fingerprint(there) != own.fingerprint:
            raise ValueError(f"{path} was trained on {own.path}, and {there} is another base")
        source = _ours(c, alone=True)
    if not source.lora:
        raise ValueError(f"{path} holds no adapters; name a PEFT folder, or a run that trained some")
    return source


def _ours(c: Checkpoint, alone: bool = False) -> Weights:
    """A checkpoint of ours, with the missing parts from its base, unless it is wanted alone."""
    m = c.manifest
    unused = open_archive(c.folder / UNUSED) if (c.folder / UNUSED).is_file() else None
    own, archives = _leaves(c)
    leaves = {path: leaf for path, leaf in own.items() if not path.startswith(f"{lora.PART}/")}
    spare = {name: Leaf.of(t) for name, t in unused.tensors.items()} if unused else {}
    archives = ([unused] if unused else []) + archives
    if not alone and c.base:
        base = _ours(c.base)
        archives += base.archives
        leaves |= {path: leaf for path, leaf in base.leaves.items() if not specs.under(path.split("/"), m.parts)}
        spare = {**base.spare, **spare}
    return Weights(
        str(c.folder), OURS, leaves, spare, tuple(archives), m.model.vision, m.model.llama, _adapters(c, own),
        tuple(part for part in m.parts if part != lora.PART), None, c.tokenizer, m.image_mode, m.template, m.compat,
    )  # fmt: skip


def _adapters(c: Checkpoint, own: Mapping[str, Leaf]) -> dict[str, tuple[Leaf, Leaf, float]]:
    """Path of an adapted weight -> A, B and scale, of a checkpoint that holds adapters, or of its base."""
    if c.manifest.lora is None:
        return {}
    paths = [path.removesuffix("/a") for path in own if path.startswith(f"{lora.PART}/") and path.endswith("/a")]
    scale = c.manifest.lora.scale
    return {path.removeprefix(f"{lora.PART}/"): (own[f"{path}/a"], own[f"{path}/b"], scale) for path in paths}


def _leaves(c: Checkpoint) -> tuple[dict[str, Leaf], list[Archive]]:
    """The leaves that the checkpoint itself holds, and the files that are mapped for them.

    A leaf that several ranks wrote is assembled when it is read.
    """
    params = [(path, p.shape) for path, p in specs.leaves(checkpoint.spec_of(c.manifest))]
    if (c.folder / boxes.INDEX).is_file():
        read = c.tensors.read
        return {"/".join(k): Leaf(shape, torch.float32, partial(read, "params", k)) for k, shape in params}, []
    archive = c.tensors.archive(boxes.file_of("params", None))
    return {(name := "/".join(path)): Leaf.of(archive.tensors[name]) for path, _ in params}, [archive]
