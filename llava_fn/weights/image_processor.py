"""The preprocessing of images, in the files of transformers and of LLaVA: from our image modes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_fn.config import Vision
from llava_fn.data.templates import MARK

_PROCESSORS = {  # of transformers, by image mode
    "square": {"image_processor_type": "CLIPImageProcessor"},
    "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
}
_PIXELS = {  # in both image modes; transformers has the same defaults
    "do_convert_rgb": True, "do_resize": True, "resample": 3,  # bicubic
    "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": list(Vision.mean), "image_std": list(Vision.std),
}  # fmt: skip
_PADS = {  # class of image processor -> whether it pads to a square if do_pad is set
    f"{name}{suffix}": pads
    for name, pads in (("CLIPImageProcessor", False), ("CLIPFeatureExtractor", False), ("LlavaImageProcessor", True))
    for suffix in ("", "Fast", "Pil")
}


def check_mode(image_mode: str) -> None:
    """ValueError for an image mode that does not exist."""
    if image_mode not in _PROCESSORS:
        raise ValueError(f"image mode {image_mode!r}: must be one of {', '.join(_PROCESSORS)}")


def preprocessor(size: int, image_mode: str) -> dict[str, Any]:
    """preprocessor_config.json. size: pixels per side."""
    check_mode(image_mode)
    edges = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    return {**_PROCESSORS[image_mode], "processor_class": "LlavaProcessor", **edges, **_PIXELS}


def processor(patch: int) -> dict[str, Any]:
    """processor_config.json. The additional token is CLIP's class token, which the strategy "default" drops."""
    return {
        "processor_class": "LlavaProcessor", "patch_size": patch, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": MARK,
    }  # fmt: skip


def image_mode_of(files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The image mode ("pad" or "square", see data/image.py) that a folder's JSON files specify; None if none does.

    files: file name -> content. Read are config.json (LLaVA's image_aspect_ratio, which takes precedence),
    preprocessor_config.json and processor_config.json (transformers; the second may contain the first).
    ValueError, with file and value, for preprocessing of neither mode, and for two files that disagree.
    """
    ratio = files.get("config.json", {}).get("image_aspect_ratio")
    if ratio is not None:
        if ratio not in _PROCESSORS:
            modes = ", ".join(_PROCESSORS)
            raise ValueError(f"config.json: image_aspect_ratio={ratio!r} is not supported, only {modes}")
        return ratio
    nested = files.get("processor_config.json", {}).get("image_processor")
    configs = {"preprocessor_config.json": files.get("preprocessor_config.json"), "processor_config.json": nested}
    modes = {name: _mode(name, values) for name, values in configs.items() if values is not None}
    if len(set(modes.values())) > 1:
        raise ValueError(f"the files disagree on the image mode: {modes}; remove the wrong one")
    return next(iter(modes.values()), None)


def _mode(name: str, values: Mapping[str, Any]) -> str:
    """The image mode of an HF image processor's config, in which a missing field has its default."""
    kind = values.get("image_processor_type", values.get("feature_extractor_type", "CLIPImageProcessor"))
    if kind not in _PADS:
        raise ValueError(f"{name}: image_processor_type={kind!r} is not supported, only {', '.join(_PADS)}")
    for key, value in _PIXELS.items():
        if values.get(key, value) != value:
            raise ValueError(f"{name}: {key}={values[key]!r} is not supported, only {value!r}")
    size, crop = values.get("size"), values.get("crop_size")
    if isinstance(size, Mapping) and set(size) != {"shortest_edge"}:
        raise ValueError(f"{name}: size={size!r} is not supported, only a shortest_edge")
    if len(_edges(size) | _edges(crop)) > 1:
        raise ValueError(f"{name}: size={size!r} with crop_size={crop!r} is not supported; they must agree")
    pad = values.get("do_pad") or False
    if pad not in (True, False) or (pad and not _PADS[kind]):
        raise ValueError(f"{name}: do_pad={pad!r} of {kind}; only LlavaImageProcessor pads to a square")
    return "pad" if pad else "square"


def _edges(size: Mapping[str, int] | int | None) -> set[int]:
    return set() if size is None else {size} if isinstance(size, int) else set(size.values())
