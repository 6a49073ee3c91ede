"""The options of looking back on a run's training. Nothing here imports torch, so that recipes show them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["gauss_newton", "tracin"]
Order = Literal["worst_token", "loss", "mean_loss", "gradient_norm", "forgotten"]


@dataclass(frozen=True)
class Gradients:
    """What is taken of each record: the gradient of the summed loss of its answers, of the weights in `parts`."""

    parts: tuple[str, ...] = ("projector",)  # vision, projector, llama, lora, or paths in them
    rank: int = 16  # of the random projection of a layer's inputs, and of its outputs
    seed: int = 0  # of the projection
    batch: int = 16  # samples in memory at a time

    def __post_init__(self) -> None:
        for name in ("rank", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
