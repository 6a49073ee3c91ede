"""Ranks that save one sharded checkpoint after another are killed at random instants; what is visible must be whole.

python tests/checkpoint_kills.py FOLDER KILLS [SEED]
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from llava_fn import config, spec, tree
from llava_fn.checkpoint import boxes, shares
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.boxes import Piece

MODEL = config.Llava(
    config.Vision(image=16, patch=8, width=16, blocks=2, heads=2, ffn=32),
    config.Llama(vocab=64, width=16, blocks=1, heads=2, kv_heads=1, ffn=32),
)
PARTS = ("projector", "llama")


def manifest(step: int) -> checkpoint.Manifest:
    return checkpoint.Manifest(MODEL, PARTS, "square", "plain", None, step)


def trees(step: int) -> list:
    """Parameters and moments of a step."""
    parts = checkpoint.spec_of(manifest(step))
    return [spec.init(parts, 3 * step + kind) for kind in range(3)]


def share(params, rank: int, world: int) -> list[Piece]:
    out = []
    for path, value in zip(tree.paths(params), tree.values(params), strict=True):
        step = -(-len(value) // world)
        start, stop = (min(len(value), edge) for edge in (rank * step, (rank + 1) * step))
        out.append(Piece(path, tuple(value.shape), ((start, stop), *boxes.whole(value.shape)[1:]), value[start:stop]))
    return out


def train(folder: Path, rank: int, world: int, step: int) -> None:
    """Save step after step for ever, in a thread, as a rank does; the next begins when all see this one."""
    with shares.Background() as saver:
        while True:
            of = [share(params, rank, world) for params in trees(step)]
            saver.start(f"step {step}", lambda of=of, step=step: save(folder, rank, world, of, step))
            while not checkpoint.at(folder, step).exists():
                time.sleep(0.001)
            step += 1


def save(folder: Path, rank: int, world: int, of: list, step: int) -> None:
    shares.write_share(checkpoint.at(folder, step), rank, of[0], (of[1], of[2]))
    if rank == 0:
        shares.commit(checkpoint.at(folder, step), world, manifest(step), b"words", 60)
        for old in checkpoint.steps(folder)[:-2]:
            checkpoint.remove(checkpoint.at(folder, old))


def fork(folder: Path, rank: int, world: int, step: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            train(folder, rank, world, step)
        finally:
            os._exit(1)
    return pid


def check(folder: Path) -> int:
    """Load every visible checkpoint and compare it with what its step wrote. -> how many there are."""
    steps = checkpoint.steps(folder)
    for step in steps:
        loaded = checkpoint.load(checkpoint.at(folder, step), moments=True)
        assert loaded.manifest == manifest(step)
        for have, want in zip((loaded.params, *loaded.moments), trees(step), strict=True):
            assert tree.paths(have) == tree.paths(want)
            assert all(map(torch.equal, tree.values(have), tree.values(want))), step
    return len(steps)


def campaign(folder: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """Start 1 to 3 ranks, kill them, check, tidy up, go on. -> how often a save was cut, checkpoints looked at."""
    rng, cut, whole = random.Random(seed), 0, 0
    for _ in range(kills):
        world, step = rng.randint(1, 3), max(checkpoint.steps(folder), default=0)
        ranks = [fork(folder, rank, world, step + 1) for rank in range(world)]
        while max(checkpoint.steps(folder), default=0) == step:  # they are under way
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        for pid in rng.sample(ranks, world):
            os.kill(pid, signal.SIGKILL)
            time.sleep(rng.choice([0, 0.01]))
        for pid in ranks:
            os.waitpid(pid, 0)
        cut += any(folder.glob(".*"))
        whole += check(folder)
        checkpoint.clean(folder)
        assert not any(folder.glob(".*")) and check(folder) >= 1
    return cut, whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    killed = int(sys.argv[2])
    found = campaign(Path(sys.argv[1]), killed, *map(int, sys.argv[3:]))
    print(f"{killed} kills, {found[0]} of them in the midst of a save; {found[1]} checkpoints were whole")
