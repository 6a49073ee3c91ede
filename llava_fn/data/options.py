"""The options of training data, and the largest image.

Nothing here imports torch, so that a recipe can show its options at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MAX_PIXELS = 89_478_485
"""Largest width * height that open_image decodes. It is the size above which Pillow warns of a decompression bomb, so
every image that Pillow would warn about is refused here, and no global of Pillow is changed."""


READINGS = ("original", "hf", "shown")
"""How an image file becomes an image. original: as LLaVA, which ignores EXIF's orientation and shows the colour under
transparent pixels; hf: as transformers' load_image, which turns the image as EXIF says; shown: as a viewer shows it,
turned, and on white."""


@dataclass(frozen=True)
class Source:
    """One data set in LLaVA's layout."""

    records: Path  # a JSON list, or JSON lines
    images: Path  # the folder that the records' "image" is relative to
    weight: float = 1.0  # how often an epoch shows each record; 0.5 shows every second one, drawn anew each epoch

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"{self.records}: weight={self.weight}; a weight is 0 or more")


@dataclass(frozen=True)
class Data:
    """What is read, in which order, and how it is cut into updates. Defaults: LLaVA-1.5 pre-training."""

    sources: tuple[Source, ...] = ()
    template: str = "plain"
    compat: Literal["llava_437", "llava_431", "legacy"] | None = None  # a historical tokenization; see text.py
    image_mode: Literal["square", "pad"] = "square"
    image_reading: Literal["original", "hf", "shown"] = (
        "original"  # of EXIF's orientation and transparency; shown: as a viewer shows the image
    )
    max_tokens: int = 2048  # of one sample, image positions included; a longer record is a bad record
    samples: int = 256  # per update; ignored where `tokens` is set
    tokens: int = 0  # per update at most: as many samples as fit, in order; 0: count samples instead
    accumulate: int = 1  # micro-batches that an update is computed in
    epochs: float = 1.0
    on_bad_record: Literal["error", "skip"] = "error"  # skip: left out and listed in the run's skipped.jsonl
    workers: int = 4  # processes that decode and tokenize; 0: a thread of this one
    seed: int = 42

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("tokens", 0), ("accumulate", 1), ("workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}; it must be at least {least}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"data.epochs={self.epochs}; it must be above 0")
