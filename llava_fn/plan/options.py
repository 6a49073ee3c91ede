"""The options of a plan. Nothing here imports torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llava_fn.config import STAGES, Lora, Parallel, Stage

DESCRIPTION = """What one update costs on a cluster, before there is one: memory, traffic, arithmetic, estimated time.

It runs the real train step on tensors without memory, as ranks of each role of the world that you name, and sends
nothing. Bytes and operations are counted; seconds are an estimate, whose assumptions are printed with it. `--config
finetune`, the default, starts from LLaVA-1.5's second stage, `--config pretrain` from its first, `lora` and `qlora`
from the second with adapters, on weights as they are or in four bits.
"""


@dataclass(frozen=True)
class Assumed:
    """What an estimate takes for granted."""

    arithmetic: float = 0.45  # share of the peak that a whole step reaches, whatever is no product of matrices included
    links: float = 0.8  # share of the rated bandwidth that a collective reaches
    hop: float = 5e-6  # seconds from one rank to the next
    memory: float = 0.9  # share of the memory that tensors can have; buffers of collectives and holes take the rest

    def __post_init__(self) -> None:
        for name in ("arithmetic", "links", "memory"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"assumed.{name}={getattr(self, name)}; it is a share, above 0 and at most 1")


@dataclass(frozen=True)
class DataSizes:
    """The data of an update, all samples alike."""

    samples: int = 128  # per update
    length: int = 2048  # tokens of each, image positions included
    images: int = 1  # in each
    labelled: int | None = None  # tokens at the end of each; all behind the images, unless given
    accumulate: int = 1  # micro-batches that an update is computed in


@dataclass(frozen=True)
class PlanOptions:
    """A run on a cluster."""

    model: Literal["llava-1.5-7b", "llava-1.5-13b", "emoji"] = "llava-1.5-7b"
    world: int = 8  # processes, one a device
    machine: int = 8  # devices of one machine
    device: Literal["910B", "A100", "H200", "4090"] = "910B"
    train: Stage = "projector+llama"  # the others are frozen
    lora: Lora | None = None  # adapters that are trained beside them
    quantise: Literal["int8", "nf4"] | None = None  # the frozen linears of the decoder
    data: DataSizes = DataSizes()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; masters and optimizer are float32
    recompute: bool = True  # keep only each block's input for the backward pass
    parallel: Parallel = Parallel()
    assumed: Assumed = Assumed()
    json: bool = False  # print the report as JSON

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are trained, adapters among them."""
        return (*STAGES[self.train], *(("lora",) if self.lora else ()))

    @property
    def dp(self) -> int:
        """Ranks that share the samples."""
        return self.world // self.parallel.tp


LORA = PlanOptions(train="projector", lora=Lora(rank=128, alpha=256.0, dropout=0.05))
PRESETS = {
    "finetune": PlanOptions(),
    "lora": LORA,
    "qlora": replace(LORA, quantise="nf4"),
    "pretrain": PlanOptions(train="projector", data=DataSizes(samples=256, length=640, accumulate=32)),
}
