"""Fine-tune a LLaVA on conversations: its second stage, whole or with low-rank adapters.

Without arguments: the model of `python recipes/pretrain.py` learns to answer questions about the pictures that come
with the package. `--config lora-demo` does the same with adapters.
`--config published`: LLaVA-1.5's second stage, on the data that `--source FILE IMAGES` names, from a run of the first
stage that `--base` names. `lora` and `qlora`: the same with adapters, on weights as they are or in four bits. `task`:
adapters for data of your own on a published LLaVA.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llava_fn.config import Lora, Optim, Parallel, Recompute, plain
from llava_fn.data.options import Data, Source
from llava_fn.launch import cli
from llava_fn.runs.options import Heldout, Saving

if TYPE_CHECKING:
    from collections.abc import Callable

    from llava_fn.launch.processes import World
    from llava_fn.launch.watchdog import Watch
    from llava_fn.runs.origin import Origin
    from llava_fn.train import TrainState

STAGE_1, EMOJI_DATA, EMOJI_CHAT = Path("runs/emoji"), Path("runs/emoji-data"), Path("runs/emoji-chat")


@dataclass(frozen=True)
class Finetune:
    """The whole run."""

    run_dir: Path
    base: tuple[Path, ...]  # a run's folder, a checkpoint, or files and folders of any layout that make a model
    data: Data
    optim: Optim
    train: tuple[str, ...] = ("projector", "llama")  # parts, or paths in them such as vision/blocks/22; adapters too
    lora: Lora | None = None  # train adapters, beside what `train` names
    quantise: Literal["int8", "nf4"] | None = None  # the frozen linears of the decoder, to save memory
    heldout: Heldout = Heldout()  # records that are never trained on
    unpack: bool = False  # write the data about the pictures that come with the package to runs/
    saving: Saving = Saving()
    seed: int = 42  # of new adapters; the order of the data has its own
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; masters and optimizer are float32
    loss: Literal["token_mean", "rank_mean"] = "token_mean"  # rank_mean: the original's mean of micro-batch means
    recompute: Recompute = "auto"  # keep only each block's input for the backward pass; auto: if memory asks for it
    compile: str = ""  # the backend of torch.compile to run each block through, e.g. inductor
    parallel: Parallel = Parallel()  # of the processes that torchrun starts; see docs/cluster.md

    def __post_init__(self) -> None:
        if self.quantise and any(part.split("/")[0] == "llama" for part in self.train):
            raise ValueError(
                f"quantise={self.quantise} is of frozen weights, and train names the decoder; train adapters instead"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are trained, adapters among them."""
        return (*self.train, "lora") if self.lora else self.train


EMOJI = Finetune(
    run_dir=Path("runs/emoji-finetune"),
    base=(STAGE_1,),
    data=Data(
        (Source(EMOJI_CHAT / "train.json", EMOJI_DATA),),
        template="hf", samples=64, epochs=6.0, workers=1, max_tokens=256,
    ),
    optim=Optim(lr=1e-3, warmup=0.05, beta2=0.98, weight_decay=0.1),
    heldout=Heldout(EMOJI_CHAT / "heldout.json", EMOJI_DATA, interval=100),
    unpack=True,
)  # fmt: skip
LORA_DEMO = replace(
    EMOJI, run_dir=Path("runs/emoji-lora"), train=("projector",), lora=Lora(rank=16, alpha=32.0),
    optim=replace(EMOJI.optim, lr=4e-3),
)  # fmt: skip
PUBLISHED = Finetune(
    run_dir=Path("runs/finetune"),
    base=(Path("runs/pretrain"),),
    data=Data(
        (Source(Path("llava_v1_5_mix665k.json"), Path("images")),),
        template="vicuna_v1", image_mode="pad", samples=128, accumulate=8,
    ),
    optim=Optim(lr=2e-5),
    dtype="bfloat16",
)  # fmt: skip
LORA = replace(
    PUBLISHED, run_dir=Path("runs/lora"), train=("projector",), lora=Lora(rank=128, alpha=256.0, dropout=0.05),
    optim=Optim(lr=2e-4, rates=(("projector", 2e-5),)),
)  # fmt: skip
QLORA = replace(LORA, run_dir=Path("runs/qlora"), quantise="nf4")
TASK = replace(
    LORA, run_dir=Path("runs/task"), base=(Path("llava-1.5-7b-hf"),), heldout=Heldout(share=0.02),
    data=replace(LORA.data, sources=(Source(Path("train.json"), Path("images")),)),
)  # fmt: skip
PRESETS = {
    "emoji": EMOJI, "lora-demo": LORA_DEMO, "published": PUBLISHED, "lora": LORA, "qlora": QLORA, "task": TASK,
}  # fmt: skip


def recipe(c: Finetune, dp: int) -> dict:
    """The part of the config that the numbers of a run depend on, by more than rounding. dp: size of the data axis."""
    free = ("run_dir", "saving", "device", "unpack", "base", "parallel", "recompute")
    values = plain(replace(c, data=replace(c.data, sources=(), workers=0))) | dict.fromkeys(free)
    values["heldout"] = values["heldout"]["share"]
    del values["data"]["image_reading"]  # the manifest has it, and older runs lack it
    values["data"]["accumulate"] *= dp if c.loss == "rank_mean" else 0  # a token mean does not depend on the grouping
    return values


