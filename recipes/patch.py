"""Find which layers, positions and heads carry an answer: activation patching between two pictures or two questions.

    python recipes/patch.py --weights runs/emoji --image cat.jpg --other-image dog.jpg --out patch.png

The model answers about the picture, or --answer gives the answer. Beside this clean run stands a corrupted one, which
reads the same answer after another picture (--other-image), another question (--other-prompt) or noise on the features
of the picture (--noise, in units of their standard deviation). The corrupted run is then computed again with one part
of the clean run's activations at a time in place of its own. --sites chooses the parts:

positions   the state before a block, or after the last, at one token, or at all patches of an image
patches     the same at one patch of an image
heads       what one head of a block gives to all positions

With --window N a part comes from the clean run in a layer, which names the row, and in the N - 1 after it, as far as
there are any. Each cell of the table shows by how many nats this raises the log-probability of the answer, or of the
--words named. The colours end at the whole gap between the corrupted and the clean run: deep red carries all of the
answer. An .npz file of the same name has `patched` (layer, site, token of the answer), `clean` and `corrupted` (token),
all in nats, and the names of the sites, `sites`. A model too large for one device is shared by --tp of them, which
torchrun starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llava_fn.generate.options import ChatOptions
from llava_fn.launch import cli

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from llava_fn.generate.assistant import Assistant
    from llava_fn.study.exchange import Exchange


@dataclass(frozen=True)
class Patch:
    """What is asked of which model, how the other run differs, and which parts are taken from the clean one."""

    model: Annotated[ChatOptions, tyro.conf.arg(name="")]
    image: tuple[Path, ...]
    out: Path  # the picture; its numbers are written beside it to an .npz file
    prompt: str = ""  # "<image>" in it places an image; without it, images stand in front
    answer: str = ""  # instead of the model's own
    other_image: tuple[Path, ...] = ()  # as many as images
    other_prompt: str = ""  # of as many tokens as the prompt
    noise: float = 0.0  # on the features of the images, in units of their standard deviation; the paper takes 3
    seed: int = 0  # of the noise
    sites: Literal["positions", "patches", "heads"] = "positions"
    window: int = 1  # layers in a row whose part is taken at once
    words: tuple[str, ...] = ()  # of the answer; all unless given
    batch: int = 32  # sites at a time
    tokens: int = 512  # of the answer at most
    tp: int = 1  # devices that share the model, one process each, which torchrun starts

    def __post_init__(self) -> None:
        if bool(self.other_image) + bool(self.other_prompt) + (self.noise != 0) != 1:
            raise ValueError("give one of --other-image, --other-prompt and --noise: what the corrupted run differs in")
        if self.other_image and len(self.other_image) != len(self.image):
            raise ValueError(f"{len(self.other_image)} other images for {len(self.image)}; give one for each")
        if not self.noise >= 0 or self.batch < 1 or self.window < 1:
            raise ValueError(
                f"noise={self.noise}, batch={self.batch}, window={self.window}: no negative noise, and at least one "
                "site at a time and one layer"
            )


def main(c: Patch) -> None:
    """Answer, patch, draw, and write the numbers."""
    # imports stand where they are used: torch takes seconds, and --help does without
    import numpy as np

    from llava_fn.generate import assistant, conversation
    from llava_fn.launch.device import pick_device
    from llava_fn.launch.processes import processes
    from llava_fn.study.activations import activations
    from llava_fn.study.drawing import Selection, check_name, write
    from llava_fn.study.exchange import answered, inputs
    from llava_fn.study.figures import states
    from llava_fn.study.patch import aligned, patch_heads, patch_states

    check_name(c.out)
    with processes(c.tp, pick_device(c.model.device), alone=True) as world:
        a = assistant.load(c.model, world.mesh)
        chat = conversation.ask(conversation.Chat(), c.prompt, [conversation.picture(path, a) for path in c.image])
        answer, e = answered(a, chat, c.answer, c.tokens)
        tokens = [j for k in Selection(c.words).indices(e.said) for j in range(*e.words[k][1:])] if c.words else ...
        both = e, aligned(e, other(c, a, e))
        clean, corrupted = (activations(a.model, inputs(a.model, x), e.answer) for x in both)
        gap = float((clean.logprobs - corrupted.logprobs)[tokens].sum())
        if gap <= 0:
            raise ValueError(f"the corrupted run makes the answer {-gap:.2f} nats likelier; corrupt it in another way")
        names, groups = sites(c, a, e)
        patch = patch_heads if c.sites == "heads" else patch_states
        patched = patch(a.model, clean, corrupted, groups, e.answer, c.batch, c.window)
        if not world.first:
            return
        numbers = {"patched": patched, "clean": clean.logprobs, "corrupted": corrupted.logprobs}
        gains = (patched - corrupted.logprobs)[..., tokens].sum(-1).cpu()
        rows = [f"block {j}" for j in range(len(gains))] if c.sites == "heads" else states(len(gains))
        row, site = divmod(int(gains.argmax()), len(names))
        best = f"{names[site]}, {rows[row]}, carries {gains[row, site]:.3g}"
        print(f"{answer}\n{c.out}: of {gap:.3g} nats {best}, the most of {gains.numel()} sites")
        figure = draw(c, answer, both, gains, names, rows, gap)
        print(write(figure, c.out, {"sites": np.array(names)} | {k: x.cpu().numpy() for k, x in numbers.items()}))


def other(c: Patch, a: Assistant, e: Exchange) -> Exchange:
    """What the corrupted run reads: the same answer after something else."""
    from llava_fn.generate import conversation
    from llava_fn.study.exchange import exchange
    from llava_fn.study.patch import noised

    if c.noise:
        return noised(e, c.noise, c.seed)
    pictures = [conversation.picture(path, a) for path in c.other_image or c.image]
    return exchange(a, conversation.ask(conversation.Chat(), c.other_prompt or c.prompt, pictures), e.answer)


def sites(c: Patch, a: Assistant, e: Exchange) -> tuple[list[str], Tensor]:
    """The name of each part that is patched alone, and which positions or heads it has."""
    import torch

    from llava_fn.study.patch import patches, positions

    if c.sites == "heads":
        n = a.config.llama.heads
        return [f"head {j}" for j in range(n)], torch.eye(n, dtype=torch.bool)
    return patches(e) if c.sites == "patches" else positions(e, a.tokenizer)


def draw(
    c: Patch, answer: str, both: tuple[Exchange, Exchange], gains: Tensor, names: list[str], rows: list[str], gap: float
) -> Figure:
    """A table of the gains, or maps of them over the clean picture."""
    from llava_fn.study import figures

    said = " ".join(c.words) or answer
    part = "one part" if c.window == 1 else f"one part of {c.window} layers"
    title = f"Gain of \u201c{said}\u201d in nats where {part} comes from the clean run; the whole gap is {gap:.3g}"
    if c.sites == "patches":
        return figures.patched_maps(gains, both[0].pixels, rows, title)
    return figures.patched_table(gains, rows, names, gap, title, [x.pixels for x in both])


if __name__ == "__main__":
    cli.run(main, cli.command(Patch, __doc__))
