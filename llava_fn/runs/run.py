"""A run and its folder: what stands in it, how it starts, saves, and goes on after it was stopped at any instant.

    run/config.json          the config; `--config run/config.json` starts from it
    run/environment.json     versions, device, Ascend variables
    run/metrics.jsonl        one row an update
    run/skipped.jsonl        one row a record that was left out
    run/checkpoints/000100   see llava_fn/checkpoint/folder.py
    run/log/rank-00001.log   what a process other than the first one says
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, llava, optim, spec, tree
from llava_fn.checkpoint import boxes, shares
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.boxes import Piece
from llava_fn.checkpoint.folder import Base, Manifest
from llava_fn.config import Llava, differences, plain
from llava_fn.data.text import Tokenizer
from llava_fn.launch.device import environment
from llava_fn.launch.processes import Joined
from llava_fn.parallel.zero import Zero
from llava_fn.runs import report
from llava_fn.runs.options import Saving
from llava_fn.train import TrainState, trains
from llava_fn.weights import model as weights
from llava_fn.weights.source import open_source

SHARE_SECONDS = 600.0  # that the first process waits for the others' parts of a checkpoint


@dataclass(frozen=True)
class Start:
    """What a run begins with: what it trains, what it does not, and what the ids and images mean."""

    model: Llava
    tokenizer: Tokenizer
    trainable: TensorDict  # fp32, as `zero` keeps it
    frozen: TensorDict  # this rank's tensor-parallel blocks, in the dtype of `zero`
    base: Base | None
    random: tuple[str, ...]  # parts that begin with random weights
    zero: Zero


def model_of(model: Llava | None, base: Path | None, tokenizer: Path | None) -> Llava:
    """The model of a run. ValueError if model and tokenizer stand in two places or in none."""
    if (base is None) == (model is None) or (base is None) == (tokenizer is None):
        raise ValueError("give a base, which brings model and tokenizer, or a model and a tokenizer; not both")
    if base is not None and not (base / checkpoint.SUMS).is_file():
        raise ValueError(f"{base} is not a checkpoint: it has no {checkpoint.SUMS}; recipes/convert.py makes one")
    return model or checkpoint.read_manifest(base).model


def start(
    model: Llava | None, base: Path | None, tokenizer: Path | None, train: str, seed: int, device: torch.device,
    zero: Zero = Zero(),
) -> Start:  # fmt: skip
    """Weights of the base, random ones for the parts that it lacks. zero: how they are kept; its spec is not read.

    ValueError if model and tokenizer stand in two places or in none, if the vocabulary is too small for the ids, if a
    part would be random for ever, and if the decoder does not divide over the mesh.
    """
    model, origin = model_of(model, base, tokenizer), None
    if base is None:
        words = Tokenizer.load(tokenizer)
    else:
        brought = open_source(base)
        words, origin = Tokenizer.from_bytes(brought.tokenizer), Base(str(base.resolve()), checkpoint.fingerprint(base))
    if words.vocab_size > model.llama.vocab:
        raise ValueError(f"the tokenizer has {words.vocab_size} pieces, but llama.vocab is only {model.llama.vocab}")
    llama.check_tp(model.llama, zero.mesh.tp.size)
    whole = llava.spec(model)
    missing = {name: part for name, part in whole.items() if base is None or name not in brought.parts}
    lost = [name for name in missing if not trains(train)((name,))]
    if lost:
        names = ", ".join(lost)
        raise ValueError(f"train={train} does not train {names}, which no base brings; give a base, or train=all")
    zero = dataclasses.replace(zero, spec=whole)

    def leaf(path: tree.Path, p: spec.Param) -> Tensor:
        new = path[0] in missing
        x = spec.fresh(path, p, seed, zero.mesh) if new else weights.block(brought, path, p, zero.mesh)
        return zero.keep(p, x).to(device, torch.float32) if trains(train)(path) else x.to(device, zero.dtype)

    # leaf by leaf: a rank never holds much more than it keeps; in the model's order, in which sums are taken
    trainable, frozen = tree.split(spec.build(whole, leaf), trains(train))
    return Start(model, words, trainable, frozen, origin, tuple(missing), zero)


@dataclass(frozen=True)
class Run:
    """An open run folder. manifest: of its checkpoints, but for the step. joined: the processes that share the run."""

    folder: Path
    saving: Saving
    manifest: Manifest
    tokenizer: bytes
    zero: Zero
    joined: Joined = Joined()
    background: shares.Background = field(default_factory=shares.Background)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def save(self, state: TrainState) -> None:
        """Write the checkpoint of this step, then remove all but the newest `keep`. OSError if the disk is full.

        Every process writes what it answers for, and the first one makes a checkpoint of it; in the background, if that
        is wanted: then an error shows at the next call, or at the end.
        """
        trees = [state.params, *([state.moments.first, state.moments.second] if self.saving.save_optim else [])]
        pieces = [self._pieces(kept) for kept in trees]
        if self.saving.background:
            job = partial(self._write, state.step, [shares.copied(kind) for kind in pieces])
            self.background.start(f"checkpoint of step {state.step}", job)
        else:
            self._write(state.step, pieces)

    def _pieces(self, kept: TensorDict) -> list[Piece]:
        rows = zip(
            tree.paths(kept), tree.values(kept), self.zero.params(kept), self.zero.boxes(kept), self.zero.answers(kept),
            strict=True,
        )  # fmt: skip
        return [Piece(path, p.shape, box, x[: box[0][1] - box[0][0]]) for path, x, p, box, mine in rows if mine]

    def _write(self, step: int, pieces: Sequence[list[Piece]]) -> None:
        folder, world = checkpoint.at(self.checkpoints, step), self.joined.mesh.all
        manifest = dataclasses.replace(self.manifest, step=step)
        moments = (pieces[1], pieces[2]) if len(pieces) > 1 else None
        if world.size == 1:
            whole = [_tree(kind) for kind in pieces]
            checkpoint.save(folder, manifest, whole[0], tuple(whole[1:]) or None, self.tokenizer)
        else:
            shares.write_share(folder, world.rank, pieces[0], moments, self.joined.attempt)
        if not self.joined.first:
            return
        if world.size > 1:
            shares.commit(folder, world.size, manifest, self.tokenizer, SHARE_SECONDS, self.joined.attempt)
        for step in checkpoint.steps(self.checkpoints)[: -self.saving.keep or None] if self.saving.keep else []:
            checkpoint.remove(checkpoint.at(self.checkpoints, step))

    def rewind(self, step: int) -> None:
        """Drop what stands there from updates after `step`, which are computed again."""
        for name in ("metrics.jsonl", "skipped.jsonl"):
            report.rewind(self.folder / name, step)
        for later in [s for s in checkpoint.steps(self.checkpoints) if s > step]:
            checkpoint.remove(checkpoint.at(self.checkpoints, later))

    def log(self, step: int, row: dict, bad: Sequence[tuple[str, str]]) -> None:
        """Add one update to metrics.jsonl and its left-out records to skipped.jsonl."""
        report.append(self.folder / "metrics.jsonl", {"step": step, **row})
        for name, reason in bad:
            report.append(self.folder / "skipped.jsonl", {"step": step, "record": name, "reason": reason})


def _tree(pieces: list[Piece]) -> TensorDict:
    """The tree of pieces that are whole tensors."""
    out = TensorDict({})
    for piece in pieces:
        out[piece.path] = piece.value
    return out


def open_run(
    folder: Path, saving: Saving, manifest: Manifest, tokenizer: bytes, config: object, device: torch.device,
    zero: Zero, joined: Joined = Joined(),
) -> Run:  # fmt: skip
    """Make or reopen the folder, write config and environment."""
    run = Run(folder, saving, manifest, tokenizer, zero, joined)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    for name, value in (("config", plain(config)), ("environment", environment(device))):
        if joined.first:
            report.write(folder / f"{name}.json", json.dumps(value, indent=1) + "\n")
    return run


def source(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` means, or None for a fresh start. ValueError if it is not there, or is in the way.

    First of all it removes what a killed process left half done.
    """
    runs = folder / "checkpoints"
    checkpoint.clean(runs)
    found = checkpoint.steps(runs)
    if resume == "no" and found:
        raise ValueError(f"{folder} already holds a run; choose another run folder, or resume=auto")
    if resume in ("no", "auto"):
        return checkpoint.at(runs, found[-1]) if found else None
    path = checkpoint.at(runs, int(resume)) if resume.isdigit() else Path(resume)
    if not path.is_dir():
        raise ValueError(f"resume={resume}: there is no {path}; {folder} has the steps {found}")
    return path


def resume(path: Path | None, manifest: Manifest, begin: Start, saving: Saving) -> TrainState:
    """The state to go on from: that of the checkpoint, or step 0. ValueError lists what differs in the config.

    A checkpoint of any mesh serves; of it only what this process keeps is read.
    """
    if path is None:
        return TrainState(0, begin.trainable, optim.init(begin.trainable))
    reader, saved = checkpoint.open_boxes(path), checkpoint.read_manifest(path)
    changed = differences(plain(dataclasses.replace(saved, step=0)), plain(manifest))
    if (path / "tokenizer.model").read_bytes() != begin.tokenizer.model:
        changed.append("tokenizer: another sentencepiece model")
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(f"{path} belongs to another config; choose another run folder, or undo these:\n  {lines}")
    if saving.load_optim and "first" not in reader.index:
        raise ValueError(f"{path} was saved without optimizer state; resume it with --saving.no-load-optim")
    kinds = boxes.KINDS if saving.load_optim else boxes.KINDS[:1]
    params, *moments = [begin.zero.read(begin.trainable, partial(reader.read, kind)) for kind in kinds]
    return TrainState(saved.step, params, optim.Moments(*moments) if moments else optim.init(params))
