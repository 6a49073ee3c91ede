"""The options of a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, what is in them, and which one a run starts from."""

    save_interval: int = 500  # updates; the last update is always saved
    keep: int = 2  # newest checkpoints that stay; 0: all
    background: bool = False  # go on training while a checkpoint is written, from a copy in the machine's memory
    save_optim: bool = True  # without, a checkpoint is for inference: training cannot go on exactly
    load_optim: bool = True  # without, AdamW's moments start from zero again
    resume: str = "auto"  # auto: the newest checkpoint of the run, if any; no; a step, and those after it are dropped;
    # or a checkpoint's path


@dataclass(frozen=True)
class Heldout:
    """Records that are never trained on: those of a file, or a share of each source. Without either there are none."""

    records: Path | None = None  # a file in LLaVA's layout
    images: Path | None = None  # the folder that its images are relative to; else that of the file
    share: float = 0.0  # of the records of each source
    interval: int = 500  # updates between two losses on them; there is one with every checkpoint too
    most: int = 512  # records that such a loss is of, evenly chosen
    answers: int = 300  # records that are answered at the end, evenly chosen

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"heldout.share={self.share}; it must be at least 0 and below 1")
        if self.records and self.share:
            raise ValueError("heldout.records and heldout.share are two ways to hold records out; give one of them")
        for name in ("interval", "most", "answers"):
            if getattr(self, name) < 1:
                raise ValueError(f"heldout.{name}={getattr(self, name)}; it must be at least 1")
