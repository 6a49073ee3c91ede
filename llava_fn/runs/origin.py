"""Where a run's model comes from: a base checkpoint, or a config and a tokenizer, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, llava, spec, tree
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.folder import Base, Checkpoint
from llava_fn.config import STAGES, Llava, Parallel, Stage
from llava_fn.data.options import Data
from llava_fn.data.records import check_share
from llava_fn.data.tokenizer import Tokenizer, open_tokenizer, read_tokenizer
from llava_fn.launch.processes import check_processes
from llava_fn.parallel.zero import Zero
from llava_fn.train import trains


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

    @cached_property
    def holders(self) -> dict[str, Checkpoint]:
        """Part of the model -> the checkpoint that holds it: the base, or the base's own base."""
        return self.base.holders() if self.base else {}

    @property
    def random(self) -> tuple[str, ...]:
        """The parts that begin with random weights."""
        return tuple(part for part in llava.spec(self.model) if part not in self.holders)

    def check(self, data: Data, parallel: Parallel, recompute: bool, backend: str) -> None:
        """ValueError on every process for sizes that this launch cannot run, before any process waits for another."""
        count = check_processes(parallel.tp)
        llama.check_tp(self.model.llama, parallel.tp)
        llava.execution(recompute, backend, Zero(level=parallel.zero), vision=self.model.vision)
        if not data.tokens:
            check_share(data.samples, data.accumulate, count, parallel.tp)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. ValueError if the vocabulary of the model is too small for its ids."""
        words = read_tokenizer(self.words) if isinstance(self.words, Path) else open_tokenizer(self.words)
        if words.vocab_size > self.model.llama.vocab:
            have, room = words.vocab_size, self.model.llama.vocab
            raise ValueError(f"the tokenizer has {have} pieces, but llama.vocab is only {room}")
        return words

    def parameters(self, train: Stage, seed: int, zero: Zero, device: torch.device) -> tuple[TensorDict, TensorDict]:
        """(trainable, frozen): this rank's share of the base's weights, and of random ones for the parts it lacks.

        trainable: fp32, sharded as `zero` says. frozen: tensor-parallel blocks in the dtype of `zero`. ValueError if a
        frozen part has no weights to load.
        """
        trained = trains(train)
        names = ", ".join(part for part in self.random if part not in STAGES[train])
        if names:
            raise ValueError(f"train={train} does not train {names}, which no base brings; give a base, or train=all")

        def leaf(path: tree.Path, p: spec.Param) -> Tensor:
            if path[0] in self.holders:
                box = tuple((s.start, s.stop) for s in spec.shard(p, zero.mesh))
                x = self.holders[path[0]].tensors.read("params", path, box)
            else:
                x = spec.fresh(path, p, seed, zero.mesh)
            return zero.keep(p, x).to(device, torch.float32) if trained(path) else x.to(device, zero.dtype)

        # leaf by leaf, so that a rank holds little more than its share; in the model's order, in which sums are taken
        return tree.split(spec.build(zero.spec, leaf), trained)

    def whole(self, path: Path, device: torch.device) -> TensorDict:
        """All parameters in fp32: those of the run's checkpoint at `path`, and of the base what that lacks."""
        own = checkpoint.open_checkpoint(path)
        holders = self.holders | dict.fromkeys(own.manifest.parts, own)
        return spec.build(
            llava.spec(self.model),
            lambda path, _: holders[path[0]].tensors.read("params", path).to(device, torch.float32),
        )


def open_origin(model: Llava | None, words: Path | None, base: Path | None) -> Origin:
    """The origin that a config names. ValueError if model and tokenizer are given twice or not at all."""
    if base is None and model is not None and words is not None:
        return Origin(model, words, None)
    if base is None or model is not None or words is not None:
        raise ValueError("give a base, which brings model and tokenizer, or a model and a tokenizer; not both")
    if not (base / checkpoint.SUMS).is_file():
        raise ValueError(f"{base} is not a checkpoint: it has no {checkpoint.SUMS}; recipes/convert.py makes one")
    opened = checkpoint.open_checkpoint(base)
    return Origin(opened.manifest.model, opened.tokenizer, opened)
