"""Greedy continuation of several prompts at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import llama, llava
from llava_fn.batch import Sample, Stream
from llava_fn.cache import Cache
from llava_fn.config import Llava
from llava_fn.parallel import vocab
from llava_fn.text import IMAGE


@torch.no_grad()
def greedy(p: TensorDict, prompts: Sequence[Sample], stop: int, limit: int, c: Llava) -> list[list[int]]:
    """The most likely next token, again and again, until it is `stop` (not returned) or there are `limit` of them.

    prompts: only their ids and pixels are read. -> the new ids of each prompt, in order. Rows that have stopped go on
    unread until all have: no shape changes from one step to the next.
    """
    run = llava.Execution()
    feats = llava.features(p, torch.cat([s.pixels for s in prompts]), c)
    sizes = [len(s.pixels) * c.vision.patches for s in prompts]
    rows = [_embed(p, s, f, run) for s, f in zip(prompts, feats.split(sizes), strict=True)]
    stream = Stream.of([len(x) for x in rows], [1] * len(rows)).to(feats.device)
    cache = Cache.empty(c.llama, len(rows), max(stream.segments.keys) + limit, feats)
    x, cache = llama.prefill(p["llama"], torch.cat(rows), stream, cache, c.llama, run.tp)
    new: list[list[int]] = [[] for _ in prompts]
    for _ in range(limit):
        ids = llama.logits(p["llama"], x, c.llama).argmax(-1)
        for row, token in zip(new, ids.tolist(), strict=True):
            row.append(token)
        if all(stop in row for row in new):
            break
        x, cache = llama.decode_step(p["llama"], ids, cache, c.llama, run.tp)
    return [row[: row.index(stop)] if stop in row else row for row in new]


def _ids(ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=torch.long, device=like.device)


def _embed(p: TensorDict, s: Sample, feats: Tensor, run: llava.Execution) -> Tensor:
    ids = _ids(s.ids, feats)
    x = vocab.embed(p["llama"]["embed"], ids.clamp(min=0), run.tp.axis)
    return llava.splice(x, feats, (ids == IMAGE).nonzero()[:, 0])
