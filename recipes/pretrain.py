"""Pre-train a LLaVA: images in, captions out.

Without arguments: the data set that comes with the package, and a small model from random weights, all of it trained.
`--config published`: LLaVA-1.5's first stage. It trains the projector between a CLIP and a Vicuna, which `--base`
brings, on LLaVA-Pretrain, which `--data.sources.0.records` and `--data.sources.0.images` name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llava_fn.config import LLAVA_EMOJI, STAGES, Llava, Optim, Parallel, Recompute, Stage, plain
from llava_fn.data.options import Data, Source
from llava_fn.launch import cli
from llava_fn.runs.options import Saving

if TYPE_CHECKING:
    from llava_fn.launch.processes import World
    from llava_fn.launch.watchdog import Watch
    from llava_fn.runs.origin import Origin
    from llava_fn.train import TrainState

EMOJI_DATA = Path("runs/emoji-data")


@dataclass(frozen=True)
class Pretrain:
    """The whole run."""

    run_dir: Path
    data: Data
    optim: Optim
    train: Stage  # the parts that are trained; the others are frozen
    model: Llava | None = None  # of random weights; a base brings its own
    tokenizer: Path | None = None  # a sentencepiece model; a base brings its own
    base: Path | None = None  # a checkpoint with the image tower and the decoder
    unpack: Path | None = None  # where to put the data set that comes with the package
    heldout: Source | None = None  # captioned at the end
    saving: Saving = Saving()
    seed: int = 42  # of random weights; the order of the data has its own
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; masters and optimizer are float32
    loss: Literal["token_mean", "rank_mean"] = "token_mean"  # rank_mean: the original's mean of micro-batch means
    recompute: Recompute = "auto"  # keep only each block's input for the backward pass; auto: if memory asks for it
    compile: str = ""  # the backend of torch.compile to run each block through, e.g. inductor
    parallel: Parallel = Parallel()  # of the processes that torchrun starts; see README.md, Many devices


EMOJI = Pretrain(
    run_dir=Path("runs/emoji"),
    data=Data((Source(EMOJI_DATA / "train.json", EMOJI_DATA),), samples=32, epochs=30.0, workers=1, max_tokens=64),
    optim=Optim(lr=2e-3, warmup=0.05, beta2=0.98, weight_decay=2.0),
    train="all",
    model=LLAVA_EMOJI,
    tokenizer=EMOJI_DATA / "tokenizer.model",
    unpack=EMOJI_DATA,
    heldout=Source(EMOJI_DATA / "heldout.json", EMOJI_DATA),
)
PUBLISHED = Pretrain(
    run_dir=Path("runs/pretrain"),
    data=Data(sources=(Source(Path("blip_laion_cc_sbu_558k.json"), Path("images")),), accumulate=32),
    optim=Optim(),
    train="projector",
    base=Path("weights/base"),
    dtype="bfloat16",
)


def recipe(c: Pretrain, dp: int) -> dict:
    """The part of the config that the numbers of a run depend on, by more than rounding. dp: size of the data axis."""
    free = ("run_dir", "saving", "device", "unpack", "heldout", "base", "model", "tokenizer", "parallel", "recompute")
    values = plain(replace(c, data=replace(c.data, sources=(), workers=0))) | dict.fromkeys(free)
    del values["data"]["image_reading"]  # the manifest has it, and older runs lack it
    values["data"]["accumulate"] *= dp if c.loss == "rank_mean" else 0  # a token mean does not depend on the grouping
    return values


def follow(c: Pretrain) -> Pretrain:
    """The config whose paths in the usual folder of the data set that comes with the package are in `unpack`."""
    moved = lambda p: c.unpack / p.relative_to(EMOJI_DATA) if c.unpack and p.is_relative_to(EMOJI_DATA) else p  # noqa: E731
    there = lambda s: replace(s, records=moved(s.records), images=moved(s.images))  # noqa: E731
    return replace(
        c, data=replace(c.data, sources=tuple(map(there, c.data.sources))),
        heldout=c.heldout and there(c.heldout), tokenizer=c.tokenizer and moved(c.tokenizer),
    )  # fmt: skip


def main(c: Pretrain) -> TrainState:
    """Train to the end, from wherever the run folder stands, and return the last state."""
    c = follow(c)
    # imports stand where they are used: torch takes seconds, and --help does without
    from llava_fn.launch.device import pick_device
    from llava_fn.launch.processes import processes
    from llava_fn.runs.guard import guard
    from llava_fn.runs.origin import open_origin

    device, origin = pick_device(c.device), open_origin(c.model, c.tokenizer, c.base)
    origin.check(c.data, c.parallel, c.recompute != "off", c.compile)
    with processes(c.parallel.tp, device, c.run_dir / "log") as world, guard(c.run_dir, world, c.parallel) as watch:
        return train(c, origin, world, watch)


def train(c: Pretrain, origin: Origin, world: World, watch: Watch) -> TrainState:
    """The run of this process, one of `world`: data, model, state, loop, report."""
    import torch

    from llava_fn import llava
    from llava_fn.checkpoint.folder import Manifest
    from llava_fn.data import emoji, records
    from llava_fn.parallel.zero import Zero
    from llava_fn.plan.recompute import decide
    from llava_fn.plan.trace import Workload
    from llava_fn.runs import answers, report
    from llava_fn.runs.run import Run, find_checkpoint
    from llava_fn.train import Task, train_step

    if c.unpack:
        world.in_turn(partial(emoji.unpack, c.unpack))
    tokenizer, vision = origin.tokenizer(), origin.model.vision
    preparation = records.preparation(tokenizer, vision.image, vision.patches, c.data)
    sources = [records.read(source) for source in c.data.sources]
    schedule = world.in_turn(partial(records.schedule, sources, c.data, preparation, c.run_dir))
    shown = records.read(c.heldout) if c.heldout else ()
    heldout, bad = records.held_out(shown, preparation, c.data.on_bad_record)

    spec = llava.spec(origin.model)
    dtype, parts = getattr(torch, c.dtype), STAGES[c.train]
    zero = Zero(spec, world.mesh, c.parallel.zero, dtype, c.parallel.ahead, parts)
    params, frozen = origin.parameters(zero, c.seed, world.device)
    load = Workload(origin.model, parts, c.parallel, world.mesh.all.size, 0, zero.dtype, False)
    c = replace(c, recompute=decide(c.recompute, load, c.data, lambda: records.longest(sources, preparation), world))
    execution = llava.execution(c.recompute == "on", c.compile, zero, vision)
    task = Task(frozen, origin.model, c.optim, schedule.steps(), zero, c.loss, execution)

    manifest = Manifest(
        origin.model, parts, c.data.image_mode, c.data.template, c.data.compat,
        base=origin.record, recipe=recipe(c, world.mesh.dp.size), data=records.fingerprint(c.data.sources),
        image_reading=c.data.image_reading,
    )  # fmt: skip
    run = Run(c.run_dir, c.saving, manifest, tokenizer.model, zero, world, watch)
    checkpoint = world.in_turn(lambda: find_checkpoint(c.run_dir, c.saving.resume))
    state = run.resume(checkpoint, params)
    run.open(c, c.parallel, state.step, frozen)
    print(run.summary(sum(map(len, sources)), task.steps, origin.random, checkpoint), file=sys.stderr)
    if unread := records.unread_line(sources):
        print(unread, file=sys.stderr)

    share = records.Share(world.mesh.dp.rank, world.mesh.dp.size, world.mesh.tp.size)
    steps = records.steps(sources, schedule, preparation, state.step, task.steps, share)
    with run.training(state.step, task.steps, c.parallel.check_interval, bad) as loop:
        for update in loop.updates(steps):
            state, metrics = train_step(state, update.batches, task)
            loop.record(state, metrics, update)

    if world.first:
        watch.begin("captions")
        report.plot_loss(run.folder, state.step)
    if world.first and heldout:
        params = origin.whole(run.at(state.step), world.device)
        report.show(answers.answer(params, heldout, origin.model, tokenizer), "captions", run.folder)
    return state


if __name__ == "__main__":
    cli.run(main, cli.parse({"emoji": EMOJI, "published": PUBLISHED}, __doc__))
