"""A whole data set read as training reads it: every record, every image, every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llava_fn.data.records import Preparation, Record, sample
from llava_fn.data.workers import mapped
from llava_fn.errors import BadRecord

CHUNK = 64  # records that a worker process checks at a time


@dataclass(frozen=True)
class Figures:
    """Of one record. tokens: with image positions; targets: those of them that are trained on; error: what is wrong."""

    tokens: int
    targets: int
    error: str = ""


@dataclass(frozen=True)
class _Check:
    records: Sequence[Record]
    preparation: Preparation

    def __call__(self, numbers: range) -> list[Figures]:
        return [self.one(self.records[i]) for i in numbers]

    def one(self, record: Record) -> Figures:
        try:
            prepared = sample(record, self.preparation)
        except BadRecord as error:
            return Figures(0, 0, str(error))
        return Figures(len(prepared.ids), sum(prepared.label))


def check(records: Sequence[Record], preparation: Preparation, workers: int) -> Iterator[list[Figures]]:
    """The figures of all records, in order, a chunk at a time, from worker processes."""
    chunks = [range(i, min(i + CHUNK, len(records))) for i in range(0, len(records), CHUNK)]
    return mapped(_Check(records, preparation), chunks, workers)


def histogram(lengths: Sequence[int], bins: int = 12) -> str:
    """Lines of a text histogram."""
    width = max(1, -(-(max(lengths) - min(lengths) + 1) // bins))
    counts = Counter((n - min(lengths)) // width for n in lengths)
    most = max(counts.values())
    rows = [(min(lengths) + j * width, counts[j]) for j in range(max(counts) + 1)]
    return "\n".join(f"{low:>6}-{low + width - 1:<6} {n:>8} {'#' * round(50 * n / most)}" for low, n in rows)
