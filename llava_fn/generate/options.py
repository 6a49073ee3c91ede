"""The options that every recipe which answers questions has: which model, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llava_fn.generate import assistant
from llava_fn.launch.device import pick_device
from llava_fn.parallel.mesh import Mesh
from llava_fn.weights import source as opened


@dataclass(frozen=True)
class Weights:
    """Which model answers, and where it runs."""

    weights: tuple[Path, ...]  # a checkpoint or a run's folder, or files and folders of any layout that make a model
    context: int = 4096  # tokens of a conversation at most, image positions included
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on the CPU, bfloat16 elsewhere
    quantise: Literal["int8"] | None = None  # the decoder's linears, to save memory
    compile: str = ""  # the backend of torch.compile for a step of decoding, e.g. inductor

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"context={self.context}: must be at least 1")

    @property
    def precision(self) -> str:
        """The dtype's name, chosen by the device if need be."""
        return self.dtype if self.dtype != "auto" else "float32" if self.place.type == "cpu" else "bfloat16"

    @property
    def place(self) -> torch.device:
        """The device, which must be there."""
        return pick_device(self.device)


@dataclass(frozen=True)
class Model(Weights):
    """Which model answers, where it runs, and how questions reach it."""

    preset: Literal["original", "hf"] | None = None  # prompt and pictures as LLaVA or as transformers has them
    template: str | None = None  # of the prompt; what the weights say, unless given
    image_mode: Literal["pad", "square"] | None = None  # what the weights say, unless given


def open_assistant(m: Model, mesh: Mesh = Mesh()) -> assistant.Assistant:
    """The model in memory, or this rank's share of it."""
    source = assistant.opened(m.weights)
    return place(m, source, assistant.form_of(source, m.preset, m.template, m.image_mode), mesh)


def place(m: Weights, source: opened.Weights, form: assistant.Form, mesh: Mesh = Mesh()) -> assistant.Assistant:
    """The model of a source in memory, or this rank's share of it."""
    to = assistant.Place(m.place, getattr(torch, m.precision), mesh, m.quantise == "int8", m.compile)
    return assistant.place(source, form, to, m.context)
