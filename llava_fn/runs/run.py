"""A run and its folder: what is in it, and how a run saves and goes on after it was stopped at any instant.

run/config.json          the config; `--config run/config.json` starts from it
run/environment.json     versions, device, Ascend variables
run/metrics.jsonl        one row an update
run/skipped.jsonl        one row a record that was left out; step 0: of those held out
run/checkpoints/000100   see llava_fn/checkpoint/folder.py
run/lock                 names the process that writes; see guard.py
run/log/rank-00001.log   what a process other than the first one prints
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tensordict import TensorDict

from llava_fn import optim, spec, tree
from llava_fn.batch import Batch
from llava_fn.checkpoint import boxes, shares
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.boxes import Piece
from llava_fn.checkpoint.folder import Manifest
from llava_fn.config import Parallel, differences, plain
from llava_fn.data.records import Bad, Step
from llava_fn.errors import BadRecord
from llava_fn.launch import agreement
from llava_fn.launch.device import environment
from llava_fn.launch.processes import World
from llava_fn.launch.signals import STATUS, Noted, noted
from llava_fn.launch.watchdog import Watch
from llava_fn.parallel.collectives import texts
from llava_fn.parallel.zero import Zero
from llava_fn.runs import report
from llava_fn.runs.options import Saving
from llava_fn.runs.progress import Progress
from llava_fn.train import Metrics, TrainState

HOPELESS = 1000  # records in a row that cannot be used, after which a run ends
SHARE_SECONDS = 600.0  # that the first process waits for the others' shares of a checkpoint


@dataclass(frozen=True)
class Run:
    """A run folder and the processes that share it. manifest: of its checkpoints, except for the step."""

    folder: Path
    saving: Saving
    manifest: Manifest
    tokenizer: bytes
    zero: Zero
    world: World = World()
    watch: Watch = field(default_factory=Watch)
    background: shares.Background = field(default_factory=shares.Background)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return checkpoint.at(self.checkpoints, step)

    def resume(self, path: Path | None, params: TensorDict) -> TrainState:
        """The state to go on from: that of a checkpoint, else step 0 with these trainable parameters.

        A checkpoint of any mesh serves; this process reads only its own shards. ValueError lists what differs in the
        config.
        """
        if path is None:
            return TrainState(0, params, optim.init(params))
        saved = checkpoint.open_checkpoint(path)
        own, base = saved.manifest.base, self.manifest.base
        same = base if own and base and own.fingerprint == base.fingerprint else own  # a base may have moved
        changed = differences(plain(dataclasses.replace(saved.manifest, step=0, base=same)), plain(self.manifest))
        if saved.tokenizer != self.tokenizer:
            changed.append("tokenizer: another sentencepiece model")
        if changed:
            lines = "\n  ".join(changed)
            raise ValueError(
                f"{path} belongs to another config; undo these, or start a new run that trains on from it: the same "
                f"command with another --run-dir and --base {path}:\n  {lines}"
            )
        if self.saving.load_optim and "first" not in saved.tensors.index:
            raise ValueError(f"{path} was saved without optimizer state; resume it with --saving.no-load-optim")
        kinds = boxes.KINDS if self.saving.load_optim else boxes.KINDS[:1]
        params, *moments = [self.zero.read(params, partial(saved.tensors.read, kind)) for kind in kinds]
        return TrainState(saved.manifest.step, params, optim.Moments(*moments) if moments else optim.init(params))

    def open(self, config: object, parallel: Parallel, step: int, frozen: TensorDict) -> None:
        """Make the folder, write config and environment, and compare the processes.

        `resume` and `load_optim` apply to this launch only and are not written. ValueError on every process if config,
        step or frozen parameters are not the same on all of them.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.world.first:
            saving = plain(dataclasses.replace(self.saving, resume="auto", load_optim=True))
            values = {"config": plain(config) | {"saving": saving}, "environment": environment(self.world.device)}
            for name, value in values.items():
                report.write(self.folder / f"{name}.json", json.dumps(value, indent=1) + "\n")
        same = {"run": plain(self.manifest), "parallel": plain(parallel), "step": step}
        agreement.check("the run", same, self.world.mesh.all, self.world.device)
        _, replicas = tree.split(frozen, self.zero.late)
        agreement.check_params("the frozen parameters", replicas, self.zero, self.world.device)

    def summary(self, records: int, steps: int, random: Sequence[str], path: Path | None) -> str:
        """What is about to happen, for the log. random: the parts with random weights; path: of the checkpoint."""
        sizes = {True: 0.0, False: 0.0}  # in millions
        for name, p in spec.leaves(self.zero.spec):
            sizes[spec.under(name, self.manifest.parts)] += math.prod(p.shape) / 1e6
        mesh = self.world.mesh
        shared = f"{mesh.all.size} processes (dp={mesh.dp.size}, tp={mesh.tp.size}, zero={self.zero.level}); "
        return (
            f"{records} records, {steps} updates; {sizes[True]:.1f} M parameters trained, {sizes[False]:.1f} M frozen; "
            f"random at the start: {', '.join(random) or 'none'}; "
            + (shared if mesh.all.size > 1 else "")
            + (f"goes on from {path}" if path else "starts at update 1")
        )

    @contextmanager
    def training(self, step: int, steps: int, check_interval: int, bad: Sequence[Bad] = ()) -> Iterator[Loop]:
        """What the loop from update `step` + 1 to `steps` calls. It ends when the last checkpoint is written.

        bad: held-out records that were left out. What the folder holds of updates after `step` is dropped first, since
        they are computed again. If a signal stopped the loop before `steps`, SystemExit has the status of
        launch/signals.py.
        """
        skipped = 0
        if self.world.first:
            skipped = self.rewind(step)
            self.leave_out(0, bad)
        self.watch.begin(f"data {step + 1}")
        with noted() as signals:
            with self.background, Progress(step, steps) as progress:
                loop = Loop(self, progress, check_interval, skipped, signals, trained=step > 0)
                yield loop
            if loop.stopped:
                print(f"stopped; the same command goes on from {self.at(loop.step)}", file=sys.stderr)
                sys.exit(STATUS[loop.stopped])

    def rewind(self, step: int) -> int:
        """Drop what the folder holds of updates after `step`. -> the number of records skipped until then."""
        for name in ("metrics.jsonl", "skipped.jsonl"):
            report.rewind(self.folder / name, step)
        for later in [s for s in checkpoint.steps(self.checkpoints) if s > step]:
            checkpoint.remove(self.at(later))
        return len(report.read_metrics(self.folder / "skipped.jsonl", step))

    def leave_out(self, step: int, bad: Sequence[Bad]) -> None:
        """Add records that cannot be used to skipped.jsonl. step: of their update; 0: they are held out.

        A record that is held out is listed once, whatever it would have been used for.
        """
        path = self.folder / "skipped.jsonl"
        known = [] if step else [row["record"] for row in report.read_metrics(path, 0)]
        for name, reason in bad if step else dict(bad).items():
            if name not in known:
                report.append(path, {"step": step, "record": name, "reason": reason})

    def save(self, state: TrainState) -> None:
        """Write the checkpoint of this step, then remove all but the newest `keep`. OSError if the disk is full.

        Every process writes its share, and the first one makes a checkpoint of all shares. With `saving.background` a
        thread writes, and its error is raised by the next call, or at the end of the run.
        """
        trees = [state.params, *([state.moments.first, state.moments.second] if self.saving.save_optim else [])]
        pieces = [self._pieces(stored) for stored in trees]
        if self.saving.background:
            job = partial(self._write, state.step, [shares.copied(kind) for kind in pieces])
            self.background.start(f"checkpoint of step {state.step}", job)
        else:
            self._write(state.step, pieces)

    def _pieces(self, stored: TensorDict) -> list[Piece]:
        """The boxes that this process writes of a tree that is stored as the parameters are."""
        rows = zip(
            tree.paths(stored), tree.values(stored), self.zero.params(stored), self.zero.boxes(stored),
            self.zero.answers(stored), strict=True,
        )  # fmt: skip
        return [Piece(path, p.shape, box, x[: box[0][1] - box[0][0]]) for path, x, p, box, writes in rows if writes]

    def _write(self, step: int, pieces: Sequence[list[Piece]]) -> None:
        folder, world = self.at(step), self.world.mesh.all
        manifest = dataclasses.replace(self.manifest, step=step)
        moments = (pieces[1], pieces[2]) if len(pieces) > 1 else None
        if world.size == 1:
            whole = [_tree(kind) for kind in pieces]
            checkpoint.save(folder, manifest, whole[0], (whole[1], whole[2]) if moments else None, self.tokenizer)
        else:
            shares.write_share(folder, world.rank, pieces[0], moments, self.world.attempt)
        if not self.world.first:
            return
        if world.size > 1:
            shares.commit(folder, world.size, manifest, self.tokenizer, SHARE_SECONDS, self.world.attempt)
        best = self.best()
        for old in checkpoint.steps(self.checkpoints)[: -self.saving.keep or None] if self.saving.keep else []:
            if old != best:
                checkpoint.remove(self.at(old))

    def best(self) -> int | None:
        """The step of the checkpoint with the lowest held-out loss. None if no loss was taken."""
        there, rows = checkpoint.steps(self.checkpoints), report.read_metrics(self.folder / "metrics.jsonl")
        losses = {row["step"]: row["heldout_loss"] for row in rows if row["step"] in there and "heldout_loss" in row}
        return min(losses, key=lambda step: losses[step]) if losses else None


