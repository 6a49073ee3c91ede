"""Find the training records that made a run's model say an answer.

    python recipes/attribute.py --run runs/emoji --image cat.png --out why.html

The gradient of every training record is projected at random and kept in a store on disk, once for each checkpoint; the
command goes on where it was stopped, and torchrun shares the records out to processes. Further answers of the run then
take seconds. The page shows the ten records that raised the answer's probability most, and the ten that lowered it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llava_fn.launch import cli
from llava_fn.study.options import Gradients, Method


@dataclass(frozen=True)
class Attribute:
    """Which answer of which run is looked into, and how."""

    run: Path  # the folder of recipes/pretrain.py or recipes/finetune.py
    out: Path  # the page
    image: tuple[Path, ...] = ()
    prompt: str = ""  # "<image>" in it places an image; without it, images stand in front
    answer: str = ""  # instead of the model's own
    steps: tuple[int, ...] = ()  # of the run's checkpoints; all that it has, unless given
    method: Method = "gauss_newton"
    damping: float = 1.0  # of gauss_newton, in mean eigenvalues of the matrix that is inverted
    gradients: Gradients = Gradients()
    store: Path | None = None  # gradients/ in the run's folder, unless given
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping}; it must be above 0")


def main(c: Attribute) -> None:
    """Fill the stores, and write the page."""
    # imports stand where they are used: torch takes seconds, and --help does without
    from functools import partial

    from llava_fn.data import records
    from llava_fn.launch.device import pick_device
    from llava_fn.launch.processes import replicas
    from llava_fn.runs import page
    from llava_fn.runs.progress import Progress
    from llava_fn.study import attribution
    from llava_fn.study.subject import open_run

    device, subject, g = pick_device(c.device), open_run(c.run, c.steps), c.gradients
    asked = attribution.question(c.image, c.prompt, c.answer or "?")
    records.encode(asked, subject.preparation)  # a question that the run's template cannot take is refused now
    models = subject.models(device)
    rates = attribution.rates(subject, models[-1], g) if c.method == "tracin" else None
    with replicas(device) as axis:
        folder = c.store or c.run / "gradients"
        stores = [attribution.store(subject, opened, g, folder) for opened in subject.checkpoints]
        for kept, model in zip(stores, models, strict=True):
            with kept.open(axis), Progress(0, subject.count) as progress:
                kept.fill(partial(attribution.chunk, subject, model, g), axis, progress.show)
        if axis.rank:
            return

    answer = c.answer or attribution.answered(subject, models[-1], asked)
    sample = records.sample(attribution.question(c.image, c.prompt, answer), subject.preparation)
    taken = [attribution.gradients(model, [replace(sample, record="0")], g) for model in models]
    queries, loss = [gradient for _, _, gradient in taken], float(taken[-1][1])
    (scores,) = attribution.influences(stores, queries, c.damping, rates)
    raised, lowered = attribution.influential(subject, stores[-1], scores)
    text = page.render(
        "study/attribution.html", run=c.run, count=subject.count, steps=subject.steps, answer=answer, prompt=c.prompt,
        pictures=attribution.pictures(asked), loss=loss, method=c.method, damping=c.damping, parts=g.parts,
        numbers=queries[-1].shape[1], raised=raised, lowered=lowered,
    )  # fmt: skip
    c.out.write_text(text, encoding="utf-8")
    print(answer)
    for sign, rows in (("+", raised), ("-", lowered)):
        for row in rows[:3]:
            print(f"  {sign} {row.share:+.2f}  {row.name}: {row.text[-1][1]}")
    print(f"{c.out}: the {len(raised)} and {len(lowered)} records with the largest influence of {subject.count}")


if __name__ == "__main__":
    cli.run(main, cli.command(Attribute, __doc__))
