"""Everything worth measuring on one card, by one command: tables for RESULTS.md, with the targets of a 7B on an H200.

    python bench/card.py
    python bench/card.py --parts stage1 decoding --seconds 300
    python bench/card.py --device cpu --tiny

Each part (bench/parts.py) is a process of its own with a time limit of its own: one that crashes or hangs costs its own
rows. Rows are shown as they come; all are written to OUT/card.jsonl, as tables to OUT/card.md, and what else is printed
to OUT/card.log. Nothing is read but the package: weights are random and made on the device; those that are decoded and
served are written to OUT/weights first (14 GB), and removed at the end. `tiny` takes the emoji model: it shows that the
code runs, and nothing else. Needs the extras test and serve. The exit status is 1 if a part failed.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import tyro

from llava_fn.bringup.process import run
from llava_fn.kernels import check

SCRIPT = Path(__file__).with_name("parts.py")
LIMITS = {  # seconds of a part at most; the order is that of worth
    "machine": 60, "parity": 60, "stage1": 150, "decoding": 300, "serving": 300, "stage2": 120, "operations": 150,
    "peers": 300,
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What is measured, where, and for how long."""

    device: Literal["cuda", "npu", "cpu"] = "cuda"
    parts: tuple[str, ...] = tuple(LIMITS)
    seconds: float = 1500  # of all parts; those for which no time is left are left out, and named
    tiny: bool = False
    out: Path = Path("card")

    def __post_init__(self) -> None:
        if wrong := set(self.parts) - set(LIMITS):
            raise ValueError(f"parts={', '.join(sorted(wrong))}: no such part; there are: {', '.join(LIMITS)}")


def keep(line: str, rows: IO[str]) -> None:
    """Show a row, and write it down."""
    rows.write(line)
    rows.flush()
    print(", ".join(f"{name} {value}" for name, value in json.loads(line).items()), flush=True)


def main(c: Card) -> int:
    """Run the parts one after another."""
    c.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + c.seconds, {}
    options = ["--device", c.device, "--weights", str(c.out / "weights"), *["--tiny"] * c.tiny]
    with open(c.out / "card.jsonl", "w") as rows, open(c.out / "card.log", "w") as log:
        for name in c.parts:
            limit = min(LIMITS[name] * (3 if c.tiny else 1), end - time.monotonic())  # a CPU may be busy
            command = [sys.executable, str(SCRIPT), name, *options]
            why = run(command, limit, lambda line: keep(line, rows), log) if limit > 5 else "no time was left"
            if why:
                failed[name] = why
                print(f"{name}: {why}; see {log.name}", file=sys.stderr)
    shutil.rmtree(c.out / "weights", ignore_errors=True)
    found = [json.loads(line) for line in (c.out / "card.jsonl").read_text().splitlines()]
    tables = [f"## {name}\n\n{check.show(own)}\n" for name in c.parts if (own := of(found, name))]
    tables += [f"{name}: {why}\n" for name, why in failed.items()]
    (c.out / "card.md").write_text(text := "\n".join(tables))
    print(f"\n{text}")
    return int(bool(failed))


def of(rows: list[dict], name: str) -> list[dict]:
    """The rows of a part."""
    return [{key: value for key, value in row.items() if key != "part"} for row in rows if row["part"] == name]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Card, description=__doc__)))