@dataclass(frozen=True)
class Update:
    """This process's batches of one update, on its device, and its records that could not be used.

    start: time.monotonic() when the data were asked for. wait: seconds until they came.
    """

    batches: list[Batch]
    bad: tuple[Bad, ...]
    start: float
    wait: float


@dataclass
class Loop:
    """The services of a run's loop.

    skipped: records left out so far; in_a_row: since the last one that could be used. signals: of this process. step:
    of the last update. stopped: the signal that ended the loop before its end, or 0. trained: whether any update had a
    record. heldout: the last loss on held-out records.
    """

    run: Run
    progress: Progress
    check_interval: int
    skipped: int
    signals: Noted
    step: int = 0
    stopped: int = 0
    trained: bool = False
    in_a_row: int = 0
    heldout: float | None = None

    def updates(self, steps: Iterable[Step]) -> Iterator[Update]:
        """The data of each update."""
        start = time.monotonic()
        for step in steps:
            wait = time.monotonic() - start
            self.run.watch.begin(f"update {step.step}")
            yield Update([batch.to(self.run.world.device) for batch in step.batches], step.bad, start, wait)
            if self.stopped:
                return
            self.run.watch.begin(f"data {step.step + 1}")
            start = time.monotonic()

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after this update, whatever happens."""
        return step % self.run.saving.save_interval == 0 or step == self.progress.steps

    def due(self, step: int, interval: int) -> bool:
        """Whether the loss on held-out records is taken after this update: every `interval`, and with a checkpoint."""
        return step % interval == 0 or self.saves(step)

    def record(self, state: TrainState, metrics: Metrics, update: Update, heldout: float | None = None) -> None:
        """After an update: log and show its figures; compare the ranks' copies and save a checkpoint where one is due.

        A signal to any process makes this update the last one of all of them. heldout: the loss on held-out records, if
        it was taken. ValueError if copies have drifted apart, OSError if the disk is full, BadRecord as of `_judge`.
        """
        self.heldout = self.heldout if heldout is None else heldout
        run, device, seconds = self.run, self.run.world.device, time.monotonic() - update.start
        own = json.dumps([self.signals.number, update.bad]) if self.signals.number or update.bad else ""
        told = [json.loads(text or "[0, []]") for text in texts(own, run.world.mesh.all, device)]
        bad = [(name, reason) for _, some in told[:: run.world.mesh.tp.size] for name, reason in some]
        self.step = state.step
        self.stopped = max(number for number, _ in told) if state.step < self.progress.steps else 0
        self.skipped += len(bad)
        memory = report.memory(device)
        if run.world.first:
            row = dataclasses.asdict(metrics) | {"seconds": seconds, "wait": update.wait, "memory_gib": memory}
            row |= {} if heldout is None else {"heldout_loss": heldout}
            known = {name: x for name, x in row.items() if not math.isnan(x)}
            report.append(run.folder / "metrics.jsonl", {"step": state.step, **known})
            run.leave_out(state.step, bad)
        self._judge(metrics, bad)
        self.progress.show(state.step, self._figures(metrics, update.wait, seconds, memory))
        if run.zero.level == 0 and state.step % self.check_interval == 0:
            agreement.check_params("the parameters", state.params, run.zero, device)
        if (self.saves(state.step) and self.trained) or self.stopped:
            run.watch.begin(f"checkpoint {state.step}")
            run.save(state)

    def _figures(self, metrics: Metrics, wait: float, seconds: float, memory: float) -> str:
        loss = f"loss {metrics.loss:.3f}" if metrics.samples else "left out, no usable record"
        held = "" if self.heldout is None else f" held-out {self.heldout:.3f}"
        rates = f"{metrics.tokens / seconds:.0f} tokens/s {metrics.samples / seconds:.1f} samples/s"
        skipped = f" skipped {self.skipped}" if self.skipped else ""
        return f"{loss}{held} {rates} wait {wait / seconds:.0%} {memory:.1f} GiB{skipped}"

    def _judge(self, metrics: Metrics, bad: Sequence[Bad]) -> None:
        """Raise BadRecord on every process after HOPELESS bad records in a row, or if no update had a record."""
        self.in_a_row = 0 if metrics.samples else self.in_a_row + len(bad)
        self.trained = self.trained or metrics.samples > 0
        if self.in_a_row >= HOPELESS or (self.step == self.progress.steps and not self.trained):
            raise BadRecord(
                f"update {self.step}: none of the last {self.in_a_row} records could be used; "
                f"{self.run.folder / 'skipped.jsonl'} lists them. Mend the data set, or name another; such as\n"
                f"  {bad[0][1]}"
            )


def _tree(pieces: Sequence[Piece]) -> TensorDict:
    """The tree of pieces that are whole tensors."""
    out = TensorDict({})
    for piece in pieces:
        out[piece.path] = piece.value
    return out


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` means, None for a fresh start. ValueError if it is not there, or is in the way.

    It first removes what a killed process left half done.
    """
    checkpoints = folder / "checkpoints"
    checkpoint.clean(checkpoints)
    found = checkpoint.steps(checkpoints)
    if resume == "no" and found:
        raise ValueError(f"{folder} already holds a run; choose another run folder, or resume=auto")
    if resume in ("no", "auto"):
        return checkpoint.at(checkpoints, found[-1]) if found else None
    path = checkpoint.at(checkpoints, int(resume)) if resume.isdigit() else Path(resume)
    if not path.is_dir():
        raise ValueError(f"resume={resume}: there is no {path}; {folder} has the steps {found}")
    return path
