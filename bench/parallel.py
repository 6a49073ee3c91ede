"""Throughput of several processes against one, and what the parallel code costs where there is only one.

    torchrun --standalone --nproc-per-node 2 bench/parallel.py --model prop

Every process has the same number of samples a step, and on a CPU one thread. The first process alone, all at the same
time but each for itself, and all together take turns; the ratios are of samples a second. The second of them is what
the machine has to give: processes share its memory, and a virtual core is not a core. Then the first process steps
alone with ZeRO-1 on a mesh of one, against a step without any sharding, and counts what both call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from step import MODELS, make_samples
from torch.utils._python_dispatch import TorchDispatchMode
from weights import random

from llava_fn import config, llava, optim, tree
from llava_fn.batch import collate
from llava_fn.launch import processes
from llava_fn.launch.device import pick_device
from llava_fn.parallel.collectives import total
from llava_fn.parallel.mesh import Mesh
from llava_fn.parallel.zero import Zero
from llava_fn.train import Task, TrainState, train_step, trains


@dataclass(frozen=True)
class Bench:
    """One comparison."""

    model: Literal["brief", "prop", "7b"] = "prop"
    stage: Literal["projector", "projector+llama"] = "projector+llama"
    samples: int = 4  # a step and process
    tp: int = 1
    zero: Literal[0, 1, 3] = 1
    recompute: bool = False
    rounds: int = 7
    device: Literal["cpu", "cuda", "npu"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"


class Operations(TorchDispatchMode):
    """Counts them, and the collectives among them."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.collectives = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.collectives += func.namespace in ("_c10d_functional", "c10d")
        return func(*args, **(kwargs or {}))


def counted(step: Callable[[], float]) -> Operations:
    """What one step calls."""
    with Operations() as seen:
        step()
    return seen


def stepper(c: Bench, mesh: Mesh, level: int) -> Callable[[], float]:
    """A step on this mesh, which returns its seconds."""
    model, parts = MODELS[c.model], config.STAGES[c.stage]
    device, dtype = torch.device(c.device), getattr(torch, c.dtype)
    zero, trained = Zero(llava.spec(model), mesh, level, dtype, train=parts), trains(parts)
    mine, frozen = tree.split(random(model, device, dtype, trained, mesh), trained)
    mine = zero.store(mine)
    run = llava.execution(c.recompute, "", zero, model.vision)
    task = Task(frozen, model, optim.Optim(lr=1e-4), 100, zero, run=run)
    state = [TrainState(0, mine, optim.init(mine))]
    batch = collate(make_samples(model, c.stage, c.samples), mesh.tp.size).to(device)

    def step() -> float:
        began = time.perf_counter()
        state[0], _ = train_step(state[0], [batch], task)  # it ends with numbers on the host
        return time.perf_counter() - began

    return step


def rounds(pair: dict[str, Callable[[], float] | None], mesh: Mesh, many: int, device: str) -> dict[str, float]:
    """Median seconds of steps that take turns; None: a step of the first process alone, which this one waits for."""
    times: dict[str, list[float]] = {name: [] for name in pair}
    for _ in range(many + 1):
        for name, step in pair.items():
            total(torch.zeros(1, device=device), mesh.all)
            times[name].append(step() if step else 0.0)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def main(c: Bench) -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    with processes.processes(c.tp, pick_device(c.device)) as joined:
        mesh, first = joined.mesh, joined.first
        alone = stepper(c, Mesh(), 0)
        if mesh.all.size > 1:
            ways = {"one": alone if first else None, "each": alone, "all": stepper(c, mesh, c.zero)}
            one, each, together = rounds(ways, mesh, c.rounds, c.device).values()
            if first:
                print(
                    f"{c}\none process {c.samples / one:.2f} samples/s, {mesh.all.size} processes (dp={mesh.dp.size}, "
                    f"tp={mesh.tp.size}) {mesh.dp.size * c.samples / together:.2f}; ratio "
                    f"{mesh.dp.size * one / together:.2f}; each for itself {mesh.all.size * one / each:.2f}",
                    flush=True,
                )
        sharded = stepper(c, Mesh(), 1) if first else None
        seconds = rounds({"plain": alone if first else None, "ZeRO-1": sharded}, mesh, c.rounds, c.device)
        if first:
            plain, zero = counted(alone), counted(sharded)
            print(
                f"mesh of one: ZeRO-1 {seconds['ZeRO-1'] / seconds['plain']:.3f} of plain; {zero.all} operations where "
                f"plain has {plain.all}; {zero.collectives} collectives"
            )


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
