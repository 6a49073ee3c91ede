"""Two processes of one machine: every collective that the model uses, and updates against those of one process.

    python -m llava_fn.bringup.ranks DEVICE

is one of the two, as `start` starts it. Rank 0 prints the rows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from llava_fn import batch, train
from llava_fn.bringup import tiny
from llava_fn.bringup.process import show, telling
from llava_fn.launch.device import pick_device
from llava_fn.launch.processes import processes
from llava_fn.parallel import collectives
from llava_fn.parallel.mesh import Axis, Mesh, make_mesh

GRACE = 10.0  # seconds for the other rank to end by itself after an error of one


def start(device: torch.device) -> None:
    """Runs both to their end. RuntimeError names those that failed first; the other is killed then.

    The store takes a free port as it binds it, as torchrun's own does: no other program can take that port in between.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    command = [sys.executable, "-X", "faulthandler", "-m", "llava_fn.bringup.ranks", device.type]
    both = [subprocess.Popen(command, env=os.environ | shared | _of(rank)) for rank in range(2)]
    while any(p.poll() is None for p in both) and not any(p.poll() for p in both):
        time.sleep(0.1)
    failed = [f"rank {rank} ended with status {p.returncode}" for rank, p in enumerate(both) if p.poll()]
    for p in both:
        try:
            p.wait(GRACE)
        except subprocess.TimeoutExpired:
            p.kill()
    if failed:
        raise RuntimeError(", ".join(failed))


def _of(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def calls(axis: Axis, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(collective and dtype, its result, what it must be) on this rank. A rank holds 0 1 2 ..., plus its number."""
    rank = axis.rank
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        base = torch.arange(8, device=device).to(dtype)
        mine, both, everything = base + rank, 2 * base + 1, torch.cat([base, base + 1])
        half = both.chunk(2)[rank]
        yield f"all-reduce, {dtype}", collectives.total(mine, axis), both
        yield f"all-gather, {dtype}", collectives.gather(mine, axis, 0), everything
        yield f"reduce-scatter, {dtype}", collectives.scatter(mine, axis, 0), half
        yield f"all-reduce of several, {dtype}", torch.cat(collectives.summing([mine, mine], axis)()), both.repeat(2)
        several = torch.cat(collectives.gathering([mine, mine], axis)())
        yield f"all-gather of several, {dtype}", several, everything.repeat(2)
        several = torch.cat(collectives.scattering([mine, mine], axis)())
        yield f"reduce-scatter of several, {dtype}", several, half.repeat(2)
        yield f"broadcast, {dtype}", collectives.agree(mine, axis), base


def check(world: Mesh, device: torch.device) -> Iterator[dict]:
    """Rows of this rank. RuntimeError names a collective with a wrong result."""
    for name, found, want in calls(world.all, device):
        if not torch.equal(found, want):
            raise RuntimeError(f"rank {world.all.rank}: {name} gives {found.tolist()}, must be {want.tolist()}")
        yield {"what": name}
    texts = collectives.texts(f"rank {world.all.rank}", world.all, device)
    yield {"what": "texts", "ok": texts == ["rank 0", "rank 1"]}
    size = 1 << (20 if device.type == "cpu" else 26)
    seconds = timed(lambda: collectives.total(torch.zeros(size, device=device), world.all), device)
    yield {"what": "all-reduce, fp32", "MB": 4 * size / 1e6, "ms": 1e3 * seconds}
    alone = updates(Mesh(), device)
    for name, mesh, level in (("dp=2, ZeRO 1", world, 1), ("dp=2, ZeRO 3", world, 3), ("tp=2", make_mesh(2), 1)):
        pairs = zip(updates(mesh, device, level), alone, strict=True)
        off = max(abs(a - b) / abs(b) for a, b in pairs)
        yield {"what": f"losses and norms of two updates, {name}", "off by": off, "limit": 1e-3, "ok": off <= 1e-3}


def updates(mesh: Mesh, device: torch.device, level: int = 0) -> list[float]:
    """Loss and norm of the gradients of two updates with the same four samples, on any mesh."""
    state, task = tiny.task(device, mesh=mesh, level=level)
    mine = tiny.samples(4)[mesh.dp.rank :: mesh.dp.size]
    many, out = [batch.collate(mine, mesh.tp.size).to(device)], []
    for _ in range(2):
        state, seen = train.train_step(state, many, task)
        out += [seen.loss, seen.grad_norm]
    return out


def timed(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the second call, to its end on the device."""
    call()[:1].cpu()
    began = time.perf_counter()
    call()[:1].cpu()
    return time.perf_counter() - began


def main(device: str) -> None:
    """This rank's part."""
    with telling("two-ranks"), processes(1, pick_device(device)) as world:
        for row in check(world.mesh, world.device):
            if world.first:
                show("two-ranks", row)


if __name__ == "__main__":
    main(sys.argv[1])
