"""The logit lens: what each layer would say at each position (nostalgebraist 2020), the image's patches included.

    seen = lens(m, inputs(m, e), e.answer)
    seen.top[-1, -1, 0]  # the token that the model says last
    seen.answer[0, 5]    # of the embeddings, at position 5: the probability of each token of the answer

State 0 is the decoder's input, state j what block j - 1 gives. Each is read as the last one is: by the final norm and
the head, which were trained for the last state alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_fn import llama
from llava_fn.generate.types import Model
from llava_fn.kernels import rms_norm
from llava_fn.parallel.collectives import join
from llava_fn.study.activations import activations


@dataclass(frozen=True)
class Lens:
    """Of each state and position: the likeliest tokens, and how likely those of the answer are."""

    top: Tensor  # int64[l + 1, t, k], the likeliest first
    probs: Tensor  # f32[l + 1, t, k], theirs
    answer: Tensor  # f32[l + 1, t, r]: of each token of the answer


@torch.no_grad()
def lens(m: Model, x: Tensor, answer: Sequence[int], k: int = 5, size: int | None = None) -> Lens:
    """x: t d, the decoder's input of one sequence, whose last r positions predict the answer.

    size: only tokens below it are ranked; all unless given.
    """
    p, columns = m.params["llama"], []
    targets = torch.tensor(answer, device=x.device)
    for state in activations(m, x, answer).states:
        logits = join(llama.logits(p, rms_norm(state, p["norm"], m.config.llama.eps), m.config.llama), m.tp.axis, 1)
        probs = logits[:, :size].float().softmax(-1)
        best = probs.topk(k, -1)
        columns.append((best.indices.cpu(), best.values.cpu(), probs[:, targets].cpu()))
    return Lens(*(torch.stack(column) for column in zip(*columns, strict=True)))
