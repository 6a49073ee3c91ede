"""How far long work has come: a line that renews itself on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 10.0  # between two lines where there is no terminal


class Progress:
    """One line that renews itself on a terminal, plain lines now and then elsewhere. A context manager."""

    def __init__(self, start: int, steps: int) -> None:
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self.start, self.steps, self.began, self.last = start, steps, time.monotonic(), float("-inf")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, step: int, text: str) -> None:
        """After update number `step`; text: its figures."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.last >= LOG_SECONDS or step == self.steps:
            left = (now - self.began) / (step - self.start) * (self.steps - step)
            print(f"step {step}/{self.steps} {text} ETA {left:.0f} s", file=sys.stderr, flush=True)
            self.last = now


class Bytes:
    """Progress of a long copy: a bar with rate and ETA on a terminal, plain lines elsewhere. A context manager."""

    def __init__(self, total: int) -> None:
        on_terminal = sys.stderr.isatty()
        wide = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "dynamic_ncols": True}
        self.bar = tqdm(total=total, **wide) if on_terminal else None
        self.total, self.done, self.began = total, 0, time.monotonic()
        self.last = self.began

    def __enter__(self) -> Bytes:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(size)
        elif now - self.last >= LOG_SECONDS or (self.done == self.total and now - self.began >= LOG_SECONDS):
            rate = self.done / (now - self.began)
            left = (self.total - self.done) / rate
            print(
                f"{self.done / 2**30:.2f}/{self.total / 2**30:.2f} GiB {rate / 2**20:.0f} MiB/s ETA {left:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            self.last = now