def main(c: Finetune) -> TrainState:
    """Train to the end, from wherever the run folder stands, and return the last state."""
    # imports stand where they are used: torch takes seconds, and --help does without
    from llava_fn.launch.device import pick_device
    from llava_fn.launch.processes import processes
    from llava_fn.runs.guard import guard

    if c.base == (STAGE_1,) and not STAGE_1.is_dir():
        raise ValueError(f"there is no {STAGE_1} to go on from; `python recipes/pretrain.py` makes it in 4 minutes")
    device = pick_device(c.device)
    with processes(c.parallel.tp, device, c.run_dir / "log") as world, guard(c.run_dir, world, c.parallel) as watch:
        return train(c, world, watch)


def decided(c: Finetune, origin: Origin, world: World, longest: Callable[[], int]) -> Finetune:
    """The config with recompute on or off. longest: tokens of the longest samples to expect."""
    import torch

    from llava_fn.plan.recompute import decide
    from llava_fn.plan.trace import Workload

    dtype, size = getattr(torch, c.dtype), world.mesh.all.size
    load = Workload(origin.model, c.parts, c.parallel, size, 0, dtype, False, c.lora, c.quantise)
    return replace(c, recompute=decide(c.recompute, load, c.data, longest, world))


def train(c: Finetune, world: World, watch: Watch) -> TrainState:
    """The run of this process, one of `world`: model, data, state, loop, report."""
    import torch

    from llava_fn import llava, lora
    from llava_fn.checkpoint.folder import Manifest
    from llava_fn.data import emoji, emoji_chat, records
    from llava_fn.parallel.zero import Zero
    from llava_fn.runs import answers, report, validation
    from llava_fn.runs.origin import adopt
    from llava_fn.runs.run import Run, find_checkpoint
    from llava_fn.train import Task, train_step

    if c.unpack:
        world.in_turn(lambda: emoji_chat.write(EMOJI_CHAT, emoji.unpack(EMOJI_DATA)))
    origin = world.in_turn(lambda: adopt(c.base, c.run_dir / "base"))
    origin.check(c.data, c.parallel, c.recompute != "off", c.compile)

    tokenizer, vision = origin.tokenizer(), origin.model.vision
    preparation = records.preparation(tokenizer, vision.image, vision.patches, c.data)
    files = [records.read(source) for source in c.data.sources]
    sources, heldout = validation.divided(files, c.heldout, c.data.seed)
    schedule = world.in_turn(partial(records.schedule, sources, c.data, preparation, c.run_dir))
    held, bad = validation.batches(heldout, preparation, c.heldout, c.data.on_bad_record, world)

    spec = lora.extended(llava.spec(origin.model), c.lora)
    zero = Zero(spec, world.mesh, c.parallel.zero, getattr(torch, c.dtype), c.parallel.ahead, c.parts)
    params, frozen = origin.parameters(zero, c.seed, world.device, c.quantise)
    c = decided(c, origin, world, lambda: records.longest(sources, preparation))
    execution = llava.execution(c.recompute == "on", c.compile, zero, vision)
    task = Task(frozen, origin.model, c.optim, schedule.steps(), zero, c.loss, execution, c.lora)
    manifest = Manifest(
        origin.model, c.parts, c.data.image_mode, c.data.template, c.data.compat, image_reading=c.data.image_reading,
        recipe=recipe(c, world.mesh.dp.size), data=records.fingerprint(c.data.sources), lora=c.lora, base=origin.record,
    )  # fmt: skip
    run = Run(c.run_dir, c.saving, manifest, tokenizer.model, zero, world, watch)
    checkpoint = world.in_turn(partial(find_checkpoint, c.run_dir, c.saving.resume))
    state = run.resume(checkpoint, params)
    run.open(c, c.parallel, state.step, frozen)
    summary = run.summary(sum(map(len, sources)), task.steps, origin.random, checkpoint)
    notes = records.unread_line(files), validation.doubts(sources, origin.random)
    print("\n".join(filter(None, (summary, report.groups(c.optim, params, zero), *notes))), file=sys.stderr)

    share = records.Share(world.mesh.dp.rank, world.mesh.dp.size, world.mesh.tp.size)
    steps = records.steps(sources, schedule, preparation, state.step, task.steps, share)
    with run.training(state.step, task.steps, c.parallel.check_interval, bad) as loop:
        for update in loop.updates(steps):
            state, metrics = train_step(state, update.batches, task)
            loss = validation.loss(state, held, task) if held and loop.due(state.step, c.heldout.interval) else None
            loop.record(state, metrics, update, loss)

    if world.first:
        watch.begin("answers")
        report.plot_loss(run.folder, state.step)
    if world.first and heldout:
        asked, bad = records.held_out(validation.some(heldout, c.heldout.answers), preparation, c.data.on_bad_record)
        run.leave_out(0, bad)
        params = origin.whole(run.at(state.step), world.device)
        report.show(answers.answer(params, asked, origin.model, tokenizer), "answers", run.folder)
    return state


if __name__ == "__main__":
    cli.run(main, cli.parse(PRESETS, __doc__))
