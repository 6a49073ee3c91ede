"""Does the model look? Captions of held-out images, and their loss with the right image and with a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict

from llava_fn import llava
from llava_fn.batch import Sample, collate
from llava_fn.config import Llava
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.generate import decode
from llava_fn.generate.types import Model

CHUNK = 64  # samples at a time


@dataclass(frozen=True)
class Captions:
    """truth, answers: one text a sample. nll: nats per caption token; shuffled: nll with images of other samples."""

    truth: tuple[str, ...]
    answers: tuple[str, ...]
    nll: float
    shuffled: float

    @property
    def exact(self) -> float:
        """Share of captions that are right to the letter."""
        return sum(a == b for a, b in zip(self.truth, self.answers, strict=True)) / len(self.truth)


def prompt(s: Sample) -> Sample:
    """The sample up to its first labelled token."""
    n = s.label.index(True)
    return replace(s, ids=s.ids[:n], label=s.label[:n])


def target(s: Sample) -> list[int]:
    """The labelled tokens without the last one, which ends the caption."""
    return [t for t, labelled in zip(s.ids, s.label, strict=True) if labelled][:-1]


def mean_nll(p: TensorDict, samples: Sequence[Sample], c: Llava) -> float:
    """Nats per labelled token over all samples."""
    chunks = [collate(samples[i : i + CHUNK]).to(p["projector"]["w1"].device) for i in range(0, len(samples), CHUNK)]
    return torch.cat([llava.nll(p, batch, c) for batch in chunks]).mean().item()


def caption(p: TensorDict, samples: Sequence[Sample], c: Llava, tokenizer: Tokenizer, limit: int = 64) -> Captions:
    """Caption each sample's image greedily and compare with its caption. Each sample holds one image and one caption.

    The shuffled loss gives each sample the image of the sample half the list away.
    """
    half = len(samples) // 2
    swapped = [replace(s, pixels=samples[(j + half) % len(samples)].pixels) for j, s in enumerate(samples)]
    with torch.no_grad():
        answers = []
        for i in range(0, len(samples), CHUNK):
            prompts = [prompt(s) for s in samples[i : i + CHUNK]]
            prompts = [replace(s, pixels=s.pixels.to(p["projector"]["w1"].device)) for s in prompts]
            answers += decode.greedy(Model(p, c), prompts, samples[0].ids[-1], limit)
        nll, shuffled = mean_nll(p, samples, c), mean_nll(p, swapped, c)
    truth = tuple(tokenizer.decode(target(s)) for s in samples)
    return Captions(truth, tuple(map(tokenizer.decode, answers)), nll, shuffled)
