"""Does the model look? Its answers to held-out questions, and their loss with the right images and with wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llava
from llava_fn.batch import IMAGE, Sample, collate
from llava_fn.config import Llava
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.generate import decode
from llava_fn.generate.types import Model

CHUNK = 64  # samples at a time


@dataclass(frozen=True)
class Answered:
    """One held-out answer. question: with the template around it; picture: uint8[3, h, w], the last before it."""

    question: str
    truth: str
    answer: str
    picture: Tensor | None


@dataclass(frozen=True)
class Answers:
    """nll: nats per labelled token; shuffled: nll where each image is another sample's; None without images."""

    rows: tuple[Answered, ...]
    nll: float
    shuffled: float | None

    @property
    def exact(self) -> float:
        """Share of answers that are right to the letter."""
        return sum(row.truth == row.answer for row in self.rows) / len(self.rows)


def spans(s: Sample) -> list[tuple[int, int]]:
    """Start and end of each answer in the sample, with the token that ends it."""
    edges = [i for i in range(1, len(s.label)) if s.label[i] != s.label[i - 1]]
    edges += [len(s.label)] * (len(edges) % 2)
    return list(zip(edges[::2], edges[1::2], strict=True))


def prompt(s: Sample, start: int, patches: int) -> Sample:
    """The sample up to the answer that begins at `start`, with the right answers before it."""
    images = s.ids[:start].count(IMAGE) // patches
    return replace(s, ids=s.ids[:start], label=s.label[:start], pixels=s.pixels[:images])


def mean_nll(p: TensorDict, samples: Sequence[Sample], c: Llava) -> float:
    """Nats per labelled token over all samples."""
    device = p["llama", "embed"].device
    chunks = [collate(samples[i : i + CHUNK]).to(device) for i in range(0, len(samples), CHUNK)]
    return torch.cat([llava.nll(p, batch, c) for batch in chunks]).mean().item()


def answer(p: TensorDict, samples: Sequence[Sample], c: Llava, tokenizer: Tokenizer, limit: int = 64) -> Answers:
    """Answer each question of each sample greedily, after the right answers to the questions before it."""
    asked = [(s, start, stop) for s in samples for start, stop in spans(s)]
    prompts = [prompt(s, start, c.vision.patches) for s, start, _ in asked]
    said: list[list[int]] = []
    with torch.no_grad():
        for i in range(0, len(prompts), CHUNK):
            chunk = [replace(s, pixels=s.pixels.to(p["llama", "embed"].device)) for s in prompts[i : i + CHUNK]]
            said += decode.greedy(Model(p, c), chunk, samples[0].ids[-1], limit)
        nll, shuffled = mean_nll(p, samples, c), _shuffled(p, samples, c)
    rows = []
    for (s, start, stop), before, ids in zip(asked, prompts, said, strict=True):
        first = max([0, *(end for _, end in spans(s) if end <= start)])
        question = tokenizer.decode([t for t in s.ids[first:start] if t != IMAGE])
        truth = tokenizer.decode(list(s.ids[start : stop - 1]))
        picture = before.pixels[-1] if len(before.pixels) else None
        rows.append(Answered(question.strip(), truth.strip(), tokenizer.decode(ids).strip(), picture))
    return Answers(tuple(rows), nll, shuffled)


def _shuffled(p: TensorDict, samples: Sequence[Sample], c: Llava) -> float | None:
    """The loss of the samples that have images, each with those of the sample half the list of its like away."""
    by_count: dict[int, list[Sample]] = {}
    for s in samples:
        by_count.setdefault(len(s.pixels), []).append(s)
    swapped = [
        replace(s, pixels=alike[(i + len(alike) // 2) % len(alike)].pixels)
        for count, alike in by_count.items()
        for i, s in enumerate(alike)
        if count and len(alike) > 1
    ]
    return mean_nll(p, swapped, c) if swapped else None
