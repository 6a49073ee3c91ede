"""What a run's checkpoints say of each training record, to find wrong labels: losses, gradient norm, forgetting.

loss           nats per labelled token at the last checkpoint; mean_loss: over all checkpoints
worst_token    the loss of the record's worst token, in which a wrong word stands out of a long answer, over that of the
               median record at the same checkpoint, at least FLOOR; mean over all checkpoints, which thus weigh alike
gradient_norm  of the loss at the last checkpoint, of the chosen parts
forgotten      how often a record that a checkpoint has right, each token the most probable one, is wrong at the next
learned        whether any checkpoint has it right (both: Toneva et al. 2019, arXiv 1812.05159, at checkpoints, not at
               each update)
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from llava_fn import llama, llava, lora
from llava_fn.batch import Batch
from llava_fn.kernels import cross_entropy
from llava_fn.study.attribution import pictures, turns
from llava_fn.study.gradients import Studied, owners, per_sample, sites
from llava_fn.study.store import Figures, Store
from llava_fn.study.subject import Subject, batches

FLOOR = 0.1  # nats


@dataclass(frozen=True)
class Signals:
    """The figures of one record; see the module's table. number: among all records that the run trained on."""

    number: int
    record: str
    worst_token: float
    loss: float
    mean_loss: float
    gradient_norm: float
    forgotten: int
    learned: bool
    text: str  # the answers


@torch.no_grad()
def told(model: Studied, batch: Batch) -> Tensor:
    """fp32[n, 3] of each sample: mean and largest loss of its labelled tokens, and whether each is most probable."""
    p = lora.attach(model.params, model.lora)
    logits = llama.logits(p["llama"], llava.forward(p, batch, model.config)[batch.labelled], model.config.llama)
    nll, right = cross_entropy(logits, batch.targets), logits.argmax(1) == batch.targets
    owner, n = owners(batch), len(batch.records)
    mean, worst = (nll.new_zeros(n).scatter_reduce(0, owner, nll, how, include_self=False) for how in ("mean", "amax"))
    every = nll.new_ones(n).scatter_reduce(0, owner, right.to(nll), "amin")
    return torch.stack([mean, worst, every], 1).float()


def chunk(subject: Subject, models: Sequence[Studied], parts: Sequence[str], size: int, chosen: range) -> Figures:
    """Figures of one chunk: `told` of each of m checkpoints, fp32[n, m, 3], and `norm` of the gradient, fp32[n].

    size: samples in memory at a time. NaN for a record that is left out.
    """
    samples, _ = subject.samples(chosen)
    out = {"told": torch.full((len(chosen), len(models), 3), torch.nan), "norm": torch.full((len(chosen),), torch.nan)}
    for batch in batches(samples, size, models[-1].device):
        rows = torch.tensor([int(name) for name in batch.records]) - chosen.start
        out["told"][rows] = torch.stack([told(model, batch) for model in models], 1).cpu()
        whole = per_sample(models[-1], batch, sites(models[-1], parts), mean=True)
        out["norm"][rows] = whole.flat().norm(dim=1).cpu()
    return out


def signals(subject: Subject, kept: Store, order: str) -> list[Signals]:
    """Of all records that could be used, the largest `order`, a field of Signals, first."""
    said, norm = (torch.cat(list(kept.read(name))) for name in ("told", "norm"))
    loss, worst, right = said.unbind(2)
    worst = worst / worst.nanmedian(0).values.clamp(min=FLOOR)
    forgotten = ((right[:, :-1] == 1) & (right[:, 1:] == 0)).sum(1)
    rows = []
    for i in norm.isfinite().nonzero()[:, 0].tolist():
        record = subject.record(i)
        answers = " | ".join(said for who, said in turns(record) if who == "gpt")
        figures = float(worst[i].mean()), float(loss[i, -1]), float(loss[i].mean()), float(norm[i])
        rows.append(Signals(i, record.name, *figures, int(forgotten[i]), bool(right[i].any()), answers))
    return sorted(rows, key=lambda row: -getattr(row, order))


def table(rows: Iterable[Signals]) -> str:
    """Tab-separated values with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Signals)], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


@dataclass(frozen=True)
class Suspect:
    """One record on the page."""

    name: str
    text: list[tuple[str, str]]
    pictures: list[str]
    signals: Signals


def suspect(subject: Subject, row: Signals) -> Suspect:
    """What the page shows of a record."""
    record = subject.record(row.number)
    return Suspect(record.name, turns(record), pictures(record), row)
