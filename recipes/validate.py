"""Read a whole data set as training would, before a long run does: every record, every image, every token.

Prints how many records are fine, a histogram of their lengths, and each bad record with what is wrong with it. Ends
with exit code 1 if there is one. The embedded data set is checked without arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_fn.config import LLAVA_EMOJI, Vision
from llava_fn.data.options import Data, Source
from llava_fn.launch import cli


@dataclass(frozen=True)
class Files:
    """The data set that is checked."""

    records: Path | None = None  # a JSON list, or JSON lines; train.json of the unpacked data set, unless given
    images: Path | None = None  # the folder that "image" of the records is relative to; the unpacked one, unless given


@dataclass(frozen=True)
class Validate:
    """What is checked, and for which model."""

    source: Files = Files()
    tokenizer: Path | None = None  # a sentencepiece model; that of the unpacked data set, unless given
    unpack: Path | None = Path("runs/emoji-data")  # where to put the data set that comes with the package, if anywhere
    vision: Vision = LLAVA_EMOJI.vision
    data: Data = Data(workers=1)  # template, image mode, longest sample; its sources are not read

    def __post_init__(self) -> None:
        if self.unpack is None and None in (self.source.records, self.source.images, self.tokenizer):
            raise ValueError("give --source.records, --source.images and --tokenizer, or --unpack a folder")


def main(c: Validate) -> None:
    """Print the report. ValueError if a record is bad."""
    # imports stand where they are used: torch takes seconds, and --help does without
    from llava_fn.data import emoji, records
    from llava_fn.data.check import check, histogram
    from llava_fn.data.tokenizer import read_tokenizer
    from llava_fn.runs.progress import Progress

    folder = emoji.unpack(c.unpack) if c.unpack else Path()
    source = Source(c.source.records or folder / "train.json", c.source.images or folder)
    tokenizer = read_tokenizer(c.tokenizer or folder / "tokenizer.model")
    preparation = records.preparation(tokenizer, c.vision.image, c.vision.patches, c.data)
    rows, figures = records.read(source), []
    with Progress(0, len(rows)) as progress:
        for chunk in check(rows, preparation, c.data.workers):
            figures += chunk
            progress.show(len(figures), "records")

    good, bad = [x for x in figures if not x.error], [x.error for x in figures if x.error]
    print(f"{source.records}: {len(good)} of {len(figures)} records are fine")
    if good:
        lengths = [x.tokens for x in good]
        targets = sum(x.targets for x in good)
        print(f"tokens of a record, image positions included; {targets} of {sum(lengths)} are targets")
        print(histogram(lengths))
    if bad:
        raise ValueError(f"{len(bad)} bad records; mend them, or train with on_bad_record=skip\n  " + "\n  ".join(bad))


if __name__ == "__main__":
    cli.run(main, cli.command(Validate, __doc__))
