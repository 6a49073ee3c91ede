"""Pre-train a LLaVA: images in, captions out.

Without arguments: the data set that comes with the package, and a small model from random weights, all of it trained.
`--config published`: LLaVA-1.5's first stage. It trains the projector between a CLIP and a Vicuna, which `--base`
brings, on LLaVA-Pretrain, which `--data.sources.0.records` and `--data.sources.0.images` name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tensordict import TensorDict

from llava_fn import llama, llava, spec, tree
from llava_fn.batch import Sample
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.folder import Manifest
from llava_fn.config import LLAVA_EMOJI, Llava, Optim, Parallel, Stage, plain
from llava_fn.data import emoji
from llava_fn.data import records as data
from llava_fn.launch import agreement, cli, processes
from llava_fn.launch.device import pick_device
from llava_fn.launch.processes import Joined
from llava_fn.launch.watchdog import Watch, watching
from llava_fn.parallel.collectives import texts
from llava_fn.parallel.mesh import Mesh
from llava_fn.parallel.zero import Zero
from llava_fn.runs import captions, report
from llava_fn.runs import run as runs
from llava_fn.runs.options import Saving
from llava_fn.runs.progress import Progress
from llava_fn.train import Task, TrainState, train_step

EMOJI_DATA = Path("runs/emoji-data")


@dataclass(frozen=True)
class Pretrain:
    """The whole run."""

    run_dir: Path
    data: data.Data
    optim: Optim
    train: Stage  # the others are frozen
    model: Llava | None = None  # of random weights; a base brings its own
    tokenizer: Path | None = None  # a sentencepiece model; a base brings its own
    base: Path | None = None  # a checkpoint with the image tower and the decoder
    unpack: Path | None = None  # where to put the data set that comes with the package
    heldout: data.Source | None = None  # captioned at the end
    saving: Saving = Saving()
    seed: int = 42  # of random weights; the order of the data has its own
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; masters and optimizer are float32
    loss: Literal["token_mean", "rank_mean"] = "token_mean"  # rank_mean: the original's mean of micro-batch means
    recompute: bool = False  # keep only each block's input for the backward pass
    compile: str = ""  # the backend of torch.compile to run each block through, e.g. inductor
    parallel: Parallel = Parallel()  # of the processes that torchrun starts; see README.md, Many devices


EMOJI = Pretrain(
    run_dir=Path("runs/emoji"),
    data=data.Data(
        sources=(data.Source(EMOJI_DATA / "train.json", EMOJI_DATA),), samples=64, epochs=22.0, workers=1, max_tokens=64
    ),
    optim=Optim(lr=3e-3, warmup=0.05, beta2=0.98, weight_decay=1.0),
    train="all",
    model=LLAVA_EMOJI,
    tokenizer=EMOJI_DATA / "tokenizer.model",
    unpack=EMOJI_DATA,
    heldout=data.Source(EMOJI_DATA / "heldout.json", EMOJI_DATA),
)
PUBLISHED = Pretrain(
    run_dir=Path("runs/pretrain"),
    data=data.Data(sources=(data.Source(Path("blip_laion_cc_sbu_558k.json"), Path("images")),), accumulate=32),
    optim=Optim(),
    train="projector",
    base=Path("weights/base"),
    dtype="bfloat16",
    recompute=True,
)


def recipe(c: Pretrain, dp: int) -> dict:
    """The part of the config that the numbers of a run depend on, by more than rounding. dp: size of the data axis."""
    free = ("run_dir", "saving", "device", "unpack", "heldout", "base", "model", "tokenizer", "parallel", "recompute")
    values = plain(replace(c, data=replace(c.data, sources=(), workers=0))) | dict.fromkeys(free)
    values["data"]["accumulate"] *= dp if c.loss == "rank_mean" else 0  # there each part has a mean of its own
    return values


def check(c: Pretrain, world: int) -> None:
    """ValueError for a config that `world` processes cannot run; on each of them, before one waits for another."""
    llama.check_tp(runs.model_of(c.model, c.base, c.tokenizer).llama, c.parallel.tp)
    llava.execution(c.recompute, c.compile, Zero(level=c.parallel.zero))
    if not c.data.tokens:
        data.check_share(c.data.samples, c.data.accumulate, world, c.parallel.tp)


def timed(items: Iterable) -> Iterator[tuple[float, float, object]]:
    """(when it was asked for, seconds until it came, item)."""
    began = time.monotonic()
    for item in items:
        yield began, time.monotonic() - began, item
        began = time.monotonic()


def main(c: Pretrain) -> TrainState:
    """Train to the end, from wherever the run folder stands, and return the last state."""
    device, tp = pick_device(c.device), c.parallel.tp
    check(c, processes.check_processes(tp, os.environ))
    with processes.processes(tp, device, c.run_dir / "log") as joined:
        with watching(joined.store, joined.mesh.all.rank, joined.mesh.all.size, c.parallel.silence) as watch:
            return train(c, device, joined, watch)


def train(c: Pretrain, device: torch.device, joined: Joined, watch: Watch) -> TrainState:
    """The run of this process, as one of `joined`."""
    mesh = joined.mesh
    if c.unpack:
        joined.in_turn(lambda: emoji.unpack(c.unpack), device)
    records = [data.read(source) for source in c.data.sources]
    zero = Zero({}, mesh, c.parallel.zero, getattr(torch, c.dtype), c.parallel.ahead)
    begin = runs.start(c.model, c.base, c.tokenizer, c.train, c.seed, device, zero)
    vision, parts = begin.model.vision, tuple(dict.fromkeys(path[0] for path in tree.paths(begin.trainable)))
    how = data.preparation(begin.tokenizer, vision.image, vision.patches, c.data)
    manifest = Manifest(
        begin.model, parts, c.data.image_mode, c.data.template, c.data.compat,
        base=begin.base, recipe=recipe(c, mesh.dp.size), data=data.fingerprint(c.data.sources),
    )  # fmt: skip
    plan = data.plan(records, c.data, how)
    heldout = [data.sample(record, how) for record in data.read(c.heldout)] if c.heldout else []
    path = joined.in_turn(lambda: runs.source(c.run_dir, c.saving.resume), device)
    state = runs.resume(path, manifest, begin, c.saving)
    again = replace(c, saving=replace(c.saving, resume="auto", load_optim=True))  # these two are for this start alone
    run = runs.open_run(c.run_dir, c.saving, manifest, begin.tokenizer.model, again, device, begin.zero, joined)
    how_run = llava.execution(c.recompute, c.compile, begin.zero, parts)
    task = Task(begin.frozen, begin.model, c.optim, plan.steps(), begin.zero, c.loss, how_run)
    same = {"run": plain(manifest), "parallel": plain(c.parallel), "step": state.step}
    agreement.check("the run", same, mesh.all, device)
    agreement.check_params("the frozen parameters", begin.frozen, begin.zero, device)
    print(summary(begin, records, state, task, path, mesh), file=sys.stderr)
    share = data.Share(mesh.dp.rank, mesh.dp.size, mesh.tp.size)
    steps = data.steps(records, plan, how, state.step, task.steps, share)
    state = fit(run, state, task, steps, device, watch, c.parallel.check_interval)
    if joined.first:
        watch.begin("captions")
        report.plot_loss(report.read_metrics(run.folder / "metrics.jsonl", state.step), run.folder / "loss.png")
    if heldout and joined.first:
        whole = checkpoint.load_model(checkpoint.at(run.checkpoints, state.step), device).params
        show(run, tree.cast(whole, torch.float32), begin, heldout)
    return state


def fit(
    run: runs.Run, state: TrainState, task: Task, steps: Iterable[data.Step], device: torch.device, watch: Watch,
    check_interval: int,
) -> TrainState:  # fmt: skip
    """The loop: an update, its figures, now and then a checkpoint."""
    first, everyone = run.joined.first, run.joined.mesh
    skipped = 0
    if first:
        run.rewind(state.step)
        skipped = len(report.read_metrics(run.folder / "skipped.jsonl", state.step))
    watch.begin(f"data {state.step + 1}")
    with run.background, Progress(state.step, task.steps) as progress:
        for began, wait, step in timed(steps):
            watch.begin(f"update {step.step}")
            state, m = train_step(state, [batch.to(device) for batch in step.batches], task)
            seconds = time.monotonic() - began
            said = texts(json.dumps(step.bad) if step.bad else "", everyone.dp, device)
            bad = [tuple(b) for text in said if text for b in json.loads(text)]
            row = dataclasses.asdict(m) | {"seconds": seconds, "wait": wait, "memory_gib": report.memory(device)}
            if first:
                run.log(state.step, row, bad)
            skipped += len(bad)
            progress.show(
                state.step,
                f"loss {m.loss:.3f} {m.tokens / seconds:.0f} tokens/s {m.samples / seconds:.1f} samples/s "
                f"wait {wait / seconds:.0%} {row['memory_gib']:.1f} GiB" + (f" skipped {skipped}" if skipped else ""),
            )
            if run.zero.level == 0 and state.step % check_interval == 0:
                agreement.check_params("the parameters", state.params, run.zero, device)
            if state.step % run.saving.save_interval == 0 or state.step == task.steps:
                watch.begin(f"checkpoint {state.step}")
                run.save(state)
            watch.begin(f"data {state.step + 1}")
    return state


def summary(
    begin: runs.Start, records: list[list[data.Record]], state: TrainState, task: Task, path: Path | None, mesh: Mesh
) -> str:
    """What is about to happen, for the log."""
    shapes = [(path, math.prod(p.shape)) for path, p in spec.leaves(begin.zero.spec)]
    trained = {path[0] for path in tree.paths(begin.trainable)}
    sizes = [sum(n for path, n in shapes if (path[0] in trained) == yes) / 1e6 for yes in (True, False)]
    shared = f"{mesh.all.size} processes (dp={mesh.dp.size}, tp={mesh.tp.size}, zero={begin.zero.level}); "
    return (
        f"{sum(map(len, records))} records, {task.steps} updates; {sizes[0]:.1f} M parameters trained, "
        f"{sizes[1]:.1f} M frozen; random at the start: {', '.join(begin.random) or 'none'}; "
        + (shared if mesh.all.size > 1 else "")
        + (f"goes on from {path}" if path else "starts at update 1")
    )


def show(run: runs.Run, params: TensorDict, begin: runs.Start, samples: list[Sample]) -> None:
    """Caption the held-out images; print a few, write them all."""
    result = captions.caption(params, samples, begin.model, begin.tokenizer)
    report.samples_page(result, [s.pixels[0] for s in samples], run.folder / "samples.html")
    for truth, said in list(zip(result.truth, result.said, strict=True))[:: max(1, len(samples) // 12)]:
        print(f"  {'right' if truth == said else 'WRONG'}  {truth}" + ("" if truth == said else f"  |  {said}"))
    print(report.headline(result))
    print(f"all of them: {run.folder / 'samples.html'}; loss: {run.folder / 'loss.png'}")


if __name__ == "__main__":
    cli.run(main, cli.parse({"emoji": EMOJI, "published": PUBLISHED}, __doc__))
