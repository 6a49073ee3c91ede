"""Held-out records: which they are, and the loss on them while a run trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llava_fn import llava, lora, tree
from llava_fn.batch import Batch, collate
from llava_fn.data import records, schema
from llava_fn.data.options import Source
from llava_fn.data.records import Bad, Preparation, Record
from llava_fn.launch.processes import World
from llava_fn.parallel import collectives
from llava_fn.runs.options import Heldout
from llava_fn.train import Task, TrainState

SIZE = 16  # records of a batch


@dataclass(frozen=True)
class Chosen(Sequence[Record]):
    """Some of the records of a data set. indices: int64[n]."""

    records: Sequence[Record]
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        return self.records[int(self.indices[i])]


def divided(
    sources: Sequence[Sequence[Record]], c: Heldout, seed: int
) -> tuple[list[Sequence[Record]], Sequence[Record]]:
    """(records to train on, of each source; held-out records).

    Held out are the records of a file, or a share of each source that follows from the seed. ValueError if a held-out
    record is trained on too, named, or if the share holds no record out.
    """
    if c.records:
        heldout = records.read(Source(c.records, c.images or c.records.parent))
        _check_apart(sources, heldout)
        return list(sources), heldout
    if not c.share:
        return list(sources), []
    train, out = [], []
    for j, source in enumerate(sources):
        order = np.random.default_rng([seed, j]).permutation(len(source))
        count = round(c.share * len(source))
        train.append(Chosen(source, np.sort(order[count:])))
        out += Chosen(source, np.sort(order[:count]))
    if not out:
        raise ValueError(f"heldout.share={c.share} of {sum(map(len, sources))} records is none; raise it")
    return train, out


def _text(record: Record) -> bytes:
    value = record.value if isinstance(record.value, dict) else {}
    return hashlib.sha256(json.dumps([value.get(key) for key in schema.USED]).encode()).digest()


def _check_apart(sources: Sequence[Sequence[Record]], heldout: Sequence[Record]) -> None:
    known = {_text(record): record.name for record in heldout}
    both = [(r.name, known[text]) for source in sources for r in source if (text := _text(r)) in known]
    if both:
        some = "".join(f"\n  {name} is {other}" for name, other in both[:5])
        raise ValueError(f"{len(both)} records are trained on and held out; take them out of one file:{some}")


def doubts(sources: Sequence[Sequence[Record]], random: Sequence[str]) -> str:
    """Warnings of a second stage before it begins, each a line: a projector without weights, data of captions.

    random: the parts that begin with random weights.
    """
    lines = [f"warning: the base brings no {part}; it begins with random weights" for part in random]
    seen = [record.value for source in sources for record in some(source, 200)]
    turns = [value.get("conversations") for value in seen if isinstance(value, dict)]
    single = [t[0].get("value") for t in turns if isinstance(t, list) and len(t) == 2 and isinstance(t[0], dict)]
    if len(single) == len(seen) >= 50 and len(set(single)) <= len(seen) // 10:
        lines.append(
            f"warning: {len(seen)} records ask {len(set(single))} different questions, once each, as captions do; "
            "recipes/pretrain.py trains on captions, and this stage on conversations"
        )
    return "\n".join(lines)


def some(heldout: Sequence[Record], most: int) -> list[Record]:
    """At most so many of the records, evenly chosen."""
    step = max(1, -(-len(heldout) // most))
    return [heldout[i] for i in range(0, len(heldout), step)]


def batches(
    heldout: Sequence[Record], preparation: Preparation, c: Heldout, on_bad_record: str, world: World
) -> tuple[list[Batch], list[Bad]]:
    """(this process's share of the held-out records whose loss is taken, those of all processes that cannot be used).

    Every process has as many batches. BadRecord on every process if a record is unusable and the policy is "error", or
    if none is left.
    """
    chosen, dp = some(heldout, c.most), world.mesh.dp
    size = SIZE * dp.size
    groups = [chosen[i : i + size][dp.rank :: dp.size] for i in range(0, len(chosen), size)]
    prepared = [records.usable(group, preparation) for group in groups]
    own = json.dumps([pair for _, some in prepared for pair in some])
    bad = [(name, reason) for text in collectives.texts(own, dp, world.device) for name, reason in json.loads(text)]
    records.tolerate("held-out records", bad, on_bad_record, len(chosen) - len(bad))
    return [collate(good, world.mesh.tp.size, preparation.image) for good, _ in prepared], bad


@torch.no_grad()
def loss(state: TrainState, held: Sequence[Batch], task: Task) -> float:
    """Nats per labelled token of the held-out records of all processes."""
    zero = task.zero
    p = lora.attach(tree.merge(zero.fetch(state.params), task.frozen), task.lora)
    device = p["projector"]["b1"].device
    sums = torch.zeros(2, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    for batch in held:
        nll = llava.nll(p, batch.to(device), task.model, task.run)
        sums += torch.stack([nll.sum(), nll.new_tensor(len(nll))]).to(sums)
    total, count = collectives.total(sums, zero.mesh.dp).tolist()
    return total / count
