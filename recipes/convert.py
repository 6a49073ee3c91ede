"""Make the base that pre-training starts from: an HF CLIP folder and an HF Llama folder (Vicuna), as one checkpoint.

    python recipes/convert.py --clip clip-vit-large-patch14-336 --llama vicuna-7b-v1.5 --out weights/base
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tensordict import TensorDict

from llava_fn import checkpoint, cli, convert
from llava_fn.config import Llava
from llava_fn.text import Tokenizer


@dataclass(frozen=True)
class Convert:
    """What is read and where it goes."""

    clip: Path  # folder of a CLIPModel or CLIPVisionModel: config.json, and safetensors or .bin
    llama: Path  # folder of a LlamaForCausalLM, with its sentencepiece tokenizer.model
    out: Path  # the checkpoint to write


def main(c: Convert) -> None:
    """Read both folders and write the checkpoint. ValueError names what is missing or has no place."""
    if c.out.exists():
        raise ValueError(f"{c.out} exists; name another --out, or remove it")
    tokenizer = Tokenizer.load(c.llama / "tokenizer.model")
    vision, image_tower = convert.read_clip(c.clip)
    llama, decoder = convert.read_llama(c.llama)
    params = TensorDict({"vision": image_tower, "llama": decoder}).lock_()
    manifest = checkpoint.Manifest(Llava(vision, llama), ("vision", "llama"), "square", "plain", None)
    checkpoint.save(c.out, manifest, params, None, tokenizer.model)
    print(f"{c.out}: {vision.used} of {vision.blocks} blocks of CLIP, {llama.blocks} of Llama, {llama.vocab} pieces")


if __name__ == "__main__":
    cli.run(main, tyro.cli(Convert, description=__doc__))
