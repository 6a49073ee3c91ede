"""Rank a run's training records by what its checkpoints say of them, to find wrong labels.

    python recipes/score_data.py --run runs/emoji --out runs/emoji/scores

One pass over the records, at every checkpoint that the run has (a run keeps all with --saving.keep 0): the loss, the
loss of the worst token, the norm of the gradient, and how often a record was forgotten. It goes on where it was
stopped, and torchrun shares the records out to processes. Writes OUT.tsv with all records, and OUT.html with the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_fn.launch import cli
from llava_fn.study.options import Order

TITLES = {
    "worst_token": "loss of the worst token", "loss": "loss", "mean_loss": "mean loss over the checkpoints",
    "gradient_norm": "gradient", "forgotten": "number of times that they were forgotten",
}  # fmt: skip


@dataclass(frozen=True)
class ScoreData:
    """Which run's records are ranked, and by what."""

    run: Path  # the folder of recipes/pretrain.py or recipes/finetune.py
    out: Path  # without an ending
    order: Order = "worst_token"  # the largest first
    most: int = 80  # records on the page
    steps: tuple[int, ...] = ()  # of the run's checkpoints; all that it has, unless given
    parts: tuple[str, ...] = ("projector",)  # whose weights the gradient's norm is of
    batch: int = 16  # samples in memory at a time
    store: Path | None = None  # signals/ in the run's folder, unless given
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"

    def __post_init__(self) -> None:
        for name in ("most", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")


def main(c: ScoreData) -> None:
    """Fill the store, and write the table and the page."""
    # imports stand where they are used: torch takes seconds, and --help does without
    from functools import partial

    from llava_fn.launch.device import pick_device
    from llava_fn.launch.processes import replicas
    from llava_fn.runs import page
    from llava_fn.runs.progress import Progress
    from llava_fn.study import signals
    from llava_fn.study.store import Store
    from llava_fn.study.subject import open_run

    device, subject = pick_device(c.device), open_run(c.run, c.steps)
    models, checkpoints = subject.models(device), subject.checkpoints
    key = {"checkpoints": [x.fingerprint for x in checkpoints], "data": checkpoints[-1].manifest.data}
    kept = Store(c.store or c.run / "signals", key | {"parts": c.parts}, subject.count)
    with replicas(device) as axis, kept.open(axis), Progress(0, subject.count) as progress:
        kept.fill(partial(signals.chunk, subject, models, c.parts, c.batch), axis, progress.show)
        if axis.rank:
            return

    rows = signals.signals(subject, kept, c.order)
    table, html = c.out.with_name(c.out.name + ".tsv"), c.out.with_name(c.out.name + ".html")
    table.write_text(signals.table(rows), encoding="utf-8")
    bars = [page.histogram("Loss of the worst token", "times the median record's", [row.worst_token for row in rows])]
    bars.append(page.histogram("Norm of the gradient", "nats per unit of weight", [row.gradient_norm for row in rows]))
    text = page.render(
        "study/signals.html", run=c.run, steps=subject.steps, count=len(rows), order=c.order, title=TITLES[c.order],
        histograms=bars, top=max(getattr(rows[0], c.order), 1e-30),
        suspects=[signals.suspect(subject, row) for row in rows[: c.most]],
    )  # fmt: skip
    html.write_text(text, encoding="utf-8")
    for row in rows[:10]:
        print(f"  {getattr(row, c.order):.3g}  {row.record}: {row.text}")
    print(f"{table}: all {len(rows)} records; {html}: the first {min(c.most, len(rows))}")


if __name__ == "__main__":
    cli.run(main, cli.command(ScoreData, __doc__))
