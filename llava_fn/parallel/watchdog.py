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

PERIOD = 1.0  # seconds between two looks
STATUS = 124  # of a process that was ended, as of timeout(1)


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
def watching(store: dist.Store | None, rank: int, world: int, limit: float) -> Iterator[Watch]:
    """A Watch whose process is ended after `limit` seconds in one phase. store: None, and nothing is watched."""
    watch = Watch(since=time.monotonic())
    if store is None:
        yield watch
        return
    over = threading.Event()
    thread = threading.Thread(target=_look, args=(watch, store.clone(), rank, world, limit, over), daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def _look(watch: Watch, store: dist.Store, rank: int, world: int, limit: float, over: threading.Event) -> None:
    told = -1
    while not over.wait(min(PERIOD, limit / 4)):
        if told != watch.number:
            told = watch.number
            store.set(f"phase/{rank}", json.dumps([told, watch.phase]))
        if time.monotonic() - watch.since > limit:
            _end(store, rank, world, limit)


def _end(store: dist.Store, rank: int, world: int, limit: float) -> None:
    keys = [f"phase/{r}" for r in range(world)]
    phases = [json.loads(store.get(key)) if store.check([key]) else [0, "start"] for key in keys]
    print(report(phases, rank, limit), file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(STATUS)


def report(phases: list[tuple[int, str]], rank: int, limit: float) -> str:
    """phases: (number, name) of what each rank began last. The others wait for those that have begun the fewest."""
    least = min(number for number, _ in phases)
    behind = [f"rank {r} in {name!r}" for r, (number, name) in enumerate(phases) if number == least]
    others = {name for number, name in phases if number > least}
    waiting = f"; the others are in {', '.join(map(repr, sorted(others)))} and wait" if others else ""
    return (
        f"watchdog of rank {rank}: nothing has moved for {limit:g} s; {', '.join(behind)}{waiting}. This process ends; "
        "its stacks follow. A phase that may take longer needs a larger --parallel.silence"
    )
