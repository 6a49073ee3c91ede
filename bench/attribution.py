"""Does influence predict what training without some records would have done? Retrain, and see.

    python bench/attribution.py

A base model is trained on half of the emoji captions. Adapters and the projector are then trained on RECORDS captions
that it has not seen, and the influence of each on held-out captions is taken: tracin, gauss_newton, and baselines
without gradients (nearest captions, nearest features of pictures, nearest hidden states). Then they are trained again
on random halves of the records. Printed are

    the linear datamodel score (Park et al. 2023, arXiv 2303.14186): over the halves, the rank correlation of the sum of
    the influences of a half's records with the log-probability that training on the half gives; mean over captions
    leave-out: the rise of a caption's loss without the 10 % of the records that raised it most, and without as many
    random ones

It takes some seven minutes of one core.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from tensordict import TensorDict
from torch import Tensor

from llava_fn import config, llava, lora, optim, spec, tree
from llava_fn.batch import Sample, collate
from llava_fn.data import emoji, records
from llava_fn.data.options import Data, Source
from llava_fn.data.tokenizer import read_tokenizer
from llava_fn.study import influence
from llava_fn.study.attribution import gradients
from llava_fn.study.gradients import Studied
from llava_fn.study.options import Gradients
from llava_fn.train import Task, TrainState, train_step, trains

C, ADAPTERS = config.LLAVA_EMOJI, config.Lora(rank=8, alpha=16.0)
BASE = optim.Optim(lr=2e-3, warmup=0.05, beta2=0.98, weight_decay=2.0)
STUDENT = optim.Optim(lr=2e-3, warmup=0.05, beta2=0.98)


@dataclass(frozen=True)
class Bench:
    """One comparison."""

    data: Path = Path("runs/emoji-data")
    records: int = 400  # trained on after the base
    captions: int = 40  # held out, whose log-probability is predicted
    subsets: int = 32  # retrained halves
    left_out: int = 8  # captions for which the records that raised it most are left out
    epochs: int = 8
    rank: int = 16  # of the projection
    threads: int = 1


def load(c: Bench) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Samples of the base, of the student, and held-out ones, each named by its number."""
    folder = emoji.unpack(c.data)
    how = records.preparation(
        read_tokenizer(folder / "tokenizer.model"), C.vision.image, C.vision.patches, Data(max_tokens=64)
    )
    train, held = (
        [records.sample(r, how) for r in records.read(Source(folder / f"{name}.json", folder))]
        for name in ("train", "heldout")
    )
    order, some = np.random.default_rng(0).permutation(len(train)), np.random.default_rng(1).permutation(len(held))
    half = len(train) // 2
    chosen = (order[:half], train), (order[half : half + c.records], train), (some[: c.captions], held)
    base, student, queries = ([replace(of[j], record=str(i)) for i, j in enumerate(js)] for js, of in chosen)
    return base, student, queries


