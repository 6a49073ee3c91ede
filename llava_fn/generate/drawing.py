"""A picture of what the words of an answer look at: a map for each word, over the images as the model sees them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from llava_fn.config import Llama
from llava_fn.generate.look import Look

WORDS = 23  # that are drawn, unless some are named: with the images four full rows
ACROSS = 6


@dataclass(frozen=True)
class Selection:
    """What is drawn: the maps of some words (if empty, of the first 23), each the mean over some layers and heads.

    Layers and heads count from 0, or from the end with -1; if empty, the mean is over all.
    """

    words: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()

    def check(self, c: Llama) -> None:
        """ValueError names a layer or head that the model does not have."""
        for name, chosen, n in (("layers", self.layers, c.blocks), ("heads", self.heads, c.heads)):
            for j in chosen:
                if not -n <= j < n:
                    raise ValueError(f"--{name} {j}: the model has {n}, from 0 to {n - 1}, or from the end -1 to {-n}")

    def indices(self, words: Sequence[str]) -> list[int]:
        """Where the chosen words stand, each wherever it occurs. ValueError if one does not occur."""
        plain = [word.strip(".,;:!?\"'()").lower() for word in words]
        for word in self.words:
            if word.lower() not in plain and word not in words:
                raise ValueError(f"--words {word}: the answer does not say it; its words are: {' '.join(words)}")
        lower = {word.lower() for word in self.words}
        found = [j for j in range(len(words)) if plain[j] in lower or words[j] in self.words]
        return found or list(range(len(words)))[:WORDS]

    def mean(self, x: Tensor) -> Tensor:
        """w l n ... -> w ..., over the chosen layers and heads."""
        x = x[:, list(self.layers)] if self.layers else x
        return (x[:, :, list(self.heads)] if self.heads else x).mean((1, 2))

    def __str__(self) -> str:
        return f"{_named('layer', self.layers)} and {_named('head', self.heads)}"


def _named(part: str, numbers: tuple[int, ...]) -> str:
    return f"{part}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if numbers else f"all {part}s"


def draw(attention: Look, pixels: Sequence[Tensor], answer: str, chosen: Selection, path: Path) -> int:
    """Draw the maps of the chosen words and return their number. pixels: uint8[3, h, w] of each image."""
    words = chosen.indices(attention.words)
    maps = torch.cat(chosen.mean(attention.patches[words]).unbind(1), -1).numpy()  # several images beside each other
    shares = zip(*(chosen.mean(x[words]).tolist() for x in attention.shares().values()), strict=True)
    notes = [
        f"image {image:.0%}, brightest patch {patches.max():.1%}\nfirst token {first:.0%}, text {text:.0%}"
        for patches, (image, first, text) in zip(maps, shares, strict=True)
    ]
    images = torch.cat(list(pixels), -1).permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"Attention of each word of \u201c{answer}\u201d, mean over {chosen}"
    pairs = [(attention.words[j], note) for j, note in zip(words, notes, strict=True)]
    _figure(images, maps, pairs, title).savefig(path, dpi=110)
    return len(words)


def _figure(images: np.ndarray, maps: np.ndarray, notes: list[tuple[str, str]], title: str) -> Figure:
    """A cell for the images and one for each word and note. images: uint8[h, w, 3]; maps: f32[words, r, c]."""
    across = min(ACROSS, len(maps) + 1)
    down = -(-(len(maps) + 1) // across)
    (high, wide), unit = images.shape[:2], 2.4
    lines = textwrap.fill(title, max(44, int(across * unit * wide / high * 9)))
    size = max(across * unit * wide / high, 5), down * (unit + 0.6) + 0.25 * lines.count("\n") + 0.4
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(lines, fontsize=12, parse_math=False)
    cells = figure.subplots(down, across, squeeze=False).flatten()
    for cell in cells:
        cell.axis("off")
    cells[0].imshow(images)
    cells[0].set_title("what the model sees", fontsize=11)
    gray, extent = images.mean(-1), (0, wide, 0, high)
    for cell, values, (word, note) in zip(cells[1:], maps, notes, strict=False):
        cell.imshow(gray, cmap="gray", vmin=-80, vmax=340, extent=extent)
        cell.imshow(values, cmap="inferno", alpha=0.6, vmin=0, extent=extent)
        cell.set_title(word, fontsize=13, fontweight="bold", parse_math=False)
        cell.text(0.5, -0.03, note, fontsize=9, ha="center", va="top", transform=cell.transAxes)
    return figure
