"""A whole data set read as training reads it: every record, every image, every token."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from llava_fn.data import image, schema, text
from llava_fn.data.records import Preparation, Record, sample
from llava_fn.data.workers import mapped
from llava_fn.errors import BadRecord, TooLong

CHUNK = 64  # records that a worker process checks at a time


@dataclass(frozen=True)
class ImageFacts:
    """One image file. digest: of its content. notes: "rotated" by EXIF, "transparent", "one colour" without alpha."""

    path: str
    digest: int
    width: int
    height: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """Of one record. tokens: with image positions; targets: those of them that are trained on.

    digest: of all that training sees of the record but pixels. marks: of other tools in its texts. error: what is wrong
    with it; then all but `long` is empty. long: whether it has too many tokens and is else fine.
    """

    tokens: int = 0
    targets: int = 0
    turns: int = 0
    images: tuple[ImageFacts, ...] = ()
    digest: int = 0
    marks: tuple[str, ...] = ()
    error: str = ""
    long: bool = False


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
            return Figures(error=str(error), long=isinstance(error, TooLong))
        looks = tuple(look(record.images / path) for path in text.images_of(record.value))
        seen = json.dumps([record.value.get(key) for key in schema.USED])
        turns = len(record.value["conversations"])
        digest, marks = _digest(seen.encode()), tuple(sorted(marks_of(record.value)))
        return Figures(len(prepared.ids), sum(prepared.label), turns, looks, digest, marks)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def marks_of(record: Mapping[str, Any]) -> set[str]:
    """The marks of other tools in the texts of a record."""
    return {found[0] for turn in record["conversations"] for found in schema.FOREIGN.finditer(turn["value"])}


def look(path: Path) -> ImageFacts:
    """What a picture that can be used looks like, beside its pixels."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content), formats=image.FORMATS) as img:
        width, height = img.size
        notes = ["rotated"] if img.getexif().get(ExifTags.Base.Orientation, 1) != 1 else []
        img.draft("RGB", (64, 64))  # a JPEG need not be decoded in full
        if img.has_transparency_data and np.asarray(img.convert("RGBA").getchannel("A")).min() < 255:
            notes.append("transparent")
        rgb = np.asarray(image.to_rgb(img, str(path)))
        if (rgb.min((0, 1)) == rgb.max((0, 1))).all():
            notes.append("one colour")
    return ImageFacts(str(path), _digest(content), width, height, tuple(notes))


def check(records: Sequence[Record], preparation: Preparation, workers: int) -> Iterator[list[Figures]]:
    """The figures of all records, in order, a chunk at a time, from worker processes."""
    chunks = [range(i, min(i + CHUNK, len(records))) for i in range(0, len(records), CHUNK)]
    return mapped(_Check(records, preparation), chunks, workers)
