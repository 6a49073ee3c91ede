"""Frozen dataclasses of plain numbers: the model, the optimizer, the mesh; and how any config is read and written.

Nothing here imports torch, so that a recipe can show its options at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import dacite


def _divides(name: str, whole: int, parts_name: str, parts: int) -> None:
    if parts < 1 or whole % parts:
        raise ValueError(f"{name}={whole} is not a multiple of {parts_name}={parts}; choose sizes that divide")


MOST_BLOCKS = 1000  # more than any model has


def _check_blocks(name: str, blocks: int) -> None:
    if not 1 <= blocks <= MOST_BLOCKS:
        raise ValueError(f"{name}={blocks}: must be from 1 to {MOST_BLOCKS}")


def _check_number(name: str, value: object, above: float) -> None:
    """ValueError unless a value is a finite number above a bound: what comes out of another one is NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
        raise ValueError(f"{name}={value!r}: must be a number above {above:g}")


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
        _check_number("vision.eps", self.eps, 0)
        _check_blocks("vision.blocks", self.blocks)
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
        _check_number("llama.eps", self.eps, 0)
        _check_blocks("llama.blocks", self.blocks)
        _check_number("llama.theta", self.theta, 1)
        if not isinstance(self.tied, bool):
            raise ValueError(f"llama.tied={self.tied!r}: must be true or false")

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


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). Defaults: LLaVA's targets, every linear of the decoder."""

    rank: int = 16
    alpha: float = 32.0  # the adapter's product is scaled by alpha / rank
    rslora: bool = False  # scaled by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)
    targets: tuple[str, ...] = (r"llama/blocks/.*",)  # regular expressions; the linears whose whole path one matches
    dropout: float = 0.0  # of an adapter's input

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout}; it must be at least 0 and below 1")
        for pattern in self.targets:
            _check_pattern("lora.targets", pattern)
            if self.dropout and not pattern.startswith("llama/blocks/"):
                raise ValueError(f"lora.targets: {pattern!r}: a dropout is of adapters of llama/blocks/ alone")

    @property
    def scale(self) -> float:
        """Of the adapters' product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is no regular expression: {error}") from error


Recompute = Literal["auto", "on", "off"]  # of each block's activations in the backward pass; see plan/recompute.py
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
    rates: tuple[tuple[str, float], ...] = ()  # (path or regular expression of paths, its peak) in place of lr
    decays: tuple[tuple[str, float], ...] = ()  # likewise in place of weight_decay
    warmup: float = 0.03  # share of all steps, rounded up
    min_lr: float = 0.0  # share of the peak that the cosine ends at
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of weights and embeddings; never of norms and biases
    clip: float = 1.0  # largest global gradient norm; 0 turns clipping off

    def __post_init__(self) -> None:
        for field in ("rates", "decays"):
            for pattern, value in getattr(self, field):
                _check_pattern(f"optim.{field}", pattern)
                if not 0 <= value < math.inf:
                    raise ValueError(f"optim.{field}: {pattern}: {value}; it must be at least 0")

        if self.rates and not self.lr:
            raise ValueError("optim.lr=0 has no schedule that optim.rates could follow; give it a rate above 0")

    def rate(self, path: Sequence[str]) -> float:
        """The peak rate of a parameter: that of the first pattern that its path, or the front of it, matches."""
        return _first(self.rates, path, self.lr)

    def scheduled(self, peak: float, lr: float) -> float:
        """The rate of a parameter with this peak at an update whose rate is `lr`: in proportion."""
        return lr if peak == self.lr else lr * (peak / self.lr)

    def decay(self, path: Sequence[str], dims: int) -> float:
        """The weight decay of a parameter of so many dims. Norms and biases have one, and decay only by a pattern."""
        return _first(self.decays, path, self.weight_decay if dims > 1 else 0.0)


def _first(rules: Sequence[tuple[str, float]], path: Sequence[str], default: float) -> float:
    return next((value for pattern, value in rules if matches(pattern, path)), default)


def matches(pattern: str, path: Sequence[str]) -> bool:
    """Whether a regular expression matches a path, or whole names at the front of it."""
    return re.fullmatch(f"(?:{pattern})(?:/.*)?", "/".join(path)) is not None


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
LONGEST = 1000  # characters that an error shows of the reason, which may quote the whole file


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
        return dacite.from_dict(kind, values, dacite.Config(strict=True, type_hooks={Path: _path}, cast=[tuple]))
    except (dacite.DaciteError, TypeError) as error:  # TypeError: where a list is wanted and something else stands
        raise ValueError(f"{kind.__name__}: {str(error)[:LONGEST]}") from error


def _path(value: object) -> object:
    return Path(value) if isinstance(value, str) else value  # what is neither fails the check of its type


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """One line for each place where two plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(a) + [k for k in b if k not in a]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [f"{path}: {a} -> {b}"]
