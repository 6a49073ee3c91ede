"""The options of a plan. Nothing here imports torch, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llava_fn.config import STAGES, Lora, Parallel, Stage

DESCRIPTION = """What one update costs on a cluster, without the cluster: memory, traffic, arithmetic, estimated time.

It runs the real train step of rank 0 and of the last ranks of each mesh axis on tensors without memory, and sends
nothing. Bytes and operations are counted; seconds are estimated, and the assumptions are printed. `--config finetune`,
the default, starts from LLaVA-1.5's second stage, `--config pretrain` from its first, `lora` and `qlora` from the
second with adapters, on weights in bfloat16 or in four bits.
"""


@dataclass(frozen=True)
class Assumed:
    """The assumptions of an estimate."""

    arithmetic: float = 0.45  # share of the peak FLOP/s that a whole step reaches, elementwise operations included
    links: float = 0.8  # share of the rated bandwidth that a collective reaches
    hop: float = 5e-6  # latency in seconds from one rank to the next
    memory: float = 0.9  # share of the memory for tensors and HCCL; the rest is for NCCL, the driver and fragmentation
    hccl: int = 200  # MB, HCCL_BUFFSIZE: on NPUs every communicator takes two such buffers

    def __post_init__(self) -> None:
        for name in ("arithmetic", "links", "memory"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"assumed.{name}={getattr(self, name)}; it is a share, above 0 and at most 1")
        if self.hccl < 1:
            raise ValueError(f"assumed.hccl={self.hccl}; HCCL_BUFFSIZE is at least 1")


@dataclass(frozen=True)
class DataSizes:
    """The data of one update, whose samples are all alike."""

    samples: int = 128  # per update
    length: int = 2048  # tokens of a sample, image positions included
    images: int = 1  # per sample
    labelled: int | None = None  # labelled tokens at the end of a sample; by default all after the images
    accumulate: int = 1  # micro-batches per update


@dataclass(frozen=True)
class PlanOptions:
    """A training run on a cluster."""

    model: Literal["llava-1.5-7b", "llava-1.5-13b", "emoji"] = "llava-1.5-7b"
    world: int = 8  # processes, one per device
    machine: int = 8  # devices per machine
    device: Literal["910B", "A100", "H200", "4090"] = "910B"
    train: Stage = "projector+llama"  # the other parts are frozen
    lora: Lora | None = None  # adapters, trained in addition
    quantise: Literal["int8", "nf4"] | None = None  # format of the decoder's linears, which must be frozen
    data: DataSizes = DataSizes()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; master weights and moments are float32
    recompute: bool = True  # keep only each block's input for the backward pass
    parallel: Parallel = Parallel()
    assumed: Assumed = Assumed()
    json: bool = False  # print the report as JSON

    @property
    def parts(self) -> tuple[str, ...]:
        """The trained parts, adapters included."""
        return (*STAGES[self.train], *(("lora",) if self.lora else ()))

    @property
    def dp(self) -> int:
        """Size of the data axis."""
        return self.world // self.parallel.tp


LORA = PlanOptions(train="projector", lora=Lora(rank=128, alpha=256.0, dropout=0.05))
PRESETS = {
    "finetune": PlanOptions(),
    "lora": LORA,
    "qlora": replace(LORA, quantise="nf4"),
    "pretrain": PlanOptions(train="projector", data=DataSizes(samples=256, length=640, accumulate=32)),
}
