"""Which training records made a run's model say an answer: projected gradients in stores, influences, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llava_fn import lora
from llava_fn.batch import Sample
from llava_fn.checkpoint.folder import Checkpoint
from llava_fn.config import plain
from llava_fn.data import records, text
from llava_fn.data.records import Record
from llava_fn.data.templates import MARK
from llava_fn.generate import decode
from llava_fn.generate.types import Model
from llava_fn.runs import page
from llava_fn.runs.answers import prompt, spans
from llava_fn.study import influence
from llava_fn.study.gradients import Projection, Studied, bias_of, per_sample, sites
from llava_fn.study.gradients import size as numbers
from llava_fn.study.options import Gradients
from llava_fn.study.store import Figures, Store
from llava_fn.study.subject import Subject, batches, digest

TOP = 10  # records of each kind on the page
SIDE = 256  # pixels of a picture's longer side


def gradients(model: Studied, samples: Sequence[Sample], c: Gradients) -> tuple[list[int], Tensor, Tensor]:
    """Numbers of the samples, their losses fp32[n] in nats, and their projected gradients f[n, d], on the CPU."""
    chosen, by = sites(model, c.parts), Projection(c.rank, c.seed)
    taken = [per_sample(model, batch, chosen, by) for batch in batches(samples, c.batch, model.device)]
    found = [int(name) for some in taken for name in some.records]
    return found, torch.cat([t.loss for t in taken]).cpu(), torch.cat([t.flat() for t in taken]).cpu()


def store(subject: Subject, opened: Checkpoint, c: Gradients, folder: Path) -> Store:
    """Where the gradients of all training records at one checkpoint are."""
    key = {"checkpoint": opened.fingerprint, "data": opened.manifest.data, **plain(c)}
    del key["batch"]  # it changes nothing
    return Store(folder / opened.folder.name, key, subject.count)


def chunk(subject: Subject, model: Studied, c: Gradients, chosen: range) -> Figures:
    """Figures of one chunk: gradients f[n, d], and digest int64[n]; zeros for a record that is left out."""
    samples, _ = subject.samples(chosen)
    taken = torch.zeros(len(chosen), numbers(sites(model, c.parts), Projection(c.rank, c.seed)))
    digests = torch.zeros(len(chosen), dtype=torch.int64)
    if samples:
        found, _, taken[torch.tensor(found) - chosen.start] = gradients(model, samples, c)
        digests[[int(s.record) - chosen.start for s in samples]] = torch.tensor([digest(s) for s in samples])
    return {"gradients": taken, "digest": digests}


def question(images: Sequence[Path], asked: str, answer: str) -> Record:
    """What is asked as a training record: the prompt of the run's template, and the answer that is looked into."""
    marks = "".join(f"{MARK}\n" for _ in images) if MARK not in asked else ""
    turns = [{"from": "human", "value": marks + asked}, {"from": "gpt", "value": answer}]
    paths = [str(path.resolve()) for path in images]
    return Record("the question", Path(), {"image": paths, "conversations": turns})


def answered(subject: Subject, model: Studied, record: Record, limit: int = 128) -> str:
    """The model's own answer, greedily."""
    s = records.sample(record, subject.preparation)
    before = prompt(s, spans(s)[-1][0], model.config.vision.patches)
    before = replace(before, pixels=before.pixels.to(model.device))
    with torch.no_grad():
        params = lora.attach(model.params, model.lora)
        (ids,) = decode.greedy(Model(params, model.config), [before], s.ids[-1], limit)
    return subject.tokenizer.decode(ids).strip()


def rates(subject: Subject, model: Studied, c: Gradients) -> list[Tensor]:
    """The learning rate of each number of a gradient at each checkpoint, fp32[d].

    ValueError if a weight and its bias, whose gradients are one matrix, were trained with rates of their own.
    """
    o, parts = subject.optim, list[tuple[int, float]]()
    for site in sites(model, c.parts):
        bias = (*site.path[:-1], bias_of(site.path[-1]))
        if site.bias and o.rate(bias) != o.rate(site.path):
            raise ValueError(
                f"optim.rates gives {'/'.join(bias)} another learning rate than {'/'.join(site.path)}, and their "
                "gradients are kept as one; use --method gauss_newton, which takes no rates"
            )
        parts.append((numbers([site], Projection(c.rank, c.seed)), o.rate(site.path)))
    return [torch.cat([torch.full((n,), o.scheduled(peak, lr)) for n, peak in parts]) for lr in subject.rates]


def influences(
    stores: Sequence[Store], queries: Sequence[Tensor], damping: float, rates: Sequence[Tensor] | None = None
) -> Tensor:
    """Over all checkpoints, fp32[q, records]. queries: the gradients of the answers, f[q, d], for each checkpoint.

    rates: those of tracin; without them gauss_newton, for which `damping` is.
    """
    gradients = [partial(kept.read, "gradients") for kept in stores]
    if rates is None:
        pairs = zip(gradients, queries, strict=True)
        return torch.stack([influence.gauss_newton(g, q.cpu(), damping) for g, q in pairs]).mean(0)
    triples = zip(gradients, queries, rates, strict=True)
    return torch.stack([influence.tracin(g, q.cpu() * rate) for g, q, rate in triples]).sum(0)


@dataclass(frozen=True)
class Influential:
    """One training record on the page. share: its influence over the largest of any record; text: its turns."""

    name: str
    share: float
    text: list[tuple[str, str]]
    pictures: list[str]


def influential(subject: Subject, kept: Store, scores: Tensor) -> tuple[list[Influential], list[Influential]]:
    """The TOP records that raised the answer most, and those that lowered it most. scores: fp32[records].

    ValueError if one of them is not what its gradient was taken of.
    """
    order = scores.argsort(descending=True).tolist()
    top = max(float(scores.abs().max()), 1e-30)
    digests = torch.cat(list(kept.read("digest")))
    raised = [i for i in order if scores[i] > 0][:TOP]
    lowered = [i for i in order[::-1] if scores[i] < 0][:TOP]

    def one(number: int) -> Influential:
        (s,), _ = subject.samples([number])
        record = subject.record(number)
        if digest(s) != int(digests[number]):
            raise ValueError(f"{record.name} has changed since its gradient was taken; delete {kept.folder}")
        return Influential(record.name, float(scores[number]) / top, turns(record), pictures(record))

    return [one(i) for i in raised], [one(i) for i in lowered]


def turns(record: Record) -> list[tuple[str, str]]:
    """Who says what."""
    return [(turn["from"], turn["value"]) for turn in record.value["conversations"]]


def pictures(record: Record) -> list[str]:
    """The record's images, as data URLs."""
    return [page.small((record.images / name).read_bytes(), SIDE) for name in text.images_of(record.value)]
