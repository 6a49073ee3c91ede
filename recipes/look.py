"""Draw what the words of an answer attend to: a map over the patches of the picture for each word.

    python recipes/look.py --weights runs/emoji --image cat.jpg --prompt "What is shown?" --out look.png

The model answers greedily, as recipes/infer.py does, or --answer gives the answer. Each word gets a map over the
picture as the model sees it (padded or cropped): the attention of the position that predicts the word, averaged over
its tokens, all heads and all layers (no layer is the right one for every model; --layers and --heads choose). The
colours of a map go from 0 to its own maximum. Below each map stand the shares of attention to the image, to the first
token (an attention sink), and to all other text. An .npz file of the same name holds the numbers of every word, layer
and head: numpy.load gives `words`, `patches` (word, layer, head, image, row, column), and the three shares `image`,
`first` and `text` (word, layer, head).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from llava_fn.generate.options import ChatOptions, Decoding
from llava_fn.launch import cli


@dataclass(frozen=True)
class Draw:
    """What is asked of which model, and what of its attention is drawn."""

    model: Annotated[ChatOptions, tyro.conf.arg(name="")]
    image: tuple[Path, ...]
    out: Path  # the picture; its numbers are written beside it to an .npz file
    prompt: str = ""  # "<image>" in it places an image; without it, images stand in front
    answer: str = ""  # instead of the model's own
    words: tuple[str, ...] = ()  # of the answer; the first 23 unless given
    layers: tuple[int, ...] = ()  # from 0, or from the end with -1; all unless given
    heads: tuple[int, ...] = ()  # as for layers
    tokens: int = 512  # of the answer at most


def main(c: Draw) -> None:
    """Answer, draw, and write the numbers."""
    # imports stand where they are used: torch takes seconds, and --help does without
    import numpy as np

    from llava_fn.generate import assistant, conversation
    from llava_fn.generate.drawing import WORDS, Selection, draw
    from llava_fn.generate.look import answer_ids, look

    if c.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise ValueError(f"--out {c.out}: name a .png, .jpg, .pdf or .svg file")
    a, selection = assistant.load(c.model), Selection(c.words, c.layers, c.heads)
    selection.check(a.config.llama)
    chat = conversation.ask(conversation.Chat(), c.prompt, [conversation.picture(path, a) for path in c.image])
    if c.answer:
        ids, answer = answer_ids(a, chat, c.answer), c.answer
    else:
        chat = replace(chat, feats=conversation.features(a, chat.pictures, {}))
        ((best,),) = conversation.answers(a, [chat], Decoding(tokens=c.tokens))
        ids, answer = best.ids, best.text
    attention = look(a, chat, ids)
    print(answer)
    n = draw(attention, [picture.pixels for picture in chat.pictures], answer, selection, c.out)
    all_words = len(attention.words)
    part = "" if c.words or n == all_words else f" (the first {WORDS} of {all_words}; see --words)"
    print(f"{c.out}: {n} words{part}")
    numbers = {name: x.numpy() for name, x in {"patches": attention.patches, **attention.shares()}.items()}
    arrays = {"words": np.array(attention.words), **numbers}
    np.savez(c.out.with_suffix(".npz"), **arrays)  # pyright: ignore[reportArgumentType]  # none is its allow_pickle
    print(f"{c.out.with_suffix('.npz')}: {', '.join(f'{name} {x.shape}' for name, x in numbers.items())}")


if __name__ == "__main__":
    cli.run(main, tyro.cli(Draw, description=__doc__))