def fit(
    params: TensorDict, samples: Sequence[Sample], parts: Sequence[str], o: optim.Optim, epochs: int, size: int
) -> tuple[TensorDict, list[tuple[float, TensorDict]]]:
    """The trained parameters, and (rate, parameters) at five checkpoints. size: samples of an update."""
    mine, frozen = tree.split(params, trains(parts))
    mine = tree.rebuild(mine, [x.clone() for x in tree.values(mine)])
    per = -(-len(samples) // size)
    kept, steps = [], epochs * per
    task = Task(frozen, C, o, steps, lora=ADAPTERS if "lora" in parts else None)
    state = TrainState(0, mine, optim.init(mine))
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(samples))
        for rows in np.array_split(order, per):
            state, metrics = train_step(state, [collate([samples[j] for j in rows])], task)
            if state.step in {steps * part // 8 for part in (1, 3, 5, 7, 8)}:
                copied = tree.rebuild(state.params, [x.clone() for x in tree.values(state.params)])
                kept.append((metrics.lr, tree.merge(copied, frozen)))
    return tree.merge(state.params, frozen), kept


@torch.no_grad()
def logprobs(params: TensorDict, samples: Sequence[Sample]) -> np.ndarray:
    """Of each sample's caption, in nats."""
    p = lora.attach(params, ADAPTERS)
    return np.array([-float(llava.nll(p, collate([s]), C).sum()) for s in samples])


def by_number(model: Studied, samples: Sequence[Sample], g: Gradients) -> Tensor:
    """Projected gradients, f[n, d], in the order of the samples."""
    numbers, _, taken = gradients(model, samples, g)
    return taken[torch.tensor(numbers).argsort()]


def influences(kept: list, student: list[Sample], queries: list[Sample], rank: int) -> dict[str, Tensor]:
    """Name of the method -> fp32[captions, records]."""
    out: dict[str, Tensor] = {}
    for parts in (("projector",), ("lora",), ("projector", "lora")):
        for rate, params in kept:
            model, g = Studied(params, C, ADAPTERS), Gradients(parts, rank, batch=20)
            of, q = by_number(model, student, g), by_number(model, queries, g)
            one = {"tracin": rate * influence.tracin(lambda of=of: [of], q)}
            for damping in (0.1, 1.0, 10.0):
                name = f"gauss_newton, damping {damping:g}"
                one[name] = influence.gauss_newton(lambda of=of: [of], q, damping)
            for name, scores in one.items():
                name = f"{name}, {'+'.join(parts)}"
                out[f"{name}, 5 checkpoints"] = out.get(f"{name}, 5 checkpoints", torch.zeros(())) + scores
                out[f"{name}, the last"] = scores
    return out


@torch.no_grad()
def baselines(params: TensorDict, student: list[Sample], queries: list[Sample]) -> dict[str, Tensor]:
    """Without gradients: how near each record is to each caption, [captions, records]."""
    p = lora.attach(params, ADAPTERS)
    words = [[{t for t, on in zip(s.ids, s.label, strict=True) if on} for s in of] for of in (student, queries)]
    rows = {
        "nearest features": [
            torch.stack([llava.features(p, s.pixels, C).flatten() for s in of]) for of in (student, queries)
        ],
        "nearest hidden states": [
            torch.stack([llava.forward(p, collate([s]), C).mean(0) for s in of]) for of in (student, queries)
        ],
    }
    near = {name: torch.cosine_similarity(q[:, None], of[None], dim=-1) for name, (of, q) in rows.items()}
    return {"nearest captions": torch.tensor([[len(a & b) / len(a | b) for b in words[0]] for a in words[1]]), **near}


def ranks(x: np.ndarray) -> np.ndarray:
    """Rank of each entry in its column."""
    return x.argsort(0).argsort(0).astype(float)


def score(predicted: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Mean over captions of Spearman's correlation over subsets, and its standard error. Both: [subsets, captions]."""
    pairs = zip(ranks(predicted).T, ranks(found).T, strict=True)
    each = [float(np.corrcoef(a, b)[0, 1]) for a, b in pairs]
    return float(np.mean(each)), float(np.std(each) / len(each) ** 0.5)


def main(c: Bench) -> None:
    """Print both tables."""
    torch.set_num_threads(c.threads)
    began = time.process_time()
    base, student, queries = load(c)
    parts, size = ("projector", "lora"), 20
    start, _ = fit(spec.init(llava.spec(C), 42), base, config.STAGES["all"], BASE, 15, 32)
    start = tree.merge(start, spec.init({"lora": lora.spec(llava.spec(C), ADAPTERS)}, 0))
    whole, kept = fit(start, student, parts, STUDENT, c.epochs, size)
    before, after = logprobs(start, queries), logprobs(whole, queries)
    print(f"loss of a held-out caption: base {-before.mean():.3f}, trained {-after.mean():.3f} nats", flush=True)
    methods = influences(kept, student, queries, c.rank) | baselines(whole, student, queries)

    def without(gone: np.ndarray) -> np.ndarray:
        rest = np.setdiff1d(np.arange(len(student)), gone)
        return logprobs(fit(start, [student[j] for j in rest], parts, STUDENT, c.epochs, size)[0], queries)

    halves = [np.random.default_rng([7, m]).permutation(len(student))[: len(student) // 2] for m in range(c.subsets)]
    found = np.stack([without(gone) for gone in halves])
    masks = np.stack([~np.isin(np.arange(len(student)), gone) for gone in halves]).astype(float)
    print(f"| influence | linear datamodel score over {c.subsets} halves of {len(student)} records |\n|---|---|")
    for name, scores in sorted(methods.items(), key=lambda pair: -score(masks @ pair[1].numpy().T, found)[0]):
        mean, error = score(masks @ scores.numpy().T, found)
        print(f"| {name} | {mean:.3f} +- {error:.3f} |", flush=True)
    k = len(student) // 10
    random = np.mean([without(np.random.default_rng([8, m]).permutation(len(student))[:k]) for m in range(4)], 0)
    print(f"\nrise of the loss without {k} records, mean of {c.left_out} captions, in nats")
    for name in ("gauss_newton, damping 1, lora, 5 checkpoints", "nearest captions"):
        top = methods[name].argsort(1, descending=True)[: c.left_out, :k].numpy()
        rise = [float(after[q] - without(gone)[q]) for q, gone in enumerate(top)]
        print(f"  {name}: {np.mean(rise):.3f}; random: {np.mean((after - random)[: c.left_out]):.3f}", flush=True)
    print(f"{c}\n{time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
