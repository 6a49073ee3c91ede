"""What the functional style costs the host: the tree work of one training step, against the step itself.

    python bench/overhead.py --model prop

The tree work is what `train_step` does besides tensor arithmetic: cast and merge trees, walk down to every leaf of
every block once, differentiate with respect to the trainable leaves, rebuild the tree of gradients. It is timed with a
loss that touches one number of each trainable leaf. CPU seconds, one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import tyro
from step import MODELS, Bench, make_samples, our_step

from llava_fn import config, llava, optim, spec, tree
from llava_fn.batch import collate
from llava_fn.grad import value_and_grad
from llava_fn.train import trains


def walk(params, frozen):
    """As `train.loss`, without the model."""
    both = tree.merge(tree.cast(params, torch.float32), frozen)
    for part in ("vision", "llama"):
        for i in range(len(both[part]["blocks"].keys())):
            block = both[part]["blocks"][str(i)]
            for name in block.keys():
                block[name]
    return sum(leaf.flatten()[0] for leaf in tree.values(params)), None


def median_seconds(fn: Callable[[int], object], rounds: int) -> float:
    """Of CPU time, over calls with rising numbers from 1 on, the first left out."""
    times = []
    for number in range(1, rounds + 2):
        began = time.process_time()
        fn(number)
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


def main(c: Bench) -> None:
    """Print both times and their ratio."""
    torch.set_num_threads(1)
    model = MODELS[c.model]
    params = spec.init(llava.spec(model), 0)
    mine, frozen = tree.split(params, trains(config.STAGES[c.stage]))
    step = our_step(params, collate(make_samples(model, c.stage, c.samples)), model, c, optim.Optim(lr=1e-4))
    whole = median_seconds(step, c.rounds)
    trees = median_seconds(lambda _: value_and_grad(walk)(mine, frozen), 5 * c.rounds)
    print(f"{c.model} {c.stage}: step {whole:.3f} s, tree work {1e3 * trees:.1f} ms, {trees / whole:.2%}")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
