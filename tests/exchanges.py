"""A question and its answer for tests, from a sample."""

import torch

from llava_fn.generate import decode
from llava_fn.generate.types import Prompt
from llava_fn.study.exchange import Exchange


def exchange_of(m, s, spans=((0, 2), (2, 3))):
    """The last tokens of a sample as the answer, whose words are `spans` of its tokens."""
    r = spans[-1][1]
    (prompt,) = decode.prompts(m, [s])
    words = tuple((str(j), *span) for j, span in enumerate(spans))
    return Exchange(Prompt(prompt.ids[:-1], prompt.feats), s.ids[-r:], words, s.pixels)


def logprobs_of(logits, e):
    """Log-probability of each token of the answer, from logits f[1, t, v] of transformers."""
    rows = logits[0, -len(e.answer) :].log_softmax(-1)
    return rows.gather(1, torch.tensor(e.answer)[:, None])[:, 0]
