"""Progress of long work: a line that renews itself on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 10.0  # between two lines where there is no terminal


class Progress:
    """Progress in steps, with rate and ETA. A context manager."""

    def __init__(self, start: int, steps: int) -> None:
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self.start, self.steps, self.start_time, self.last_line = start, steps, time.monotonic(), float("-inf")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, step: int, text: str) -> None:
        """Show update number `step`. text: its figures."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.last_line >= LOG_SECONDS or step == self.steps:
            left = (now - self.start_time) / (step - self.start) * (self.steps - step)
            print(f"step {step}/{self.steps} {text} ETA {left:.0f} s", file=sys.stderr, flush=True)
            self.last_line = now


class Bytes:
    """Progress of a long copy in bytes, with rate and ETA. A context manager."""

    def __init__(self, total: int) -> None:
        on_terminal = sys.stderr.isatty()
        wide = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "dynamic_ncols": True}
        self.bar = tqdm(total=total, **wide) if on_terminal else None
        self.total, self.done, self.start_time = total, 0, time.monotonic()
        self.last_line = self.start_time

    def __enter__(self) -> Bytes:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, size: int) -> None:
        """Count `size` more bytes as copied."""
        self.done += size
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(size)
        elif now - self.last_line >= LOG_SECONDS or (self.done == self.total and now - self.start_time >= LOG_SECONDS):
            rate = self.done / (now - self.start_time)
            left = (self.total - self.done) / rate
            print(
                f"{self.done / 2**30:.2f}/{self.total / 2**30:.2f} GiB {rate / 2**20:.0f} MiB/s ETA {left:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            self.last_line = now
