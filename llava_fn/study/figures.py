"""A picture of each thing that a study finds, for a person to understand at a glance."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from llava_fn.data.tokenizer import Tokenizer
from llava_fn.study.attention import Look
from llava_fn.study.drawing import ACROSS, LEGIBLE, Selection, beside, maps_figure, overlay, table
from llava_fn.study.exchange import Exchange, in_picture, piece
from llava_fn.study.lens import Lens

WIDEST = 100.0  # inches: Matplotlib refuses pictures of 2**16 pixels
Panel = tuple[str, Tensor, Sequence[Sequence[str]]]  # a title, f32[i, rows, columns], and texts of these cells
PERCENTILE = 99.0  # of a map of pixels, at which its colours end: a few pixels would dim all others


def attention(look: Look, pixels: Tensor, answer: str, chosen: Selection) -> Figure:
    """A map of the attention of each chosen word, over all images beside each other. pixels: uint8[i, 3, h, w]."""
    words = chosen.indices(look.words)
    maps = beside(chosen.mean(look.patches[words]))
    shares = {name: chosen.mean(x[words]) for name, x in look.shares().items()}
    cells = [(look.words[j], note) for j, note in zip(words, _shares(shares, maps), strict=True)]
    title = f"Attention of each word of \u201c{answer}\u201d, mean over {chosen}"
    return maps_figure(beside(pixels), maps, cells, title)


def _shares(shares: Mapping[str, Tensor], maps: np.ndarray) -> list[str]:
    """What stands below each map of attention. shares: `Look.shares` of each word, f32[w]; maps: f32[w, r, c]."""
    rows = zip(*(x.tolist() for x in shares.values()), strict=True)
    return [
        f"image {image:.0%}, brightest patch {patches.max():.1%}\nfirst token {first:.0%}, text {text:.0%}"
        for patches, (image, first, text) in zip(maps, rows, strict=True)
    ]


def saliency(maps: Tensor, notes: Sequence[str], e: Exchange, title: str, chosen: Selection) -> Figure:
    """A map of the pixels that each chosen word depends on. maps: f32[w, i, h, w]; notes: below each word's map."""
    words = chosen.indices(e.said)
    x = beside(maps[words])
    tops = np.percentile(np.abs(x), PERCENTILE, (1, 2), keepdims=True)
    return maps_figure(beside(e.pixels), x.clip(-tops, tops), [(e.words[j][0], notes[j]) for j in words], title)


def lens(seen: Lens, e: Exchange, tokenizer: Tokenizer, answer: str, chosen: Selection) -> Figure:
    """A table of what each state says where the answer is given, and maps of what it says at the patches."""
    words = chosen.indices(e.said)
    tokens, n = [j for k in words for j in range(*e.words[k][1:])], len(seen.top)
    panels = chosen.panels(n)
    wide = e.pixels.shape[0] * 2.4
    high = 0.3 * n + 1.8, 2.7 * -(-len(panels) // ACROSS) + 0.3
    size = max(min(ACROSS, len(panels)) * wide, 0.75 * len(tokens) + 3, 7), sum(high)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=high)
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    above.suptitle(f"What each layer would say where the model says \u201c{answer}\u201d", parse_math=False)
    _table_of_tokens(above.subplots(), seen, [(j, piece(tokenizer, e.answer[j])) for j in tokens], tokenizer)
    below.suptitle("\u2026 and the probability that it would say a token of the answer at a patch of the picture")
    distinct = list({e.answer[j]: j for j in tokens}.values())
    maps = in_picture(seen.answer[:, e.at][..., distinct].sum(-1))
    texts: list[list[list[str]]] = [[]] * n
    if maps.shape[-1] <= LEGIBLE:
        tops = torch.cat(in_picture(seen.top[:, e.at, 0]).unbind(1), -1).tolist()
        texts = [[[piece(tokenizer, i) for i in row] for row in x] for x in tops]
    names = [f"{name}, up to {x.max():.1%}" for name, x in zip(states(n), maps, strict=True)]
    _panels(below, beside(e.pixels), [(names[j], maps[j], texts[j]) for j in panels])
    return figure


def _table_of_tokens(cell: Axes, seen: Lens, columns: Sequence[tuple[int, str]], tokenizer: Tokenizer) -> None:
    """columns: index in the answer and text of each token that is shown."""
    n, r = len(seen.top), seen.answer.shape[2]
    at = [j - r for j, _ in columns]
    table(cell, seen.probs[:, at, 0].numpy(), [text for _, text in columns], states(n), cmap="Blues", vmin=0, vmax=1)
    for row in range(n):
        for column, j in enumerate(at):
            word, light = piece(tokenizer, int(seen.top[row, j, 0])), seen.probs[row, j, 0] < 0.6
            colour = "black" if light else "white"
            cell.text(column, row, word, fontsize=8, ha="center", va="center", color=colour, parse_math=False)


def _panels(figure: Figure | SubFigure, images: np.ndarray, panels: Sequence[Panel], top: float | None = None) -> None:
    """Maps over the images. top: where the colours end, or None for each map's own maximum."""
    across = min(ACROSS, len(panels))
    cells = figure.subplots(-(-len(panels) // across), across, squeeze=False).flatten()
    for cell in cells:
        cell.axis("off")
    for cell, (name, values, texts) in zip(cells, panels, strict=False):
        overlay(cell, images.mean(-1), beside(values[None])[0], texts, top)
        cell.set_title(name, fontsize=9)


def patched_table(
    gains: Tensor, rows: Sequence[str], columns: Sequence[str], gap: float, title: str, pixels: Sequence[Tensor]
) -> Figure:
    """The gain of each site, f32[rows, columns], the first row below, beside the images of both runs.

    gap: the gain at which the colours end. pixels: of the clean and of the corrupted run, uint8[i, 3, h, w].
    """
    size = min(max(0.42 * len(columns) + 6, 9), WIDEST), max(0.3 * len(rows) + 2.6, 4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(textwrap.fill(title, int(size[0] * 11)), fontsize=11, parse_math=False)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, size[0] - 3))
    for j, (name, x) in enumerate(zip(("clean", "corrupted"), pixels, strict=True)):
        cell = figure.add_subplot(grid[j, 0])
        cell.imshow(beside(x))
        cell.set_title(name, fontsize=9)
        cell.axis("off")
    table(figure.add_subplot(grid[:, 1]), gains.numpy(), columns, rows, cmap="bwr", vmin=-gap, vmax=gap)
    return figure


def patched_maps(gains: Tensor, pixels: Tensor, rows: Sequence[str], title: str) -> Figure:
    """The gain of each patch, f32[rows, (i p)], as maps over the clean images, uint8[i, 3, h, w], in one scale."""
    chosen, maps = Selection().panels(len(rows)), in_picture(gains.unflatten(1, (len(pixels), -1)))
    across = min(ACROSS, len(chosen))
    size = max(2.4 * across * len(pixels), 7), 2.8 * -(-len(chosen) // across) + 0.8
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(textwrap.fill(title, int(size[0] * 11)), fontsize=11, parse_math=False)
    panels = [(f"{rows[j]}: {maps[j].min():+.2f} to {maps[j].max():+.2f}", maps[j], ()) for j in chosen]
    _panels(figure, beside(pixels), panels, float(maps.abs().max()))
    return figure


def states(n: int) -> list[str]:
    """Names of the n states of the decoder."""
    return ["embeddings", *(f"after block {j}" for j in range(n - 1))]
