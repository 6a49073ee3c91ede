"""A watchdog that ends a run in which a process hangs, and names that process.

A collective that never returns cannot say which rank is missing. So each process announces its phases (`Watch.begin`),
and a thread of it publishes the phase in torchrun's store. When a process has been in one phase for too long, its
thread prints the phase of every rank and its own stacks, and ends the process. The watchdog does not depend on the
backend, so it works where the collective's own time limit does not.
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

from torch.distributed.distributed_c10d import Store

from llava_fn.launch.processes import World

PERIOD = 1.0  # seconds between two looks
STATUS = 124  # exit status of a process that the watchdog ended, as of timeout(1)
Beat = tuple[int, str, int]  # a rank's heartbeat: number of phases begun, name of the last one, pulses of its thread


@dataclass
class Watch:
    """The phase of this process: the only state that the watchdog's thread and the training loop share."""

    phase: str = "start"
    number: int = 0  # phases begun
    since: float = 0.0  # time.monotonic() when this one began

    def begin(self, phase: str) -> None:
        """This process begins a phase, such as "update 12"."""
        self.phase, self.number, self.since = phase, self.number + 1, time.monotonic()


@contextlib.contextmanager
def watching(world: World, limit: float) -> Iterator[Watch]:
    """A Watch that ends this process after `limit` seconds in one phase. A process alone is not watched."""
    watch = Watch(since=time.monotonic())
    if world.store is None:
        yield watch
        return
    axis, over = world.mesh.all, threading.Event()
    store = world.store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # torch's stub lacks it
    args = (watch, store, axis.rank, axis.size, limit, over)
    thread = threading.Thread(target=_look, args=args, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def _look(watch: Watch, store: Store, rank: int, world: int, limit: float, over: threading.Event) -> None:
    pulse, period = 0, min(PERIOD, limit / 4)
    while not over.wait(period):
        pulse += 1
        store.set(f"rank/{rank}", json.dumps([watch.number, watch.phase, pulse]))
        if time.monotonic() - watch.since > limit:
            before = _beats(store, world)
            time.sleep(3 * period)
            _end(before, _beats(store, world), rank, limit)


def _beats(store: Store, world: int) -> list[Beat]:
    keys = [f"rank/{r}" for r in range(world)]
    return [tuple(json.loads(store.get(key))) if store.check([key]) else (0, "start", 0) for key in keys]


def _end(before: list[Beat], now: list[Beat], rank: int, limit: float) -> None:
    print(report(before, now, rank, limit), file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(STATUS)


def report(before: list[Beat], now: list[Beat], rank: int, limit: float) -> str:
    """The message that names the ranks for which the others wait, from the heartbeat of each rank a moment ago and now.

    They are the ranks whose threads publish nothing any more, because a process was stopped or its machine is gone. If
    there is none, they are the ranks that have begun the fewest phases. `rank`, this process, is never a silent one.
    """
    silent = [r for r, (a, b) in enumerate(zip(before, now, strict=True)) if a[2] == b[2] and r != rank]
    least = min(number for number, _, _ in now)
    held = silent or [r for r, (number, _, _) in enumerate(now) if number == least]
    gone = ", and it is not heard of any more" if silent else ""
    places = ", ".join(f"rank {r} in {now[r][1]!r}{gone}" for r in held)
    others = sorted({name for r, (_, name, _) in enumerate(now) if r not in held})
    waiting = f"; the others are in {', '.join(map(repr, others))}" if others else ""
    return (
        f"watchdog of rank {rank}: nothing has moved for {limit:g} s: {places}{waiting}. This process ends, its stacks "
        "follow. Where a phase may take that long, raise --parallel.silence"
    )
