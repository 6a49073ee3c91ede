"""The preprocessing of images, in the files of transformers and of LLaVA: from our image modes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_fn import fields
from llava_fn.config import Vision
from llava_fn.data.templates import MARK
from llava_fn.weights.hub import IMAGE_PROCESSOR, PADS, PIXELS, PROCESSOR

_PROCESSORS = {  # of transformers, by image mode
    "square": {"image_processor_type": "CLIPImageProcessor"},
    "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
}


def check_mode(image_mode: str) -> None:
    """ValueError for an image mode that does not exist."""
    if image_mode not in _PROCESSORS:
        raise ValueError(f"image mode {image_mode!r}: must be one of {', '.join(_PROCESSORS)}")


def preprocessor(size: int, image_mode: str) -> dict[str, Any]:
    """preprocessor_config.json. size: pixels per side."""
    check_mode(image_mode)
    edges = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    return {**_PROCESSORS[image_mode], "processor_class": "LlavaProcessor", **edges, **PIXELS}


def processor(patch: int) -> dict[str, Any]:
    """processor_config.json. The additional token is CLIP's class token, which the strategy "default" drops."""
    return {
        "processor_class": "LlavaProcessor", "patch_size": patch, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": MARK,
    }  # fmt: skip


def image_mode_of(
    folder: Path, files: Mapping[str, Mapping[str, Any]], stated: str | None = None, vision: Vision | None = None
) -> str | None:
    """The image mode ("pad" or "square", see data/image.py) that a folder's JSON files specify; None if none does.

    files: file name -> content; read are preprocessor_config.json and processor_config.json of transformers, of which
    the second may contain the first. stated: LLaVA's image_aspect_ratio of config.json, which takes precedence.
    vision: the image tower, if config.json describes it. ValueError, with file, field and value, for preprocessing of
    neither mode, for images or patches of another size than the tower's, and for two files that disagree.
    """
    modes, image = {}, vision and vision.image
    if (name := "preprocessor_config.json") in files:
        modes[name] = _mode(folder / name, fields.read(folder / name, files[name], IMAGE_PROCESSOR), image)
    if (name := "processor_config.json") in files:
        own = fields.read(folder / name, files[name], PROCESSOR)
        if vision and own["patch_size"] not in (None, vision.patch):
            raise ValueError(f"{folder / name}: patch_size={own['patch_size']}; the tower's is {vision.patch}")
        if own["image_processor"] is not None:
            modes[name] = _mode(folder / name, own["image_processor"], image)
    if stated is None and len(set(modes.values())) > 1:
        raise ValueError(f"{folder}: the files disagree on the image mode: {modes}; remove the wrong one")
    return stated or next(iter(modes.values()), None)


def _mode(where: Path, own: Mapping[str, Any], image: int | None) -> str:
    """The image mode of the used fields of an image processor's config, in which a missing field has its default.

    image: pixels per side that the tower takes, if it is known.
    """
    kind = own["image_processor_type"] or own["feature_extractor_type"] or "CLIPImageProcessor"
    size, crop = own["size"], own["crop_size"]
    if isinstance(size, Mapping) and (size["height"] or size["width"]):
        raise ValueError(f"{where}: size={_given(size)!r} is not supported, only a shortest_edge")
    edges = _edges(size) | _edges(crop) | ({image} if image else set())
    if len(edges) > 1:
        tower = f" and a tower of {image} pixels" if image else ""
        raise ValueError(f"{where}: size={size!r} with crop_size={crop!r}{tower} is not supported; they must agree")
    if own["do_pad"] and not PADS[kind]:
        raise ValueError(f"{where}: do_pad=true of {kind}; only LlavaImageProcessor pads to a square")
    return "pad" if own["do_pad"] else "square"


def _given(size: Mapping[str, int | None]) -> dict[str, int]:
    return {name: edge for name, edge in size.items() if edge is not None}


def _edges(size: Mapping[str, int | None] | int | None) -> set[int]:
    return set() if size is None else {size} if isinstance(size, int) else set(_given(size).values())
