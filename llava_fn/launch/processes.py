"""The processes that torchrun starts: the variables that it sets, their mesh, and where their output goes."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from llava_fn.launch.ascend import HCCL_MARGIN, hccl_seconds, is_integer
from llava_fn.parallel.collectives import total
from llava_fn.parallel.mesh import Axis, Mesh, check_world, gloo, make_mesh

T = TypeVar("T")
BACKENDS = {"npu": "hccl", "cuda": "nccl"}  # the CPU has mesh.gloo
WAIT = timedelta(minutes=10)  # limit of a collective, but on NPUs; other ranks may still be reading weights
LONG_WAIT = timedelta(days=7)  # where ranks have unequal work; if one dies, torchrun ends the others


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started: its place in their mesh, and its device.

    store: torchrun's, for what all processes may read; None for a process alone. attempt: a word that all processes of
    this launch share, and no other launch has.
    """

    device: torch.device = torch.device("cpu")
    mesh: Mesh = Mesh()
    store: Store | None = None
    attempt: str = ""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes a run's files and shows its results."""
        return self.mesh.all.rank == 0

    def in_turn(self, make: Callable[[], T]) -> T:
        """make() on rank 0 and then on the others, which find on the disk what rank 0 left there."""
        results = [make()] if self.first else []
        total(torch.zeros(1, device=self.device), self.mesh.all)
        return results[0] if self.first else make()


def check_processes(tp: int, environ: Mapping[str, str] = os.environ, alone: bool = False) -> int:
    """The number of processes. alone: whether there must be exactly `tp`, and not a multiple.

    ValueError on every process, before any collective, if tp does not divide their number or crosses machines, if a
    variable of torchrun is missing, and if torchrun's restarts are set up so that processes would not find each other.
    """
    wrong = [name for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE") if not is_integer(environ.get(name, "1"), 1)]
    if wrong:
        raise ValueError(f"{wrong[0]}={environ[wrong[0]]!r} is no number of processes; torchrun sets it, or nobody")
    world, local = (int(environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if alone and world != tp:
        several = f"torchrun --nproc-per-node {tp} RECIPE ... --tp {tp}"
        command = several if tp > 1 else f"without torchrun, or with --tp {world}"
        raise ValueError(f"tp={tp} but WORLD_SIZE={world}: one process for each part of the model; start it {command}")
    check_world(world, tp, local if "LOCAL_WORLD_SIZE" in environ else world)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if world > 1 and missing:
        names = ", ".join(missing)
        raise ValueError(f"WORLD_SIZE={world} but {names} is not set; torchrun sets them, start it with that")
    restarts = environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise ValueError(
            f"torchrun --max-restarts {restarts}: processes that it starts again would look for each other at the old "
            "addresses; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, with --rdzv-backend c10d"
        )
    return world


@contextlib.contextmanager
def processes(tp: int, device: torch.device, logs: Path | None = None, alone: bool = False) -> Iterator[World]:
    """Join the processes that torchrun started as a mesh of dp x `tp`; without torchrun, a World of this process.

    device: as `pick_device` gives it; from here on it means the card of this process. Output of ranks above 0 goes to
    logs/rank-00001.log and so on, without `logs` nowhere; an error that ends such a rank is still printed. alone and
    ValueError: as of `check_processes`; ValueError also if a machine has fewer cards than processes. After an error the
    group is not destroyed, since another rank may wait in a collective: torchrun ends that rank.
    """
    if check_processes(tp, alone=alone) == 1:
        yield World(device)
        return
    with _joined(device, BACKENDS.get(device.type) or gloo(), collective_limit(device), logs) as store:
        mesh = make_mesh(tp)
        for axis in (mesh.dp, mesh.tp, mesh.all):  # connect now, not in the middle of the first update
            total(torch.zeros(1, device=device), axis)
        attempt = "-".join(os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
        yield World(device, mesh, store, attempt)


def collective_limit(device: torch.device, environ: Mapping[str, str] = os.environ) -> timedelta:
    """The time limit of the process group. On NPUs HCCL's own, HCCL_EXEC_TIMEOUT, holds: the group's is longer."""
    if device.type != "npu":
        return WAIT
    seconds = hccl_seconds(environ)
    return timedelta(seconds=seconds + HCCL_MARGIN) if seconds else LONG_WAIT


@contextlib.contextmanager
def replicas(device: torch.device) -> Iterator[Axis]:
    """Join the processes that torchrun started as replicas: each has a whole model and a device of its own.

    Without torchrun, an axis of one. Replicas wait for each other only in `meet`, so their group is one of the hosts
    (gloo) with a long limit. Ranks above 0 print nothing, except an error that ends them. ValueError as of `processes`.
    """
    if check_processes(1) == 1:
        yield Axis("dp")
        return
    with _joined(device, gloo(), LONG_WAIT, None):
        yield Axis("dp", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


@contextlib.contextmanager
def _joined(device: torch.device, backend: str, wait: timedelta, logs: Path | None) -> Iterator[Store]:
    """Join the group of all processes, take this one's card, and redirect its output if its rank is above 0.

    Gives a store that all processes share.
    """
    if device.type != "cpu":
        _take_card(device, int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(rendezvous("env://", timeout=WAIT))
    shared = PrefixStore("llava_fn", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    with contextlib.ExitStack() as stack:
        if rank:
            out = stack.enter_context(open(_log(logs, rank), "a", buffering=1))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(out))
        yield shared
    dist.destroy_process_group()


def _log(logs: Path | None, rank: int) -> Path:
    if logs is None:
        return Path(os.devnull)
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"rank-{rank:05d}.log"


def meet(axis: Axis) -> None:
    """A barrier: wait until every rank of the axis has called this."""
    if axis.size > 1:
        dist.barrier(axis.group)


def _take_card(device: torch.device, local: int) -> None:
    cards = torch.get_device_module(device).device_count()
    if local >= cards:
        raise ValueError(f"process {local} of this machine finds {cards} {device.type} card(s); start one for each")
    torch.get_device_module(device).set_device(local)
