"""A run and its folder: what stands in it, how it starts, saves, and goes on after it was stopped at any instant.

    run/config.json          the config; `--config run/config.json` starts from it
    run/environment.json     versions, device, Ascend variables
    run/metrics.jsonl        one row an update
    run/skipped.jsonl        one row a record that was left out
    run/checkpoints/000100   see llava_fn/checkpoint.py
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict

from llava_fn import checkpoint, llava, optim, report, spec, tree
from llava_fn.checkpoint import Base, Manifest
from llava_fn.config import Llava, differences, plain
from llava_fn.parallel import launch
from llava_fn.text import Tokenizer
from llava_fn.train import STAGES, State


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, what is in them, and which one a run starts from."""

    save_interval: int = 500  # updates; the last update is always saved
    keep: int = 2  # newest checkpoints that stay; 0: all
    save_optim: bool = True  # without, a checkpoint is for inference: training cannot go on exactly
    load_optim: bool = True  # without, AdamW's moments start from zero again
    resume: str = "auto"  # auto: the newest checkpoint of the run, if any; no; a step, and those after it are dropped;
    # or a checkpoint's path


@dataclass(frozen=True)
class Start:
    """What a run begins with: what it trains, what it does not, and what the ids and images mean."""

    model: Llava
    tokenizer: Tokenizer
    trainable: TensorDict  # fp32
    frozen: TensorDict
    base: Base | None
    random: tuple[str, ...]  # parts that begin with random weights


def start(model: Llava | None, base: Path | None, tokenizer: Path | None, train: str, seed: int, **to) -> Start:
    """Weights of the base, random ones for the parts that it lacks. to: device and dtype of the frozen parameters.

    ValueError if model and tokenizer stand in two places or in none, if the vocabulary is too small for the ids, and if
    a part would be random for ever.
    """
    if (base is None) == (model is None) or (base is None) == (tokenizer is None):
        raise ValueError("give a base, which brings model and tokenizer, or a model and a tokenizer; not both")
    have, origin = TensorDict({}), None
    if base is None:
        words = Tokenizer.load(tokenizer)
    else:
        loaded = checkpoint.load_model(base)
        model, have, words = loaded.manifest.model, loaded.params, Tokenizer.from_bytes(loaded.tokenizer)
        origin = Base(str(base.resolve()), checkpoint.fingerprint(base))
    if words.vocab_size > model.llama.vocab:
        raise ValueError(f"the tokenizer has {words.vocab_size} pieces, but llama.vocab is only {model.llama.vocab}")
    whole = llava.spec(model)
    missing = {name: part for name, part in whole.items() if name not in have.keys()}
    lost = [name for name in missing if not STAGES[train]((name,))]
    if lost:
        names = ", ".join(lost)
        raise ValueError(f"train={train} does not train {names}, which no base brings; give a base, or train=all")
    params = tree.merge(have, spec.init(missing, seed))
    in_order = spec.build(whole, lambda path, _: params[path])  # whatever the base brings, sums are taken in one order
    trainable, frozen = tree.split(in_order, STAGES[train])
    frozen = tree.rebuild(frozen, [leaf.to(**to) for leaf in tree.values(frozen)])
    trainable = tree.rebuild(trainable, [leaf.to(to["device"], torch.float32) for leaf in tree.values(trainable)])
    return Start(model, words, trainable, frozen, origin, tuple(missing))


@dataclass(frozen=True)
class Run:
    """An open run folder. manifest: of its checkpoints, but for the step."""

    folder: Path
    saving: Saving
    manifest: Manifest
    tokenizer: bytes

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def save(self, state: State) -> None:
        """Write the checkpoint of this step, then remove all but the newest `keep`. OSError if the disk is full."""
        manifest = dataclasses.replace(self.manifest, step=state.step)
        moments = (state.moments.first, state.moments.second) if self.saving.save_optim else None
        checkpoint.save(checkpoint.at(self.checkpoints, state.step), manifest, state.params, moments, self.tokenizer)
        for step in checkpoint.steps(self.checkpoints)[: -self.saving.keep or None] if self.saving.keep else []:
            checkpoint.remove(checkpoint.at(self.checkpoints, step))

    def rewind(self, step: int) -> None:
        """Drop what stands there from updates after `step`, which are computed again."""
        for name in ("metrics.jsonl", "skipped.jsonl"):
            report.rewind(self.folder / name, step)
        for later in [s for s in checkpoint.steps(self.checkpoints) if s > step]:
            checkpoint.remove(checkpoint.at(self.checkpoints, later))

    def log(self, step: int, row: dict, bad: tuple[tuple[str, str], ...]) -> None:
        """Add one update to metrics.jsonl and its left-out records to skipped.jsonl."""
        report.append(self.folder / "metrics.jsonl", {"step": step, **row})
        for name, reason in bad:
            report.append(self.folder / "skipped.jsonl", {"step": step, "record": name, "reason": reason})


def open_run(folder: Path, saving: Saving, manifest: Manifest, tokenizer: bytes, config: object, device) -> Run:
    """Make or reopen the folder, write config and environment."""
    run = Run(folder, saving, manifest, tokenizer)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    for name, value in (("config", plain(config)), ("environment", launch.environment(device))):
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


def resume(path: Path | None, manifest: Manifest, begin: Start, saving: Saving, device) -> State:
    """The state to go on from: that of the checkpoint, or step 0. ValueError lists what differs in the config."""
    if path is None:
        return State(0, begin.trainable, optim.init(begin.trainable))
    loaded = checkpoint.load(path, saving.load_optim, device)
    changed = differences(plain(dataclasses.replace(loaded.manifest, step=0)), plain(manifest))
    if loaded.tokenizer != begin.tokenizer.model:
        changed.append("tokenizer: another sentencepiece model")
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(f"{path} belongs to another config; choose another run folder, or undo these:\n  {lines}")
    moments = optim.Moments(*loaded.moments) if loaded.moments else optim.init(loaded.params)
    return State(loaded.manifest.step, loaded.params, moments)
