"""Training runs for tests: a config of a small one, starts of recipes/pretrain.py, and what a run leaves behind."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from warm import ROOT, Strike, Warm, recipe

from llava_fn import config, tree
from llava_fn.data import records as data

SCRIPT = ROOT / "recipes" / "pretrain.py"


class Launcher:
    """Starts recipes/pretrain.py by way of the warm process."""

    def __init__(self, warm: Warm) -> None:
        self.warm, self.wait = warm, warm.wait

    def start(
        self, cwd: Path, *args: object, output: Path | None = None, strike: Strike | None = None, **env: str
    ) -> int:
        """-> the process id of a run in `cwd`, which writes to cwd/log. strike: as of Warm."""
        return self.warm.start([SCRIPT, *args], cwd, os.environ | env, output or cwd / "log", strike=strike)

    def start_ranks(
        self, cwd: Path, world: int, *args: object, own: Sequence[Sequence] = ((),), strike: Strike | None = None
    ) -> list[int]:
        """The process ids of a run of several processes. own: arguments of each process besides those of all."""
        argv = lambda rank: [SCRIPT, *args, *own[rank % len(own)]]  # noqa: E731
        return self.warm.start_ranks(world, argv, cwd, dict(os.environ), lambda rank: cwd / f"log{rank}", strike)

    def run(self, cwd: Path, *args: object, **env: str) -> tuple[int, str]:
        """-> (exit status, all that it wrote)."""
        status = self.wait(self.start(cwd, *args, **env))
        return status, (cwd / "log").read_text()


def run_of(emojis: Path, folder: Path, model, **fields):
    """A config of a run on 13 records, one of them bad, with a checkpoint of every second update."""
    records = json.loads((emojis / "train.json").read_text())
    bad = {"id": "bad", "image": "images/none.png", "conversations": records[0]["conversations"]}
    path = folder / "some.json"
    path.write_text(json.dumps([*records, bad]))
    pretrain = recipe("pretrain")
    how = {"epochs": 6.0, "workers": 0, "max_tokens": 64, "on_bad_record": "skip"} | fields
    return replace(
        pretrain.EMOJI,
        run_dir=Path("run"),
        data=data.Data((data.Source(path, emojis),), **how),
        model=model,
        tokenizer=emojis / "tokenizer.model",
        unpack=None,
        heldout=data.Source(emojis / "heldout.json", emojis),
        saving=replace(pretrain.EMOJI.saving, save_interval=2),
    )


def write(folder: Path, c) -> Path:
    (folder / "my.json").write_text(json.dumps(config.plain(c)))
    return folder / "my.json"


def rows(folder: Path, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def figures(folder: Path):
    return [{k: v for k, v in row.items() if k not in ("seconds", "wait", "memory_gib")} for row in rows(folder)]


def same(a, b) -> None:
    assert tree.paths(a) == tree.paths(b)
    assert all(torch.equal(x, y) for x, y in zip(tree.values(a), tree.values(b), strict=True))
