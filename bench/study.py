"""Gradients sample by sample: what they cost beside one ordinary backward pass, and beside a loop over samples.

    python bench/study.py

The projector's gradients of `samples` samples of a model of bench/step.py: ordinary, the gradient of their sum; whole,
that of each sample; projected, rank x rank numbers a layer of each; loop, a backward pass for each of `looped` samples,
scaled up to all. Each runs in a process of its own, in micro-batches of `micro` samples. Printed are CPU seconds, the
peak of memory above that before it began, and what is known of it beforehand: the numbers that the result consists of.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from step import MODELS, make_samples

from llava_fn import llava, spec, tree
from llava_fn.batch import collate
from llava_fn.config import LLAVA_EMOJI
from llava_fn.grad import value_and_grad
from llava_fn.study.gradients import Projection, Studied, per_sample, sites, size

WAYS = ("ordinary", "whole", "projected", "loop")


@dataclass(frozen=True)
class Bench:
    """One comparison."""

    model: Literal["brief", "prop", "wide", "emoji"] = "prop"
    samples: int = 64
    micro: int = 8  # samples of a micro-batch
    looped: int = 8  # samples that the loop is timed on
    rank: int = 16
    threads: int = 1


def measure(c: Bench, way: str, out: multiprocessing.SimpleQueue) -> None:
    """Put (CPU seconds of all samples, MiB above those before, MiB of the result) into `out`."""
    torch.set_num_threads(c.threads)
    config = (MODELS | {"emoji": LLAVA_EMOJI})[c.model]
    samples, params = make_samples(config, "projector", c.samples), spec.init(llava.spec(config), 0)
    mine, frozen = tree.split(params, lambda path: path[0] == "projector")
    model, by = Studied(params, config, None), Projection(c.rank) if way == "projected" else None
    chosen, n = sites(model, ["projector"]), 1 if way == "loop" else c.micro
    ordinary = value_and_grad(lambda p, b: (llava.nll(tree.merge(p, frozen), b, config).sum(), None))
    todo = samples[: c.looped] if way == "loop" else samples
    batches = [collate(todo[i : i + n]) for i in range(0, len(todo), n)]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    kept = []
    for batch in batches:
        if way in ("whole", "projected"):
            kept.append(per_sample(model, batch, chosen, by).flat())
        else:
            (_, grads) = ordinary(mine, batch)
            kept = [*(kept if way == "loop" else []), torch.cat([g.flatten() for g in tree.values(grads)])]
    seconds = (time.process_time() - began) * len(samples) / len(todo)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    numbers = {"ordinary": 1, "loop": c.looped}.get(way, c.samples) * size(chosen, by)
    out.put((seconds, peak, numbers * 4 / 2**20))


def main(c: Bench) -> None:
    """Print a table."""
    context = multiprocessing.get_context("spawn")
    out, first = context.SimpleQueue(), 0.0
    print(
        "| gradients | CPU seconds | of the ordinary | MiB at the peak | of which the result |\n|---|---|---|---|---|"
    )
    for way in WAYS:
        process = context.Process(target=measure, args=(c, way, out))
        process.start()
        seconds, peak, result = out.get()
        process.join()
        first = first or seconds
        print(f"| {way} | {seconds:.1f} | {seconds / first:.2f} | {peak:.0f} | {result:.1f} |", flush=True)
    print(c)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
