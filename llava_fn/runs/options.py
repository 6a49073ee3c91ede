"""The options of a run's folder."""

from __future__ import annotations

from dataclasses import dataclass


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
