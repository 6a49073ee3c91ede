"""Read a whole data set as training would, before a long run does: every record, every image, every token.

Prints how many records are fine, a histogram of their lengths, and each bad record with what is wrong with it. Ends
with exit code 1 if there is one. The embedded data set is checked without arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from torchdata.nodes import IterableWrapper, Loader, ParallelMapper

from llava_fn import config
from llava_fn.data import emoji
from llava_fn.data import records as data
from llava_fn.data.options import Data, Source
from llava_fn.data.tokenizer import read_tokenizer
from llava_fn.errors import BadRecord
from llava_fn.launch import cli
from llava_fn.runs.progress import Progress


@dataclass(frozen=True)
class Validate:
    """What is checked, and against which model."""

    source: Source = Source(Path("runs/emoji-data/train.json"), Path("runs/emoji-data"))
    tokenizer: Path = Path("runs/emoji-data/tokenizer.model")
    unpack: Path | None = Path("runs/emoji-data")  # where to put the data set that comes with the package, if anywhere
    vision: config.Vision = config.LLAVA_EMOJI.vision
    data: Data = Data(workers=1)  # template, image mode, longest sample; its sources are not read


@dataclass(frozen=True)
class Check:
    """Samples of a chunk of records -> (tokens, labelled tokens, "") of each, or (0, 0, what is wrong)."""

    how: data.Preparation

    def __call__(self, records: Sequence[data.Record]) -> list[tuple[int, int, str]]:
        return [self.one(record) for record in records]

    def one(self, record: data.Record) -> tuple[int, int, str]:
        """The figures of one record."""
        try:
            sample = data.sample(record, self.how)
        except BadRecord as error:
            return 0, 0, str(error)
        return len(sample.ids), sum(sample.label), ""


def results(records: list[data.Record], c: Validate) -> Iterator[tuple[int, int, str]]:
    """The figures of every record, in order, with progress on the way."""
    how = data.preparation(read_tokenizer(c.tokenizer), c.vision.image, c.vision.patches, c.data)
    chunks = IterableWrapper(iter([records[i : i + 64] for i in range(0, len(records), 64)]))
    node = ParallelMapper(chunks, Check(how), c.data.workers, method="process", multiprocessing_context="forkserver")
    done = 0
    with Progress(0, len(records)) as progress:
        for chunk in Loader(node):
            yield from chunk
            done += len(chunk)
            progress.show(done, "records")


def histogram(lengths: Sequence[int], bins: int = 12) -> str:
    """Lines of a text histogram."""
    width = max(1, -(-(max(lengths) - min(lengths) + 1) // bins))
    counts = Counter((n - min(lengths)) // width for n in lengths)
    most = max(counts.values())
    rows = [(min(lengths) + j * width, counts[j]) for j in range(max(counts) + 1)]
    return "\n".join(f"{low:>6}-{low + width - 1:<6} {n:>8} {'#' * round(50 * n / most)}" for low, n in rows)


def main(c: Validate) -> None:
    """Print the report. ValueError if a record is bad."""
    if c.unpack:
        emoji.unpack(c.unpack)
    rows = list(results(data.read(c.source), c))
    good = [row for row in rows if not row[2]]
    bad = [reason for *_, reason in rows if reason]
    print(f"{c.source.records}: {len(good)} of {len(rows)} records are fine")
    if good:
        lengths = [tokens for tokens, _, _ in good]
        targets = sum(labelled for _, labelled, _ in good)
        print(f"tokens of a record, image positions included; {targets} of {sum(lengths)} are targets")
        print(histogram(lengths))
    if bad:
        raise ValueError(f"{len(bad)} bad records; mend them, or train with on_bad_record=skip\n  " + "\n  ".join(bad))


if __name__ == "__main__":
    cli.run(main, tyro.cli(Validate, description=__doc__))
