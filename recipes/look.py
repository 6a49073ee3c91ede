"""Draw what the words of an answer look at: which patches of the picture each attends to.

    python recipes/look.py --weights runs/emoji --image cat.jpg --prompt "What is shown?" --out look.png

The model answers with its most likely tokens, as recipes/infer.py does, or --answer gives the answer. Over the picture
as the model sees it (padded or cropped), each word has its map: attention from the position that chooses the word,
averaged over its tokens, over all heads and over all layers, for no layer is the right one for every model; --layers
and --heads choose. Each map is bright from 0 to its own largest value. Below it stands what goes to the image, to the
first token, where attention rests when it looks for nothing, and to all other text. The numbers of every word, layer
and head are beside the picture, in an .npz file of the same name: numpy.load gives `words`, `patches` (word, layer,
head, image, row, column), and the three shares `image`, `first` and `text` (word, layer, head).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from llava_fn.generate import assistant, options
from llava_fn.generate.assistant import Assistant, Chat
from llava_fn.generate.look import Look, answer_ids, look
from llava_fn.generate.options import Decoding
from llava_fn.launch import cli

DRAWN = 23  # words, unless some are named: with the picture four full rows
ACROSS = 6
PARTS = ("layers", "heads")


@dataclass(frozen=True)
class Draw:
    """What is asked of which model, and what of its attention is drawn."""

    model: Annotated[options.ChatOptions, tyro.conf.arg(name="")]
    image: tuple[Path, ...]
    out: Path  # a picture; its numbers stand beside it in an .npz file
    prompt: str = ""  # "<image>" in it places an image; without it, images stand in front
    answer: str = ""  # instead of the model's own
    words: tuple[str, ...] = ()  # of the answer; the first 23 unless given
    layers: tuple[int, ...] = ()  # from 0, or from the end with -1; all unless given
    heads: tuple[int, ...] = ()  # as for layers
    tokens: int = 512  # of the answer at most


def chosen(wanted: tuple[int, ...], n: int, name: str) -> list[int]:
    """The indices that are asked for, all if none is. ValueError names the one that is not there."""
    for j in wanted:
        if not -n <= j < n:
            raise ValueError(f"--{name} {j}: the model has {n}, from 0 to {n - 1}, or from the end -1 to {-n}")
    return list(wanted or range(n))


def named(wanted: tuple[str, ...], words: tuple[str, ...]) -> list[int]:
    """Where the words stand that are asked for, each wherever it is said. ValueError if one is not."""
    plain = [word.strip(".,;:!?\"'()").lower() for word in words]
    for word in wanted:
        if word.lower() not in plain and word not in words:
            raise ValueError(f"--words {word}: the answer does not say it; its words are: {' '.join(words)}")
    asked = {word.lower() for word in wanted}
    return [j for j in range(len(words)) if plain[j] in asked or words[j] in wanted]


def draw(pictures: np.ndarray, maps: np.ndarray, notes: list[tuple[str, str]], head: str, path: Path) -> None:
    """A cell for the pictures and one for each word and note. pictures: uint8[h, w, 3]; maps: f32[words, r, c]."""
    across = min(ACROSS, len(maps) + 1)
    down = -(-(len(maps) + 1) // across)
    (high, wide), unit = pictures.shape[:2], 2.4
    lines = textwrap.fill(head, max(44, int(across * unit * wide / high * 9)))
    size = max(across * unit * wide / high, 5), down * (unit + 0.6) + 0.25 * lines.count("\n") + 0.4
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(lines, fontsize=12, parse_math=False)
    cells = figure.subplots(down, across, squeeze=False).flatten()
    for cell in cells:
        cell.axis("off")
    cells[0].imshow(pictures)
    cells[0].set_title("what the model sees", fontsize=11)
    gray, place = pictures.mean(-1), {"extent": (0, wide, 0, high)}
    for cell, values, (word, note) in zip(cells[1:], maps, notes, strict=False):
        cell.imshow(gray, cmap="gray", vmin=-80, vmax=340, **place)
        cell.imshow(values, cmap="inferno", alpha=0.6, vmin=0, **place)
        cell.set_title(word, fontsize=13, fontweight="bold", parse_math=False)
        cell.text(0.5, -0.03, note, fontsize=9, ha="center", va="top", transform=cell.transAxes)
    figure.savefig(path, dpi=110)


def picture_of(seen: Look, chat: Chat, c: Draw, answer: str) -> str:
    """Draw it, and say what is left out."""
    words = named(c.words, seen.words) or list(range(len(seen.words)))[:DRAWN]
    layers, heads = (chosen(x, n, f) for x, n, f in zip((c.layers, c.heads), seen.maps.shape[1:3], PARTS, strict=True))

    def mean(x: torch.Tensor) -> torch.Tensor:
        return x[words][:, layers][:, :, heads].mean((1, 2))

    maps = torch.cat(mean(seen.patches).unbind(1), -1).numpy()  # several images beside each other
    shares = zip(*(mean(x).tolist() for x in seen.shares().values()), strict=True)
    notes = [
        (seen.words[j], f"image {image:.0%}, brightest patch {top.max():.1%}\nfirst token {first:.0%}, text {text:.0%}")
        for j, top, (image, first, text) in zip(words, maps, shares, strict=True)
    ]
    pictures = torch.cat([s.pixels for s in chat.pictures], -1).permute(1, 2, 0).numpy()
    over = f"mean over {_named('layer', c.layers)} and {_named('head', c.heads)}"
    c.out.parent.mkdir(parents=True, exist_ok=True)
    draw(pictures, maps, notes, f"Attention of each word of \u201c{answer}\u201d, {over}", c.out)
    left = "" if c.words or len(words) == len(seen.words) else f" (the first {DRAWN} of {len(seen.words)}; see --words)"
    return f"{c.out}: {len(words)} words{left}"


def _named(part: str, wanted: tuple[int, ...]) -> str:
    numbers = ", ".join(map(str, wanted))
    return f"{part}{'s' * (len(wanted) > 1)} {numbers}" if wanted else f"all {part}s"


def main(c: Draw) -> None:
    """Answer, draw, and write the numbers."""
    if c.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise ValueError(f"--out {c.out}: name a .png, .jpg, .pdf or .svg file")
    a = assistant.load(c.model)
    for wanted, n, name in zip((c.layers, c.heads), (a.model.llama.blocks, a.model.llama.heads), PARTS, strict=True):
        chosen(wanted, n, name)
    chat = assistant.ask(Chat(), c.prompt, [assistant.picture(path, a) for path in c.image])
    ids, answer = said(a, chat, c)
    seen = look(a, chat, ids)
    print(answer)
    print(picture_of(seen, chat, c, answer))
    numbers = {name: x.numpy() for name, x in {"patches": seen.patches, **seen.shares()}.items()}
    np.savez(c.out.with_suffix(".npz"), words=np.array(seen.words), **numbers)
    print(f"{c.out.with_suffix('.npz')}: {', '.join(f'{name} {x.shape}' for name, x in numbers.items())}")


def said(a: Assistant, chat: Chat, c: Draw) -> tuple[tuple[int, ...], str]:
    """The answer's tokens and its text."""
    if c.answer:
        return answer_ids(a, chat, c.answer), c.answer
    chat = replace(chat, feats=assistant.features(a, chat.pictures, {}))
    ((found,),) = assistant.answers(a, [chat], Decoding(tokens=c.tokens))
    return found.ids, found.text


if __name__ == "__main__":
    cli.run(main, tyro.cli(Draw, description=__doc__))
