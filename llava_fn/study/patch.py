"""Activation patching, or causal tracing (Meng et al. 2022, arXiv 2202.05262): which states carry an answer.

    clean, corrupted = activations(m, inputs(m, e), e.answer), activations(m, other, e.answer)
    patch_states(m, clean, corrupted, torch.eye(t, dtype=torch.bool), e.answer)[3, 7]

Two runs differ in the picture or in the question. The corrupted one is computed again with a part of the clean one's
states in place of its own; where the answer becomes likely again, that part carries it. Here: with the state of
position 7 before block 3, the log-probability of each token. Each of many such sites is a segment of one stream, and
a site before block j costs the blocks from j on. With a window of n layers a site is patched in layer j and the n - 1
after it, as far as there are any: what several layers carry together may be in none of them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llava_fn.data.tokenizer import Tokenizer
from llava_fn.generate.types import Model
from llava_fn.study.activations import Activations, edited
from llava_fn.study.exchange import Exchange, logprobs, piece


@torch.no_grad()
def patch_states(
    m: Model, clean: Activations, corrupted: Activations, groups: Tensor, answer: Sequence[int], batch: int = 32,
    window: int = 1,
) -> Tensor:  # fmt: skip
    """Log-probability of each token, f32[l + 1, g, r], with the clean states of a group of positions before a block.

    groups: bool[g, t], the positions of each. After the last block: index l. batch: sites at a time.
    """

    def row(layer: int, where: Tensor) -> Tensor:
        def state(i: int, x: Tensor) -> Tensor:
            if i >= layer + window:
                return x
            return torch.where(where[..., None], clean.states[i], x.unflatten(0, where.shape)).flatten(0, 1)

        x = corrupted.states[layer].repeat(len(where), 1)
        return logprobs(m, x, answer, len(where), edited(state=state, first=layer))

    parts = groups.to(clean.states.device).split(batch)
    return torch.stack([torch.cat([row(layer, part) for part in parts]) for layer in range(len(clean.states))])


@torch.no_grad()
def patch_heads(
    m: Model, clean: Activations, corrupted: Activations, groups: Tensor, answer: Sequence[int], batch: int = 32,
    window: int = 1,
) -> Tensor:  # fmt: skip
    """Log-probability of each token, f32[l, g, r], with what a group of heads gives in the clean run, at all positions.

    groups: bool[g, n], the heads of each, over all ranks. batch: sites at a time.
    """
    n = clean.heads.shape[2]
    own = groups[:, m.tp.axis.rank * n :][:, :n].to(clean.heads.device)

    def row(layer: int, where: Tensor) -> Tensor:
        def heads(i: int, x: Tensor) -> Tensor:
            if i >= layer + window:
                return x
            x = x.unflatten(0, (len(where), -1))
            return torch.where(where[:, None, :, None], clean.heads[i], x).flatten(0, 1)

        x = corrupted.states[layer].repeat(len(where), 1)
        return logprobs(m, x, answer, len(where), edited(heads=heads, first=layer))

    return torch.stack([torch.cat([row(layer, g) for g in own.split(batch)]) for layer in range(len(clean.heads))])


def aligned(clean: Exchange, corrupted: Exchange) -> Exchange:
    """`corrupted`. ValueError unless both have the same number of positions, and images at the same ones."""
    t, other = len(clean.prompt.ids), len(corrupted.prompt.ids)
    if t != other:
        raise ValueError(
            f"the clean run has {t} positions and the corrupted one {other}, so that no state has a counterpart; "
            "reword one of the questions until both have as many tokens"
        )
    if clean.at.tolist() != corrupted.at.tolist():
        raise ValueError("images stand at different positions in the two questions; put them at the same place")
    return corrupted


def noised(e: Exchange, sigma: float, seed: int) -> Exchange:
    """Gaussian noise on the features of the images, of `sigma` times the standard deviation of all their numbers."""
    feats = e.prompt.feats
    noise = torch.randn(feats.shape, generator=torch.Generator().manual_seed(seed)).to(feats)
    return replace(e, prompt=replace(e.prompt, feats=feats + sigma * feats.std() * noise))


def positions(e: Exchange, tokenizer: Tokenizer) -> tuple[list[str], Tensor]:
    """A site for each token, and one for all patches of an image: names, and bool[g, t], in the order of positions."""
    image = {int(t): f"image {j + 1}" for j, at in enumerate(e.at) for t in at}
    names, rows = list[str](), list[list[int]]()
    for t, i in enumerate(e.prompt.ids):
        if t - 1 in image and image.get(t) == image[t - 1]:
            rows[-1].append(t)
        else:
            names.append(image[t] if t in image else piece(tokenizer, i))
            rows.append([t])
    return names, torch.tensor([[t in row for t in range(len(e.prompt.ids))] for row in rows])


def patches(e: Exchange) -> tuple[list[str], Tensor]:
    """A site for each patch: names, and bool[(i p), t]."""
    side = int(e.at.shape[1] ** 0.5)
    names = [f"image {j + 1}, row {k // side}, column {k % side}" for j, at in enumerate(e.at) for k in range(len(at))]
    return names, torch.eye(len(e.prompt.ids), dtype=torch.bool)[e.at.flatten()]
