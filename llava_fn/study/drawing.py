"""What pictures are made of: maps over the images as the model sees them, tables of layers and positions, files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

WORDS = 23  # that are drawn, unless some are named: with the images four full rows
ACROSS = 6
PANELS = 12  # layers that are drawn as maps, unless some are named
LEGIBLE = 8  # patches beside each other, at most, in which a token can be read
FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


@dataclass(frozen=True)
class Selection:
    """What is drawn: the maps of some words (if empty, of the first 23), each the mean over some layers and heads.

    Layers and heads count from 0, or from the end with -1; if empty, the mean is over all.
    """

    words: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()

    def check(self, layers: int, heads: int) -> None:
        """ValueError names a layer or head that the model does not have."""
        for name, chosen, n in (("layers", self.layers, layers), ("heads", self.heads, heads)):
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

    def panels(self, n: int) -> list[int]:
        """The chosen ones of n states of the decoder or, unless some are, at most 12 from the first to the last."""
        return [j % n for j in self.layers] or sorted({round(x) for x in np.linspace(0, n - 1, min(n, PANELS))})

    def __str__(self) -> str:
        return f"{_named('layer', self.layers)} and {_named('head', self.heads)}"


def _named(part: str, numbers: tuple[int, ...]) -> str:
    return f"{part}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if numbers else f"all {part}s"


def check_name(path: Path) -> None:
    """ValueError unless a picture can be written under this name."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {path}: name a .png, .jpg, .pdf or .svg file")


def write(figure: Figure, path: Path, numbers: Mapping[str, np.ndarray]) -> str:
    """The picture, and its numbers in an .npz file of the same name; what a person is told of the latter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    np.savez(path.with_suffix(".npz"), **numbers)  # pyright: ignore[reportArgumentType]  # none is its allow_pickle
    return f"{path.with_suffix('.npz')}: {', '.join(f'{name} {x.shape}' for name, x in numbers.items())}"


def beside(x: Tensor) -> np.ndarray:
    """Images beside each other, uint8[i, 3, h, w] -> uint8[h, i w, 3], or maps, f[n, i, h, w] -> f[n, h, i w]."""
    if x.dtype == torch.uint8:
        return torch.cat(x.unbind(0), -1).permute(1, 2, 0).cpu().numpy()
    return torch.cat(x.unbind(1), -1).float().cpu().numpy()


def maps_figure(images: np.ndarray, maps: np.ndarray, notes: list[tuple[str, str]], title: str) -> Figure:
    """A cell for the images and one for each map with its heading and note. images: uint8[h, w, 3]; maps: f32[n, r, c].

    A map with negative numbers goes from blue over white to red, any other from black to yellow; each up to its own
    maximum.
    """
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
    for j, (values, (heading, note)) in enumerate(zip(maps, notes, strict=True)):
        overlay(cells[j + 1], images.mean(-1), values)
        cells[j + 1].set_title(heading, fontsize=13, fontweight="bold", parse_math=False)
        below = {"fontsize": 9, "ha": "center", "va": "top", "transform": cells[j + 1].transAxes, "parse_math": False}
        cells[j + 1].text(0.5, -0.03, note, **below)
    return figure


def overlay(
    cell: Axes, gray: np.ndarray, values: np.ndarray, texts: Sequence[Sequence[str]] = (), top: float | None = None
) -> None:
    """A map over the gray image, with texts in its cells.

    top: where the colours end, of a map with signs; unless given, its own maximum, with signs if a number is negative.
    """
    (high, wide), (rows, columns) = gray.shape, values.shape
    extent = (0, wide, 0, high)
    cell.imshow(gray, cmap="gray", vmin=-80, vmax=340, extent=extent)
    signed = top is not None or bool((values < 0).any())
    top = top or float(np.abs(values).max()) or 1.0
    low, colours = (-top, "bwr") if signed else (0, "inferno")
    cell.imshow(values, cmap=colours, alpha=0.6, vmin=low, vmax=top, extent=extent)
    for r, row in enumerate(texts):
        for k, word in enumerate(row):
            place = (k + 0.5) * wide / columns, high - (r + 0.5) * high / rows
            outlined = {"color": "white", "path_effects": [withStroke(linewidth=1.5, foreground="black")]}
            cell.text(*place, word, fontsize=7, ha="center", va="center", parse_math=False, **outlined)


def table(cell: Axes, values: np.ndarray, columns: Sequence[str], rows: Sequence[str], **colours: object) -> None:
    """A table of colours, the first row below. values: f32[rows, columns]; colours: cmap, vmin and vmax of imshow."""
    shown = cell.imshow(values, aspect="auto", origin="lower", **colours)  # pyright: ignore[reportArgumentType]
    cell.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=9, parse_math=False)
    cell.set_yticks(range(len(rows)), rows, fontsize=9)
    figure = cell.get_figure()
    assert figure is not None
    figure.colorbar(shown, ax=cell, pad=0.01)
