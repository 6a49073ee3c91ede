"""Convert weights: from any public layout of CLIP, Vicuna, the projector and LLaVA-1.5 to a checkpoint, and back out.

    python recipes/convert.py clip.pt vicuna-7b-v1.5 weights/base
    python recipes/convert.py weights/model out/hf --to llava-hf

The layout of a source follows from its tensors and configs. Several sources make one model together.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llava_fn.files import digest
from llava_fn.launch import cli

if TYPE_CHECKING:
    from llava_fn.weights.mindspeed import Translation
    from llava_fn.weights.source import Weights

OPENAI = {"ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"}  # clip/clip.py


@dataclass(frozen=True)
class Convert:
    """What is read and where it goes."""

    # files and folders to read, MindSpeed-MM's JSON files too; then the new folder, or file for mm_projector, to write
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SRC... DST")]
    # the layout to write; peft: the adapters, and a projector trained with them, named as in transformers or LLaVA
    to: Literal["llava_fn", "llava-hf", "liuhaotian", "mm_projector", "peft", "peft-liuhaotian"] = "llava_fn"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # that of the sources, unless given
    check_cache: bool = False  # hold files of Hugging Face's cache to the SHA-256 in their name: about 1 s a GB
    merge_lora: bool = False  # add the adapters of a PEFT folder or of a run to the weights
    tokenizer: Path | None = None  # a sentencepiece tokenizer.model, if no source folder has one
    image_mode: Literal["pad", "square"] | None = None  # what the sources say, unless given
    template: str | None = None  # of conversations; what the sources say, unless given

    def __post_init__(self) -> None:
        if len(self.paths) < 2:
            raise ValueError("give at least one source, and the place to write to")


def check_published(path: Path) -> None:
    """Say so if a file bears the name of one that was published and is not that one."""
    want = OPENAI.get(path.name)
    if want is not None and path.is_file():
        have = digest(path)
        if have != want:
            print(f"{path} is NOT the file that OpenAI published: its sha256 is {have}, not {want}", file=sys.stderr)


def is_json(path: Path) -> bool:
    """Whether a file begins as a JSON object does."""
    if not path.is_file():
        return False
    with path.open("rb") as f:
        return f.read(64).lstrip().startswith(b"{")


def moved_sources(moved: Translation, given: list[Weights]) -> list[Weights]:
    """The files that MindSpeed-MM's JSON names, but for parts that a source on the command line brings."""
    from llava_fn.weights.source import open_source

    out = []
    for path in moved.weights:
        source = open_source(path, moved.model)
        twice = [part for other in given for part in other.parts if part in source.parts]
        if twice:
            print(f"{path} is left out: {', '.join(twice)} comes from another source", file=sys.stderr)
        else:
            out.append(source)
    return out


def read(c: Convert) -> tuple[Weights, Translation | None]:
    """All sources put together. ValueError names what is missing, has no place, or does not fit."""
    import torch

    from llava_fn.checkpoint import sums
    from llava_fn.data.tokenizer import read_tokenizer
    from llava_fn.weights import mindspeed, model
    from llava_fn.weights.source import open_sources

    sources = c.paths[:-1]
    texts = [path for path in sources if is_json(path)]
    moved = mindspeed.read(texts) if texts else None
    given = open_sources([path for path in sources if path not in texts], moved and moved.model)
    for path in [archive.path for source in given if c.check_cache for archive in source.archives]:
        sums.check(path, sums.of_cache(path))
    source = model.merge(given + (moved_sources(moved, given) if moved else []))
    if c.merge_lora:
        source = model.merge_lora(model.cast(source, torch.float32) if c.dtype else source)  # rounded once, below
    source = model.cast(source, getattr(torch, c.dtype)) if c.dtype else source
    tokenizer = c.tokenizer or (moved and moved.tokenizer)
    if tokenizer and (c.tokenizer or source.tokenizer is None):
        tokenizer = tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer
        source = model.with_tokenizer(source, read_tokenizer(tokenizer).model)
    return dataclasses.replace(
        source,
        image_mode=c.image_mode or (moved and moved.image_mode) or source.image_mode,
        template=c.template or source.template,
    ), moved


def main(c: Convert) -> None:
    """Read the sources, write the one model that they make. ValueError names what is missing or has no place."""
    # imports stand where they are used: torch takes seconds, and --help does without
    from llava_fn.checkpoint import folder as checkpoint
    from llava_fn.runs.progress import Bytes
    from llava_fn.weights import export, mindspeed

    *sources, out = c.paths
    if out.exists():
        raise ValueError(f"{out} exists; name another place, or remove it")
    for path in sources:
        check_published(path)
    source, moved = read(c)
    if moved:
        print("".join(f"no meaning here: {line}\n" for line in moved.ignored), end="", file=sys.stderr)
    if moved and moved.pretrain:
        config = out.with_name(f"{out.name}-pretrain.json")
        with checkpoint.appearing(config) as part:
            part.write_text(json.dumps(mindspeed.pretrain_config(moved, out), indent=1) + "\n")
        print(f"{config}: for recipes/pretrain.py --config")
    with Bytes(export.size(source)) as progress:
        export.export(source, out, c.to, progress.add)
    print(f"{out}: {summary(source, c.to)}")


def summary(source: Weights, to: str) -> str:
    """The parts that were written, in one line."""
    parts = {"mm_projector": ("projector",), "peft": ("lora", *source.trained)}.get(to.split("-")[0], source.parts)
    vision, llama = source.vision, source.llama
    texts = {"projector": "projector", "lora": f"adapters of {len(source.lora)} weights"}
    if vision:
        texts["vision"] = f"{vision.used} of {vision.blocks} blocks of CLIP"
    if llama:
        texts["llama"] = f"{llama.blocks} blocks of Llama, {llama.vocab} pieces"
    return ", ".join(texts[part] for part in parts)


if __name__ == "__main__":
    cli.run(main, tyro.cli(Convert, description=__doc__))
