"""Ends a run in which a process hangs, and names it: a collective that never returns cannot say who is missing.

Each process says what it begins (`Watch.begin`), and a thread tells the others through the store of torchrun. When a
process has been in one phase for too long, its thread prints where everybody is, then its own stacks, and ends it; so
do the others'. It needs nothing of the backend, so that it works where the collective's own time limit does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from llava_fn.launch.processes import World

PERIOD = 1.0  # seconds between two looks
STATUS = 124  # of a process that was ended, as of timeout(1)
Heard = tuple[int, str, int]  # of a rank: phases begun, the last one's name, looks that its thread has taken


@dataclass
class Watch:
    """Where this process is: the only state that the thread and the training loop share."""

    phase: str = "start"
    number: int = 0  # of phases begun
    since: float = 0.0

    def begin(self, phase: str) -> None:
        """From now on this process does `phase`, such as "update 12"."""
        self.phase, self.number, self.since = phase, self.number + 1, time.monotonic()


@contextlib.contextmanager
def watching(world: World, limit: float) -> Iterator[Watch]:
    """A Watch that ends this process after `limit` seconds in one phase. A process alone is not watched."""
    watch = Watch(since=time.monotonic())
    if world.store is None:
        yield watch
        return
    axis, over = world.mesh.all, threading.Event()
    args = (watch, world.store.clone(), axis.rank, axis.size, limit, over)
    thread = threading.Thread(target=_look, args=args, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def _look(watch: Watch, store: dist.Store, rank: int, world: int, limit: float, over: threading.Event) -> None:
    pulse, period = 0, min(PERIOD, limit / 4)
    while not over.wait(period):
        pulse += 1
        store.set(f"rank/{rank}", json.dumps([watch.number, watch.phase, pulse]))
        if time.monotonic() - watch.since > limit:
            before = _heard(store, world)
            time.sleep(3 * period)
            _end(before, _heard(store, world), rank, limit)


def _heard(store: dist.Store, world: int) -> list[Heard]:
    keys = [f"rank/{r}" for r in range(world)]
    return [tuple(json.loads(store.get(key))) if store.check([key]) else (0, "start", 0) for key in keys]


def _end(before: list[Heard], now: list[Heard], rank: int, limit: float) -> None:
    print(report(before, now, rank, limit), file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(STATUS)


def report(before: list[Heard], now: list[Heard], rank: int, limit: float) -> str:
    """Who keeps the others waiting, from what was heard of each rank a moment ago and now.

    That is a process whose thread says nothing any more, if there is one: it was stopped, or its machine is gone. Else
    it is one that has begun the fewest phases. This rank itself has just been heard.
    """
    silent = [r for r, (a, b) in enumerate(zip(before, now, strict=True)) if a[2] == b[2] and r != rank]
    least = min(number for number, _, _ in now)
    held = silent or [r for r, (number, _, _) in enumerate(now) if number == least]
    gone = ", and it is not heard of any more" if silent else ""
    said = ", ".join(f"rank {r} in {now[r][1]!r}{gone}" for r in held)
    others = sorted({name for r, (_, name, _) in enumerate(now) if r not in held})
    waiting = f"; the others are in {', '.join(map(repr, others))}" if others else ""
    return (
        f"watchdog of rank {rank}: nothing has moved for {limit:g} s: {said}{waiting}. This process ends, its stacks "
        "follow. Where a phase may take that long, raise --parallel.silence"
    )
