"""Where a run's model comes from: a base checkpoint, or a config and a tokenizer, with random weights."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, llava, lora, spec, tree
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.folder import Base, Checkpoint
from llava_fn.config import Llava, Parallel, differences, plain
from llava_fn.data.options import Data
from llava_fn.data.records import check_share
from llava_fn.data.tokenizer import Tokenizer, open_tokenizer, read_tokenizer
from llava_fn.launch.processes import check_processes
from llava_fn.linear import Kind
from llava_fn.parallel.zero import Zero
from llava_fn.runs.progress import Bytes
from llava_fn.train import kept, trains
from llava_fn.weights import export, model
from llava_fn.weights.export import OURS
from llava_fn.weights.source import open_sources


@dataclass(frozen=True)
class Origin:
    """The model and the tokenizer of a run, and the base that brings both, if there is one."""

    model: Llava
    words: Path | bytes  # a sentencepiece model: its file, or its content
    base: Checkpoint | None

    @property
    def record(self) -> Base | None:
        """What a manifest says of the base."""
        return Base(str(self.base.folder.resolve()), self.base.fingerprint) if self.base else None

    def holder(self, path: tree.Path) -> Checkpoint | None:
        """The checkpoint that holds a parameter: the base, or the base's own base. None: it starts at random."""
        return self.base and self.base.holder(path)

    @property
    def random(self) -> tuple[str, ...]:
        """The parts that begin with random weights."""
        whole = llava.spec(self.model)
        return tuple(dict.fromkeys(path[0] for path, _ in spec.leaves(whole) if self.holder(path) is None))

    def check(self, data: Data, parallel: Parallel, recompute: bool, backend: str) -> None:
        """ValueError on every process for sizes that this launch cannot run, before any process waits for another."""
        count = check_processes(parallel.tp)
        llama.check_tp(self.model.llama, parallel.tp)
        llava.execution(recompute, backend, Zero(level=parallel.zero), vision=self.model.vision)
        if not data.tokens:
            check_share(data.samples, data.accumulate, count, parallel.tp)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. ValueError if it is not that of the base, or the model's vocabulary is too small for it."""
        words = read_tokenizer(self.words) if isinstance(self.words, Path) else open_tokenizer(self.words)
        if self.base and words.model != self.base.tokenizer:
            raise ValueError(f"the base {self.base.folder} brings another tokenizer than {self.words}; give only one")
        if words.vocab_size > self.model.llama.vocab:
            have, room = words.vocab_size, self.model.llama.vocab
            raise ValueError(f"the tokenizer has {have} pieces, but llama.vocab is only {room}")
        return words

    def parameters(
        self, zero: Zero, seed: int, device: torch.device, kind: Kind | None = None
    ) -> tuple[TensorDict, TensorDict]:
        """(trainable, frozen): this rank's share of the base's weights, and of random ones for the parts it lacks.

        Both as train.kept says. ValueError if a frozen part has no weights to load.
        """
        trained = trains(zero.train)
        odd = [part for part in zero.train if not any(spec.under(path, [part]) for path, _ in spec.leaves(zero.spec))]
        if odd:
            raise ValueError(f"train names {', '.join(odd)}, which the model lacks; it has {', '.join(zero.spec)}")
        frozen = [path[0] for path, _ in spec.leaves(zero.spec) if self.holder(path) is None and not trained(path)]
        if frozen:
            names = ", ".join(dict.fromkeys(frozen))
            raise ValueError(f"{names} is not trained, and no base brings it; give a base, or train all parts")

        def leaf(path: tree.Path, p: spec.Param) -> Tensor | TensorDict:
            if (holder := self.holder(path)) is not None:
                box = tuple((s.start, s.stop) for s in spec.shard(p, zero.mesh))
                x = holder.tensors.read("params", path, box)
            else:
                x = spec.fresh(path, p, seed, zero.mesh)
            return kept(path, p, x.to(device), zero, kind)

        # leaf by leaf, so that a rank holds little more than its share; in the model's order, in which sums are taken
        return tree.split(spec.build(zero.spec, leaf), trained)

    def whole(self, path: Path, device: torch.device) -> TensorDict:
        """All parameters in fp32: those of the run's checkpoint at `path`, and of the base what that lacks."""
        own = checkpoint.open_checkpoint(path)

        def leaf(path: tree.Path, p: spec.Param) -> Tensor:
            holder = own if spec.under(path, own.manifest.parts) else self.holder(path)
            assert holder is not None  # a run saves what it trains, and its base holds the rest
            return holder.tensors.read("params", path).to(device, torch.float32)

        return lora.attach(
            spec.build(lora.extended(llava.spec(self.model), own.manifest.lora), leaf), own.manifest.lora
        )


def open_origin(model: Llava | None, words: Path | None, base: Path | None) -> Origin:
    """The origin that a config names. base: a checkpoint, or a run, whose newest checkpoint is meant.

    ValueError if model or tokenizer are given neither by a base nor beside it, or beside it and differ.
    """
    if base is None:
        if model is None or words is None:
            raise ValueError("give a base, which brings model and tokenizer, or a model and a tokenizer")
        return Origin(model, words, None)
    base = checkpoint.newest(base)
    if not checkpoint.is_checkpoint(base):
        raise ValueError(f"{base} is not a checkpoint of llava_fn; recipes/convert.py makes one")
    opened = checkpoint.open_checkpoint(base)
    if model and (other := differences(plain(opened.manifest.model), plain(model))):
        lines = "\n  ".join(other)
        raise ValueError(f"the base {base} brings another model than the config (base -> config):\n  {lines}")
    return Origin(opened.manifest.model, words or opened.tokenizer, opened)


def adopt(paths: Sequence[Path], folder: Path) -> Origin:
    """The origin of a run that goes on from weights of any layout: a run's folder, a checkpoint, files and folders.

    What is no checkpoint of ours is converted once, to a folder beside `folder` that is named by the paths. ValueError
    if the weights hold adapters, which a run cannot go on from, or lack the image tower, the decoder or a tokenizer.
    """
    if not paths:
        raise ValueError("give a base: a run's folder, a checkpoint, or weights of any layout")
    path = checkpoint.newest(paths[0])
    if len(paths) > 1 or not checkpoint.is_checkpoint(path):
        names = " ".join(str(path.resolve()) for path in paths)
        path = folder.with_name(f"{folder.name}-{zlib.crc32(names.encode()):08x}")
        if not path.exists():
            weights = model.merge(open_sources(paths))
            print(f"{weights.where}: converted once, to {path}", file=sys.stderr)
            with Bytes(export.size(weights)) as progress:
                export.export(weights, path, OURS, progress.add)
    origin = open_origin(None, None, path)
    assert origin.base is not None  # it was opened with one
    if any(under.manifest.lora for under in origin.base.chain()):
        raise ValueError(f"{path} holds adapters; `recipes/convert.py {path} OUT --merge-lora` makes a base of it")
    return origin
