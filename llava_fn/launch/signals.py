"""The signals by which a cluster takes a machine back: they are noted, and the loop of a run asks for them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# the status with which a run ends that was stopped by each
STATUS: dict[int, int] = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGUSR1: 0}


@dataclass
class Noted:
    """number: of the signal that came last; 0: none has come."""

    number: int = 0

    def __call__(self, number: int, _: object) -> None:
        """Note a signal; this is the handler."""
        self.number = number
        name = signal.Signals(number).name
        print(f"{name}: the run stops after this update, with a checkpoint", file=sys.stderr, flush=True)


@contextmanager
def noted() -> Iterator[Noted]:
    """While the body runs, SIGTERM and SIGUSR1 do not end this process. Only the main thread may call this."""
    handler = Noted()
    before = {number: signal.signal(number, handler) for number in STATUS}
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)
