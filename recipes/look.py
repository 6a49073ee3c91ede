"""Draw what the words of an answer come from: a map over the picture for each word, or what each layer would say.

    python recipes/look.py --weights runs/emoji --image cat.jpg --prompt "What is shown?" --out look.png

The model answers greedily, as recipes/infer.py does, or --answer gives the answer. --what chooses what is drawn over
the picture as the model sees it (padded or cropped), and an .npz file of the same name holds the numbers:

attention   of the position that predicts the word, averaged over its tokens, all heads and all layers (no layer is the
            right one for every model; --layers and --heads choose). Below each map stand the shares of attention to
            the image, to the first token (an attention sink), and to all other text. `words`, `patches` (word, layer,
            head, image, row, column), and the three shares `image`, `first` and `text` (word, layer, head).
gradient    of the word's log-probability for each pixel; smooth: its mean over noisy pictures (SmoothGrad).
integrated  integrated gradients: shares of the word's log-probability, less that for a picture of one colour. Red
            pixels raise it, blue ones lower it. All three, for the words that are drawn: `words`, `logprobs` (word),
            `pixels` (word, image, colour, row, column) per standard deviation of CLIP's pixels; integrated has
            `baseline` (word), the log-probability without the picture, too.
lens        what each layer would say at each position (logit lens). `top`, `probs` (state, position, rank), `answer`
            (state, position, token): the probability of each token of the answer; `ids` and `tokens` of the position
            and of the answer.

The colours of a map go from 0 to its own maximum. A model too large for one device is shared by --tp of them, which
torchrun starts, but for attention, whose heads are then not in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llava_fn.generate.options import ChatOptions
from llava_fn.launch import cli

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from llava_fn.generate.assistant import Assistant
    from llava_fn.study.drawing import Selection
    from llava_fn.study.exchange import Exchange

    Drawn = tuple[Figure, Mapping[str, Tensor]]

OPTIONS = {  # of each --what alone
    "attention": {"layers", "heads"},
    "gradient": set(),
    "integrated": {"steps", "baseline"},
    "smooth": {"steps", "noise", "seed"},
    "lens": {"layers"},
}


@dataclass(frozen=True)
class Draw:
    """What is asked of which model, and what of the answer is drawn."""

    model: Annotated[ChatOptions, tyro.conf.arg(name="")]
    image: tuple[Path, ...]
    out: Path  # the picture; its numbers are written beside it to an .npz file
    prompt: str = ""  # "<image>" in it places an image; without it, images stand in front
    answer: str = ""  # instead of the model's own
    what: Literal["attention", "gradient", "integrated", "smooth", "lens"] = "attention"
    words: tuple[str, ...] = ()  # of the answer; the first 23 unless given
    layers: tuple[int, ...] = ()  # from 0, or from the end with -1; all unless given; of the lens: 0 is the embeddings
    heads: tuple[int, ...] = ()  # as for layers
    steps: int = 64  # pictures that integrated puts between the baseline and the picture, or noisy ones of smooth
    baseline: Literal["mean", "black", "white"] = "mean"  # of integrated: CLIP's mean colour, or another
    noise: float = 0.15  # of smooth: standard deviation, as a part of the range of the picture's values
    seed: int = 0  # of that noise
    tokens: int = 512  # of the answer at most
    tp: int = 1  # devices that share the model, one process each, which torchrun starts

    def __post_init__(self) -> None:
        for f in fields(self):
            users = [what for what, names in OPTIONS.items() if f.name in names]
            if users and self.what not in users and getattr(self, f.name) != f.default:
                raise ValueError(f"--{f.name} changes nothing for --what {self.what}; it is for {' and '.join(users)}")
        if self.what == "attention" and self.tp > 1:
            raise ValueError("--what attention takes the whole decoder on one device; leave --tp out")
        if self.steps < 1 or not self.noise >= 0:
            raise ValueError(f"steps={self.steps}, noise={self.noise}: at least one step, and no negative noise")


def main(c: Draw) -> None:
    """Answer, draw, and write the numbers."""
    # imports stand where they are used: torch takes seconds, and --help does without
    import numpy as np

    from llava_fn.generate import assistant, conversation
    from llava_fn.launch.device import pick_device
    from llava_fn.launch.processes import processes
    from llava_fn.study.drawing import WORDS, Selection, check_name, write
    from llava_fn.study.exchange import answered

    check_name(c.out)
    with processes(c.tp, pick_device(c.model.device), alone=True) as world:
        a, chosen = assistant.load(c.model, world.mesh), Selection(c.words, c.layers, c.heads)
        chosen.check(a.config.llama.blocks + (c.what == "lens"), a.config.llama.heads)
        chat = conversation.ask(conversation.Chat(), c.prompt, [conversation.picture(path, a) for path in c.image])
        answer, e = answered(a, chat, c.answer, c.tokens)
        shown, of = chosen.indices(e.said), len(e.words)
        kinds: dict[str, Callable[..., Drawn]] = {"attention": attention, "lens": lens}
        if c.what not in kinds:  # each word takes a backward pass: only those that are drawn
            e = replace(e, words=tuple(e.words[j] for j in shown))
        figure, numbers = kinds.get(c.what, saliency)(c, a, e, answer, chosen)
        if not world.first:
            return
        print(answer)
        told = write(figure, c.out, {"words": np.array(e.said)} | {k: np.asarray(x) for k, x in numbers.items()})
        part = "" if c.words or len(shown) == of else f" (the first {WORDS} of {of}; see --words)"
        print(f"{c.out}: {len(shown)} words{part}\n{told}")


def attention(c: Draw, a: Assistant, e: Exchange, answer: str, chosen: Selection) -> Drawn:
    """What each word attends to."""
    from llava_fn.study import figures
    from llava_fn.study.attention import look

    seen = look(a.model, e)
    return figures.attention(seen, e.pixels, answer, chosen), {"patches": seen.patches, **seen.shares()}


def saliency(c: Draw, a: Assistant, e: Exchange, answer: str, chosen: Selection) -> Drawn:
    """Which pixels each word depends on, by one of three methods."""
    import torch

    from llava_fn.study import figures
    from llava_fn.study.saliency import flat, gradient, integrated, normalised, score, smooth

    f, x = score(a.model, e), normalised(a.model, e)
    title, more = f"of the log-probability of each word of \u201c{answer}\u201d", {}
    with torch.no_grad():
        (logprobs,) = f(x[None])
    notes = [f"log-probability {y:.3g}" for y in logprobs.tolist()]
    if c.what == "integrated":
        base = flat(a.model, x, c.baseline)
        with torch.no_grad():
            (without,) = f(base[None])
        pixels, title = integrated(f, x, base, c.steps), f"Share {title} (integrated gradients)"
        sums, more = pixels.flatten(1).sum(1), {"baseline": without.cpu()}
        pairs = zip(notes, without.tolist(), sums.tolist(), strict=True)
        notes = [f"{note}\n{c.baseline} colour {y:.3g}, sum {total:+.3g}" for note, y, total in pairs]
    elif c.what == "smooth":
        sigma = c.noise * float(x.max() - x.min())
        pixels, title = smooth(f, x, sigma, c.steps, c.seed), f"Gradient {title}, mean of {c.steps} noisy pictures"
    else:
        pixels, title = gradient(f, x[None])[:, 0], f"Gradient {title}"
    pixels = pixels.cpu()
    # shares add up over the colours; of gradients the largest counts (Simonyan et al. 2013)
    maps = pixels.sum(2) if c.what == "integrated" else pixels.abs().amax(2)
    return figures.saliency(maps, notes, e, title, chosen), {"logprobs": logprobs.cpu(), "pixels": pixels, **more}


def lens(c: Draw, a: Assistant, e: Exchange, answer: str, chosen: Selection) -> Drawn:
    """What each layer would say."""
    import torch

    from llava_fn.study import figures
    from llava_fn.study.exchange import inputs
    from llava_fn.study.lens import lens

    seen = lens(a.model, inputs(a.model, e), e.answer, size=a.tokenizer.vocab_size)
    ids, tokens = torch.tensor(e.prompt.ids), torch.tensor(e.answer)
    numbers = {"top": seen.top, "probs": seen.probs, "answer": seen.answer, "ids": ids, "tokens": tokens}
    return figures.lens(seen, e, a.tokenizer, answer, chosen), numbers


if __name__ == "__main__":
    cli.run(main, cli.command(Draw, __doc__))
