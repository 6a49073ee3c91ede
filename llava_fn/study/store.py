"""Figures of every record of a data set, on disk: a pass over the data that can be stopped, goes on, and is shared out.

    store/key.json                 what the figures are of: a start with another key is refused
    store/000000.safetensors       the figures of records 0 to `chunk`, an array each, and so on

A process computes the chunks whose number falls to its rank and which are not there; one chunk is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_fn import fields
from llava_fn.checkpoint.folder import appearing
from llava_fn.config import differences
from llava_fn.launch.processes import World, meet
from llava_fn.parallel.mesh import Axis, Mesh
from llava_fn.runs import report
from llava_fn.runs.guard import lock

Figures = Mapping[str, Tensor]  # arrays of f[n, ...] or int64[n], a row for each record


@dataclass(frozen=True)
class Store:
    """The figures of `count` records, in chunks of `chunk`. key: all that they depend on, as JSON holds it."""

    folder: Path
    key: Mapping[str, Any]
    count: int
    chunk: int = 256

    def chunks(self) -> list[range]:
        """The numbers of the records of each chunk."""
        return [range(i, min(i + self.chunk, self.count)) for i in range(0, self.count, self.chunk)]

    def file(self, chunk: int) -> Path:
        """Where a chunk is."""
        return self.folder / f"{chunk:06d}.safetensors"

    @contextmanager
    def open(self, axis: Axis) -> Iterator[None]:
        """Make the folder, or see that it is this store's, and lock it until the end of the body.

        ValueError lists what differs, or names the process that has the lock.
        """
        with lock(self.folder, self.folder / "lock", World(mesh=Mesh(axis, all=axis))):
            if axis.rank == 0:
                self._check()
            meet(axis)
            yield

    def _check(self) -> None:
        path, key = self.folder / "key.json", {**self.key, "records": self.count, "chunk": self.chunk}
        if not path.exists():
            report.write(path, json.dumps(key, indent=1) + "\n")
        elif other := differences(fields.load(path), json.loads(json.dumps(key))):
            lines = "\n  ".join(other)
            raise ValueError(f"{self.folder} holds the figures of something else; name another folder:\n  {lines}")

    def fill(self, compute: Callable[[range], Figures], axis: Axis, show: Callable[[int, str], None]) -> None:
        """Compute the chunks that are missing, each rank its own, and wait for the other ranks. show: progress."""
        numbers = self.chunks()
        for i in range(axis.rank, len(numbers), axis.size):
            if not self.file(i).exists():
                figures = {name: x.contiguous().cpu() for name, x in compute(numbers[i]).items()}
                with appearing(self.file(i)) as part:
                    save_file(figures, part)
            show(numbers[i].stop, "records")
        meet(axis)

    def read(self, name: str) -> Iterator[Tensor]:
        """One array, a chunk at a time, in the order of the records. ValueError if a chunk is missing or damaged."""
        for i in range(len(self.chunks())):
            try:
                with safe_open(self.file(i), "pt") as figures:
                    x = figures.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{self.file(i)}: {error}; delete it, and the same command computes it again"
                ) from error
            yield x
