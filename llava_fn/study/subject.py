"""A run whose training is looked back on: its checkpoints, and the records that it was trained on, as it read them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llava_fn import fields, tree
from llava_fn.batch import Batch, Sample, collate
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.folder import Checkpoint
from llava_fn.config import Optim, structure
from llava_fn.data import records
from llava_fn.data.options import Data
from llava_fn.data.records import Preparation, Record
from llava_fn.data.tokenizer import Tokenizer, open_tokenizer
from llava_fn.runs import report, validation
from llava_fn.runs.options import Heldout
from llava_fn.spec import under
from llava_fn.study.gradients import Studied


@dataclass(frozen=True)
class Subject:
    """A run. checkpoints: in the order of their steps; rates: the learning rate at each. optim, data: its config's."""

    folder: Path
    checkpoints: tuple[Checkpoint, ...]
    rates: tuple[float, ...]
    optim: Optim
    data: Data
    sources: tuple[Sequence[Record], ...]
    tokenizer: Tokenizer
    preparation: Preparation

    @property
    def count(self) -> int:
        """Records that were trained on."""
        return sum(map(len, self.sources))

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints."""
        return [opened.manifest.step for opened in self.checkpoints]

    def record(self, number: int) -> Record:
        """The record of a number, counted through all sources."""
        return records.pick(self.sources, number)

    def models(self, device: torch.device) -> list[Studied]:
        """The models of the checkpoints in fp32; what the run did not train is in memory once."""
        last = checkpoint.load_model(self.checkpoints[-1].folder, device)
        whole = tree.cast(last.params, torch.float32)
        _, rest = tree.split(whole, lambda path: under(path, last.manifest.parts))
        trees = [tree.merge(rest, checkpoint.load(c.folder, device=device).params) for c in self.checkpoints[:-1]]
        return [Studied(params, last.manifest.model, last.manifest.lora) for params in (*trees, whole)]

    def samples(self, numbers: Sequence[int]) -> tuple[list[Sample], list[records.Bad]]:
        """The usable records of these numbers, each named by its number, and those that cannot be used.

        BadRecord as of `records.tolerate`.
        """
        good, bad = [], []
        for number in numbers:
            (found, wrong) = records.usable([self.record(number)], self.preparation)
            good += [replace(s, record=str(number)) for s in found]
            bad += wrong
        records.tolerate(f"{self.folder}", bad, self.data.on_bad_record)
        return good, bad


def open_run(folder: Path, steps: Sequence[int] = ()) -> Subject:
    """A run of recipes/pretrain.py or finetune.py. steps: of the checkpoints that are looked at; all without any.

    ValueError if it has no such checkpoint, if its data are gone, or if they have changed since it was trained.
    """
    config, runs = folder / "config.json", folder / "checkpoints"
    if not config.is_file() or not checkpoint.steps(runs):
        raise ValueError(
            f"{folder} is no run that was trained here: it needs config.json, which names the data, and checkpoints/; "
            "name the --run-dir of recipes/pretrain.py or recipes/finetune.py"
        )
    there = checkpoint.steps(runs)
    if missing := [step for step in steps if step not in there]:
        raise ValueError(
            f"{folder} has no checkpoint of step {', '.join(map(str, missing))}; it has {', '.join(map(str, there))}. "
            "A run keeps all with --saving.keep 0"
        )
    opened = tuple(checkpoint.open_checkpoint(checkpoint.at(runs, step)) for step in sorted(steps or there))
    values = fields.load(config)
    data, optim = structure(Data, values["data"]), structure(Optim, values["optim"])
    manifest, tokenizer = opened[-1].manifest, open_tokenizer(opened[-1].tokenizer)
    preparation = records.preparation(tokenizer, manifest.model.vision.image, manifest.model.vision.patches, data)
    sources = [records.read(source) for source in data.sources]
    if records.fingerprint(data.sources) != manifest.data:
        files = ", ".join(str(source.records) for source in data.sources)
        raise ValueError(
            f"{files}: changed since {folder} was trained on it; put back the records that it was trained on"
        )
    held = Heldout(share=(values.get("heldout") or {}).get("share", 0.0))
    sources, _ = validation.divided(sources, held, data.seed)
    return Subject(folder, opened, _rates(folder, opened), optim, data, tuple(sources), tokenizer, preparation)


def _rates(folder: Path, opened: Sequence[Checkpoint]) -> tuple[float, ...]:
    """The learning rate of the update that each checkpoint was saved after."""
    rates = {row["step"]: row["lr"] for row in report.read_metrics(folder / "metrics.jsonl")}
    missing = [c.manifest.step for c in opened if c.manifest.step not in rates]
    if missing:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no row of step {missing[0]}, whose checkpoint is there")
    return tuple(rates[c.manifest.step] for c in opened)


def batches(samples: Sequence[Sample], size: int, device: torch.device) -> list[Batch]:
    """Micro-batches of at most `size` samples of like length."""
    rows = sorted(samples, key=lambda s: len(s.ids))
    return [collate(rows[i : i + size]).to(device) for i in range(0, len(rows), size)]


def digest(s: Sample) -> int:
    """63 bits of all that the model sees of a sample, pixels too."""
    found = hashlib.blake2b(f"{s.ids} {s.label}".encode(), digest_size=8)
    found.update(s.pixels.numpy().tobytes())
    return int.from_bytes(found.digest(), "big") >> 1
