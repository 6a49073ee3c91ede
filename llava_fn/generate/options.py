"""Options of recipes that answer questions: which model, how questions reach it, how answers are chosen.

Nothing here imports torch, so that a recipe can show its options at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class ModelOptions:
    """Which model answers, and where it runs."""

    # a run's folder, a checkpoint, or files and folders of any layout that make a model; adapters beside their base
    weights: tuple[Path, ...]
    context: int = 4096  # tokens of a conversation at most, image positions included
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on the CPU, bfloat16 elsewhere
    quantise: Literal["int8", "nf4"] | None = None  # of the decoder's linears, to save memory
    compile: str = ""  # the backend of torch.compile for a step of decoding, e.g. inductor

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"context={self.context}: must be at least 1")


@dataclass(frozen=True)
class ChatOptions(ModelOptions):
    """Which model answers, where it runs, and how questions reach it."""

    preset: Literal["original", "hf"] | None = None  # prompts and pictures as in LLaVA's code or in transformers
    template: str | None = None  # of the prompt; else the one that the weights name
    image_mode: Literal["pad", "square"] | None = None  # else the one that the weights name


@dataclass(frozen=True)
class Form:
    """How questions and pictures reach the model: templates.py, image.py, and compat of text.py."""

    template: str
    image_mode: str
    compat: str | None = None
    image_reading: str = "original"


PRESETS: Mapping[str, Form] = MappingProxyType(
    {
        "original": Form("llava_v1", "pad"),  # LLaVA's own command line and web page
        "hf": Form("hf", "square", "hf", "hf"),  # transformers' processor and the prompt of its documentation
    }
)


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen. ValueError names an option with an illegal value."""

    tokens: int = 512  # at most, in an answer
    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # sample from this many most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the fewest most likely tokens that have this probability together
    min_p: float = 0.0  # sample from tokens at least this likely, in units of the most likely one
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt or the answer become less likely
    beams: int = 1  # of beam search; 1: none
    length_penalty: float = 1.0  # of beams: a score is the log-probability over length ** this
    samples: int = 1  # answers to each prompt
    seed: int = 0  # of the first sample; each further sample has the next seed
    stop: tuple[str, ...] = ()  # texts that end an answer and are not part of it
    logprobs: bool = False  # give the log-probability of each token, under the model and not under these options

    def __post_init__(self) -> None:
        limits = {
            "tokens": (self.tokens >= 1, "at least 1"),
            "temperature": (self.temperature == 0 or 0.01 <= self.temperature < math.inf, "0, or at least 0.01"),
            "top_k": (self.top_k >= 0, "at least 0, which is off"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1, which is off"),
            "min_p": (0 <= self.min_p <= 1, "from 0, which is off, to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100; 1 is off"),
            "beams": (self.beams >= 1, "at least 1, which is off"),
            "length_penalty": (-10 <= self.length_penalty <= 10, "from -10 to 10"),
            "samples": (self.samples >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**64, "from 0 to 2**64 - 1"),
            "stop": (all(map(_is_text, self.stop)), "texts in Unicode, and none empty"),
        }
        for name, (good, legal) in limits.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {legal}")
        self._check_together()

    def _check_together(self) -> None:
        narrowed = [name for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(self, name) != off]
        if self.temperature == 0 and (narrowed or (self.samples > 1 and self.beams == 1)):
            what = ", ".join(narrowed) or f"samples={self.samples}"
            raise ValueError(f"{what} without a temperature changes nothing; give temperature above 0, or leave it out")
        if self.beams > 1 and (self.temperature or self.logprobs):
            what = "logprobs" if self.logprobs else f"temperature={self.temperature}"
            raise ValueError(f"{what} does not go with beams={self.beams}: a beam is never sampled, and has one score")
        if self.beams > 1 and self.samples > self.beams:
            raise ValueError(f"samples={self.samples} are more than the beams={self.beams} that they are taken from")


def _is_text(s: str) -> bool:
    return s != "" and not any("\ud800" <= c <= "\udfff" for c in s)  # no surrogates, which no text may hold
