"""A recipe's config: a frozen dataclass, from a preset or a JSON file, with single fields from the command line.

And the part of it that the recipes which answer questions share: which model, and where it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import tyro
from torch.distributed.elastic.multiprocessing.errors import record

from llava_fn.config import structure
from llava_fn.generate import assistant
from llava_fn.launch import launch
from llava_fn.parallel.mesh import Mesh
from llava_fn.train import NonFinite
from llava_fn.weights.source import Source

C = TypeVar("C")


def parse(presets: Mapping[str, C], doc: str, args: Sequence[str] | None = None) -> C:
    """The config that the command line asks for. `--config NAME|FILE.json` picks where it starts from.

    presets: name -> config; the first is the default. Exits with a message on an unknown flag, like any command line.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar=f"{{{','.join(presets)}}}|FILE", default=next(iter(presets)))
    known, args = first.parse_known_args(args)
    start = known.config
    try:
        config = presets[start] if start in presets else read(type(next(iter(presets.values()))), Path(start))
    except ValueError as error:
        sys.exit(str(error))
    names = f"{', '.join(presets)} (first: default), or the JSON file of an earlier run"
    text = f"{doc}\n\n--config NAME  where the values start from: {names}. Shown here: {start}."
    return tyro.cli(type(config), default=config, args=args, description=text, config=(tyro.conf.AvoidSubcommands,))


def command(kind: type[C], doc: str, args: Sequence[str] | None = None) -> C:
    """The config that the command line asks for, without presets; exits as `parse` does."""
    try:
        return tyro.cli(kind, args=args, description=doc)
    except ValueError as error:  # of a part whose fields have no prefix; tyro shows those of all others itself
        sys.exit(f"error: {error}")


def run(main: Callable[[C], object], config: C) -> None:
    """Call main(config). What a person can set right ends with the error's message alone, and exit status 1.

    Under torchrun any other error is recorded, so that it can show which process failed first, and where.
    """
    try:
        (record(main) if launch.rank_of_several() else main)(config)
    except (ValueError, OSError, NonFinite) as error:
        sys.exit(f"error{launch.rank_of_several()}: {error}")


def read(kind: type[C], path: Path) -> C:
    """A config from JSON. ValueError names the file and the field that is unknown, missing or of a wrong type."""
    if not path.is_file():
        raise ValueError(f"{path}: no such preset and no such file")
    try:
        return structure(kind, json.loads(path.read_text()))
    except ValueError as error:  # of JSON, of a field, or of a value
        raise ValueError(f"{path}: {error}") from error


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
        return launch.pick_device(self.device)


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


def place(m: Weights, source: Source, form: assistant.Form, mesh: Mesh = Mesh()) -> assistant.Assistant:
    """The model of a source in memory, or this rank's share of it."""
    to = assistant.Place(m.place, getattr(torch, m.precision), mesh, m.quantise == "int8", m.compile)
    return assistant.place(source, form, to, m.context)
