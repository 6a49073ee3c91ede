"""An assistant: a model in memory, from weights of any layout, with its tokenizer and the form of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llava_fn import linear, llama, lora, tree
from llava_fn.config import Llava
from llava_fn.data.templates import template_of
from llava_fn.data.tokenizer import Tokenizer, open_tokenizer
from llava_fn.generate.decode import compiled_step
from llava_fn.generate.graph import Graphs
from llava_fn.generate.options import PRESETS, ChatOptions, Decoding, Form, ModelOptions
from llava_fn.generate.types import Eager, Model, Vocabulary
from llava_fn.kernels.dispatch import FORCED
from llava_fn.launch.device import pick_device
from llava_fn.linear import Kind
from llava_fn.parallel.collectives import TP
from llava_fn.parallel.mesh import Mesh
from llava_fn.weights import model
from llava_fn.weights.source import Weights, open_sources


@dataclass(frozen=True)
class Assistant:
    """A model in memory, and how to talk to it. trained: the template that it was trained with, as its files say."""

    model: Model
    tokenizer: Tokenizer
    form: Form
    trained: str
    context: int = 4096  # tokens of a conversation at most, image positions included

    @property
    def config(self) -> Llava:
        """The model's."""
        return self.model.config


@dataclass(frozen=True)
class Placement:
    """Where a model's parameters go, and as what. mesh: its tensor axis shards the decoder."""

    device: torch.device
    dtype: torch.dtype
    mesh: Mesh = Mesh()
    quantise: Kind | None = None  # the decoder's linears; see linear.py
    arrange: bool = False  # weights arranged for generation; see linear.py
    compile: str = ""  # the backend of torch.compile for a step of decoding

    @staticmethod
    def of(m: ModelOptions, mesh: Mesh = Mesh()) -> Placement:
        """What the options ask for, with weights arranged for generation. ValueError if the device is not there."""
        device = pick_device(m.device)
        name = m.dtype if m.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
        return Placement(device, getattr(torch, name), mesh, m.quantise, True, m.compile)

    @property
    def precision(self) -> str:
        """The name of the dtype: float32, bfloat16 or float16."""
        return str(self.dtype).removeprefix("torch.")


def load(m: ChatOptions, mesh: Mesh = Mesh()) -> Assistant:
    """The model that the options name, in memory, or this rank's shard of it.

    The options' preset, template and image mode overrule what the files say. ValueError if a part, the tokenizer or the
    form is in none of the files.
    """
    weights = open_weights(m.weights)
    return place(weights, form_of(weights, m.preset, m.template, m.image_mode), Placement.of(m, mesh), m.context)


def open_weights(paths: Sequence[Path]) -> Weights:
    """Files and folders of any layout as the weights of one model; no tensor is read yet.

    A run's folder stands for its newest checkpoint. ValueError if a part or the tokenizer is in none of them.
    """
    weights = model.merge(open_sources(paths))
    model.config(weights)
    if "projector" not in weights.parts:
        raise ValueError(f"{weights.where} does not bring the projector; name a file that does too")
    if weights.tokenizer is None:
        raise ValueError(f"{weights.where} brings no tokenizer.model; put that file into its folder")
    return weights


def place(weights: Weights, form: Form, to: Placement, context: int = 4096) -> Assistant:
    """The model in memory, or this rank's shard of it.

    ValueError if the decoder does not divide over the mesh, or if there is no such backend of torch.compile.
    """
    c, axis = model.config(weights), to.mesh.tp
    llama.check_tp(c.llama, axis.size)
    step = compiled_step(to.compile)
    leaves = linear.placed(model.load(weights, to.mesh), to.device, to.dtype, to.quantise, axis)
    adapters = model.adapters(weights, to.mesh, to.device, to.dtype)
    if to.arrange:
        leaves = linear.arranged(leaves, bool(adapters), to.compile)
    params = lora.attached(tree.build(leaves), adapters)
    assert weights.tokenizer is not None  # open_weights has checked it
    tokenizer = open_tokenizer(weights.tokenizer)
    launcher = Graphs() if to.device.type == "cuda" and axis.size == 1 and not FORCED else Eager()
    m = Model(params, c, TP(axis, sequence=False), step, launcher)
    return Assistant(m, tokenizer, form, weights.template or form.template, context)


def form_of(
    weights: Weights, preset: str | None = None, template: str | None = None, image_mode: str | None = None
) -> Form:
    """The form that the preset or else the files name, with `template` and `image_mode` in place of its own.

    ValueError if a template or an image mode is named nowhere.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are: {', '.join(PRESETS)}")
    own = Form(weights.template or "", weights.image_mode or "", weights.compat, weights.image_reading or "original")
    base = PRESETS[preset] if preset else own
    form = replace(base, template=template or base.template, image_mode=image_mode or base.image_mode)
    if not form.template or not form.image_mode:
        raise ValueError(f"{weights.where} does not say its template or its image mode; give them, or a preset")
    template_of(form.template)
    return form


def warning(a: Assistant) -> str:
    """A warning for whoever talks to a model that was not trained to follow questions; else empty."""
    if not template_of(a.trained).caption:
        return ""
    return (
        f"warning: these weights are of stage 1 (pre-training, template {a.trained!r}): they caption one image and "
        "were never trained to follow a question; a model of stage 2 (instruction tuning) does"
    )


def vocabulary(a: Assistant) -> Vocabulary:
    """The tokenizer's, where an answer ends with EOS and with the template's end, if that is one token."""
    end = a.tokenizer.encode(template_of(a.form.template).end)
    return Vocabulary.of(a.tokenizer, *(end if len(end) == 1 else ()))


def with_stop(a: Assistant, d: Decoding) -> Decoding:
    """The options with the text that ends an answer of this template among the stop texts."""
    end = template_of(a.form.template).end
    return d if "</s>" in end else replace(d, stop=(*d.stop, end))
