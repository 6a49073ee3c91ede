"""Greedy continuation of several prompts at once, by a full forward pass for each token.

There is no cache: it is for captions in the course of training, some tokens long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, llava
from llava_fn.batch import Sample, Stream
from llava_fn.config import Llava
from llava_fn.parallel import vocab
from llava_fn.text import IMAGE


def greedy(p: TensorDict, prompts: Sequence[Sample], stop: int, limit: int, c: Llava) -> list[list[int]]:
    """The most likely next token, again and again, until it is `stop` (not returned) or there are `limit` of them.

    prompts: only their ids and pixels are read. -> the new ids of each prompt, in order.
    """
    run = llava.Execution()
    feats = llava.features(p, torch.cat([s.pixels for s in prompts]), c)
    sizes = [len(s.pixels) * c.vision.patches for s in prompts]
    starts = [_embed(p, s, f, run) for s, f in zip(prompts, feats.split(sizes), strict=True)]
    new: list[list[int]] = [[] for _ in prompts]
    live = sorted(range(len(prompts)), key=lambda j: len(prompts[j].ids))
    for _ in range(limit):
        added = [vocab.embed(p["llama"]["embed"], _ids(new[j], feats), run.tp.axis) for j in live]
        rows = [torch.cat([starts[j], x]) for j, x in zip(live, added, strict=True)]
        stream = Stream.of([len(x) for x in rows], [1] * len(rows)).to(feats.device)
        x = llama.decode(p["llama"], torch.cat(rows), stream, c.llama)
        for j, token in zip(live, llama.logits(p["llama"], x, c.llama).argmax(-1).tolist(), strict=True):
            new[j].append(token)
        live = [j for j in live if new[j][-1] != stop]
        if not live:
            break
    return [ids[:-1] if ids and ids[-1] == stop else ids for ids in new]


def _ids(ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=torch.long, device=like.device)


def _embed(p: TensorDict, s: Sample, feats: Tensor, run: llava.Execution) -> Tensor:
    ids = _ids(s.ids, feats)
    x = vocab.embed(p["llama"]["embed"], ids.clamp(min=0), run.tp.axis)
    return llava.splice(x, feats, (ids == IMAGE).nonzero()[:, 0])
