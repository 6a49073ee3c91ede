"""Frozen dataclasses of plain numbers: the model, the optimizer, the mesh; and how any config is read and written.

Nothing here imports torch, so that a recipe can show its options at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import dacite


def _divides(name: str, whole: int, parts_name: str, parts: int) -> None:
    if parts < 1 or whole % parts:
        raise ValueError(f"{name}={whole} is not a multiple of {parts_name}={parts}; choose sizes that divide")


@dataclass(frozen=True)
class Vision:
    """The CLIP image tower (Radford et al. 2021; HF CLIPVisionConfig). Defaults: ViT-L/14 at 336 px.

    `feature_layer` counts hidden states as HF does: 0 is the input of the first block, -1 the output of the last.
    LLaVA reads -2, so the last block has no parameters here: nothing that it computes is ever used.
    """

    mean: ClassVar[tuple[float, float, float]] = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue, 0 to 1
    std: ClassVar[tuple[float, float, float]] = (0.26862954, 0.26130258, 0.27577711)

    image: int = 336  # pixels per side
    patch: int = 14  # pixels per side
    width: int = 1024
    blocks: int = 24
    heads: int = 16
    ffn: int = 4096
    eps: float = 1e-5
    act: str = "quick_gelu"  # or "gelu", the exact erf form
    feature_layer: int = -2

    def __post_init__(self) -> None:
        _divides("vision.image", self.image, "vision.patch", self.patch)
        _divides("vision.width", self.width, "vision.heads", self.heads)
        if self.act not in ("quick_gelu", "gelu"):
            raise ValueError(f"vision.act={self.act!r} is not one of quick_gelu, gelu")
        if not -self.blocks - 1 <= self.feature_layer <= self.blocks:
            raise ValueError(f"vision.feature_layer={self.feature_layer} names no hidden state of {self.blocks} blocks")

    @property
    def patches(self) -> int:
        """Patches per image, which is image positions per image in the token stream."""
        return (self.image // self.patch) ** 2

    @property
    def used(self) -> int:
        """Blocks that run: the hidden state that LLaVA reads is the output of block number `used`."""
        return self.feature_layer if self.feature_layer >= 0 else self.blocks + 1 + self.feature_layer


@dataclass(frozen=True)
class Llama:
    """The decoder (Touvron et al. 2023; HF LlamaConfig). Defaults: Vicuna-7B-v1.5."""

    vocab: int = 32000
    width: int = 4096
    blocks: int = 32
    heads: int = 32
    kv_heads: int = 32
    ffn: int = 11008
    eps: float = 1e-5
    theta: float = 10000.0  # rotary base
    tied: bool = False  # the head is the embedding table

    def __post_init__(self) -> None:
        _divides("llama.width", self.width, "llama.heads", self.heads)
        _divides("llama.heads", self.heads, "llama.kv_heads", self.kv_heads)
        if self.head % 2:
            raise ValueError(f"llama.width / llama.heads = {self.head} is odd; rotary embedding turns pairs")

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class Llava:
    """LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744): CLIP, a two-layer MLP projector, Llama."""

    vision: Vision = Vision()
    llama: Llama = Llama()


LLAVA_7B = Llava()
LLAVA_13B = Llava(llama=Llama(width=5120, blocks=40, heads=40, kv_heads=40, ffn=13824))
LLAVA_EMOJI = Llava(
    Vision(image=32, patch=8, width=128, blocks=5, heads=4, ffn=512),
    Llama(vocab=512, width=128, blocks=2, heads=4, kv_heads=4, ffn=384),
)  # small enough to learn from nothing in minutes on a laptop

Stage = Literal["projector", "projector+llama", "all"]
STAGES: Mapping[str, tuple[str, ...]] = {  # the parts that a stage trains; the other parts are frozen
    "projector": ("projector",),  # LLaVA's pre-training
    "projector+llama": ("projector", "llama"),  # LLaVA's fine-tuning
    "all": ("vision", "projector", "llama"),
}


@dataclass(frozen=True)
class Optim:
    """Hyperparameters. Defaults: LLaVA-1.5 pre-training (scripts/v1_5/pretrain.sh, HF Trainer)."""

    lr: float = 1e-3  # peak
    warmup: float = 0.03  # share of all steps, rounded up
    min_lr: float = 0.0  # share of the peak that the cosine ends at
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of weights and embeddings; never of norms and biases
    clip: float = 1.0  # largest global gradient norm; 0 turns clipping off


@dataclass(frozen=True)
class Parallel:
    """How the processes of a run share it. Losses and updates do not depend on it, but for rounding."""

    tp: int = 1  # ranks that share the decoder of each sample, neighbours on one machine; the others share the samples
    zero: Literal[0, 1, 3] = 1  # what is sharded over ranks; see llava_fn/parallel/zero.py
    ahead: bool = True  # zero 3: prefetch the next block's weights while one block runs
    check_interval: int = 100  # updates between two comparisons of what must be equal on all ranks
    silence: float = 1800.0  # seconds that a rank may be silent before the run ends with an error that names it

    def __post_init__(self) -> None:
        for name in ("tp", "check_interval", "silence"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}={getattr(self, name)}; it must be at least 1")


C = TypeVar("C")


def plain(value: Any) -> Any:
    """A config as JSON holds it: dicts, lists, numbers, texts."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def structure(kind: type[C], values: Mapping[str, Any]) -> C:
    """The inverse of `plain`. ValueError names the field that is unknown, missing or of a wrong type or value."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__}: an object with its fields is wanted, not {type(values).__name__}")
    try:
        return dacite.from_dict(kind, values, dacite.Config(strict=True, type_hooks={Path: Path}, cast=[tuple]))
    except dacite.DaciteError as error:
        raise ValueError(f"{kind.__name__}: {error}") from error


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """One line for each place where two plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(a) + [k for k in b if k not in a]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [f"{path}: {a} -> {b}"]
