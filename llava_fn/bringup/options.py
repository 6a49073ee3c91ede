"""The parts of the first hour, and the options of its command. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

OPERATIONS = (  # cases of kernels/check.py, in order of risk: variable lengths without a mask have failed elsewhere
    "attention, full", "attention, causal", "attention, last rows", "keys and values", "decoding",
    "decoding, in pages", "rotary", "SwiGLU", "RMSNorm",
    "add and RMSNorm", "int8 linear", "cross-entropy", "quick GELU", "GELU", "LayerNorm", "AdamW",
)  # fmt: skip


def slug(case: str) -> str:
    """The name of a case as a word of the command line."""
    return case.lower().replace(",", "").replace(" ", "-")


LIMITS: Mapping[str, int] = MappingProxyType(  # part -> seconds at most, in the order in which they run
    {"environment": 180}
    | {slug(name): 180 for name in OPERATIONS}
    | {"decode-step": 300, "train-step": 300, "host-waits": 300, "two-ranks": 300}
)


@dataclass(frozen=True)
class Options:
    """What is checked, and where the report goes."""

    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    parts: tuple[str, ...] = tuple(LIMITS)
    patience: float = 1.0  # times the limit of each part
    out: Path = Path("llava_fn-check.json")  # the file to attach; it is replaced

    def __post_init__(self) -> None:
        if wrong := [part for part in self.parts if part not in LIMITS]:
            raise ValueError(f"parts={', '.join(wrong)}: no such part; there are: {', '.join(LIMITS)}")
        if not self.patience > 0:
            raise ValueError(f"patience={self.patience}: must be above 0")
