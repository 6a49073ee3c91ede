"""Read a whole data set as training would, before a long run does: every record, every image, every token.

Prints what is in it: lengths, turns, text alone, copies, keys that are not read, marks of other tools, odd images, and
what training would take; and each bad record with what is wrong with it. `--json FILE` and `--html FILE` write the same
for programs and, with pictures of the oddest images, for people. Ends with exit code 1 if there is a bad record. The
embedded data set is checked without arguments.
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
    data: Data = Data(workers=1)  # template, image mode, longest sample, samples of an update; its sources are not read
    rate: float = 0.0  # tokens a second that a run of yours shows in its log, for an estimate of the hours
    json: Path | None = None  # write the report here, for programs
    html: Path | None = None  # and here as one page, for people

    def __post_init__(self) -> None:
        if self.unpack is None and None in (self.source.records, self.source.images, self.tokenizer):
            raise ValueError("give --source.records, --source.images and --tokenizer, or --unpack a folder")


def main(c: Validate) -> None:
    """Print the report. ValueError if a record is bad."""
    # imports stand where they are used: torch takes seconds, and --help does without
    import json

    from llava_fn.data import emoji, records, survey
    from llava_fn.data.check import check
    from llava_fn.data.tokenizer import read_tokenizer
    from llava_fn.runs.progress import Progress
    from llava_fn.runs.survey import survey_page

    folder = emoji.unpack(c.unpack) if c.unpack else Path()
    source = Source(c.source.records or folder / "train.json", c.source.images or folder)
    tokenizer = read_tokenizer(c.tokenizer or folder / "tokenizer.model")
    preparation = records.preparation(tokenizer, c.vision.image, c.vision.patches, c.data)
    rows, found = records.read(source), survey.Survey(c.vision.image)
    with Progress(0, len(rows)) as progress:
        for chunk in check(rows, preparation, c.data.workers):
            found.add(chunk)
            progress.show(found.count, f"records, {len(found.bad)} bad")

    estimate = survey.estimate(found, c.data, c.rate)
    summary = survey.summary(found, rows, records.unread([rows]), estimate)
    print(f"{source.records}: {survey.text(summary)}")
    if c.json:
        c.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if c.html:
        c.html.write_text(survey_page(found, summary, str(source.records), c.data), encoding="utf-8")
    if bad := found.bad:
        raise ValueError(f"{len(bad)} bad records; mend them, or train with on_bad_record=skip\n  " + "\n  ".join(bad))


if __name__ == "__main__":
    cli.run(main, cli.command(Validate, __doc__))
