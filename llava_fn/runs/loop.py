"""What a training loop does besides computing: data to the device, figures, comparisons, checkpoints, the watchdog."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_fn.batch import Batch
from llava_fn.data.records import Step
from llava_fn.launch import agreement
from llava_fn.parallel.collectives import texts
from llava_fn.runs import report
from llava_fn.runs.progress import Progress
from llava_fn.train import Metrics, TrainState

if TYPE_CHECKING:
    from llava_fn.runs.run import Run


@dataclass(frozen=True)
class Update:
    """This process's batches of one update, on its device, and its records that could not be used.

    start: time.monotonic() when the data were asked for. wait: seconds until they came.
    """

    batches: list[Batch]
    bad: tuple[tuple[str, str], ...]
    start: float
    wait: float


@dataclass
class Loop:
    """The services of a run's loop. skipped: records left out so far."""

    run: Run
    progress: Progress
    check_interval: int
    skipped: int

    def updates(self, steps: Iterable[Step]) -> Iterator[Update]:
        """The data of each update."""
        start = time.monotonic()
        for step in steps:
            wait = time.monotonic() - start
            self.run.watch.begin(f"update {step.step}")
            yield Update([batch.to(self.run.world.device) for batch in step.batches], step.bad, start, wait)
            self.run.watch.begin(f"data {step.step + 1}")
            start = time.monotonic()

    def record(self, state: TrainState, metrics: Metrics, update: Update) -> None:
        """After an update: log and show its figures; compare the ranks' copies and save a checkpoint where one is due.

        ValueError if copies have drifted apart, OSError if the disk is full.
        """
        run, device, seconds = self.run, self.run.world.device, time.monotonic() - update.start
        everywhere = texts(json.dumps(update.bad) if update.bad else "", run.world.mesh.dp, device)
        bad = [tuple(pair) for text in everywhere if text for pair in json.loads(text)]
        self.skipped += len(bad)
        memory = report.memory(device)
        if run.world.first:
            row = dataclasses.asdict(metrics) | {"seconds": seconds, "wait": update.wait, "memory_gib": memory}
            run.log(state.step, row, bad)
        rates = f"{metrics.tokens / seconds:.0f} tokens/s {metrics.samples / seconds:.1f} samples/s"
        skipped = f" skipped {self.skipped}" if self.skipped else ""
        figures = f"loss {metrics.loss:.3f} {rates} wait {update.wait / seconds:.0%} {memory:.1f} GiB{skipped}"
        self.progress.show(state.step, figures)
        if run.zero.level == 0 and state.step % self.check_interval == 0:
            agreement.check_params("the parameters", state.params, run.zero, device)
        if state.step % run.saving.save_interval == 0 or state.step == self.progress.steps:
            run.watch.begin(f"checkpoint {state.step}")
            run.save(state)
