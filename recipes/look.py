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
    out: Path  # a picture; its numbers stand beside it in an .npz file
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
    seen = look(a, chat, ids)
    print(answer)
    n = draw(seen, [picture.pixels for picture in chat.pictures], answer, selection, c.out)
    part = "" if c.words or n == len(seen.words) else f" (the first {WORDS} of {len(seen.words)}; see --words)"
    print(f"{c.out}: {n} words{part}")
    numbers = {name: x.numpy() for name, x in {"patches": seen.patches, **seen.shares()}.items()}
    arrays = {"words": np.array(seen.words), **numbers}
    np.savez(c.out.with_suffix(".npz"), **arrays)  # pyright: ignore[reportArgumentType]  # none is its allow_pickle
    print(f"{c.out.with_suffix('.npz')}: {', '.join(f'{name} {x.shape}' for name, x in numbers.items())}")


if __name__ == "__main__":
    cli.run(main, tyro.cli(Draw, description=__doc__))
