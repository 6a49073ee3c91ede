"""Are wrong captions among the records that recipes/score_data.py puts first?

    python bench/labels.py

Plants the captions of other pictures in 2 % of the emoji set, trains on it by recipes/pretrain.py with a checkpoint of
every 1.5 epochs, scores it by recipes/score_data.py, and prints the share of the planted records in the worst 4 %, for
each order. It takes some three minutes of one core.
"""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import tyro

from llava_fn.data import emoji
from llava_fn.study.options import Order

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Bench:
    """One set of planted captions."""

    folder: Path = Path("runs/labels")
    share: float = 0.02  # of the records
    worst: float = 0.04
    epochs: float = 12.0
    seed: int = 0  # of what is planted


def plant(c: Bench, data: Path) -> set[int]:
    """Write the data set with wrong captions to the folder -> the numbers of the records that have one."""
    rows, rng = json.loads((data / "train.json").read_text()), random.Random(c.seed)
    captions = [row["conversations"][1]["value"] for row in rows]
    planted = rng.sample(range(len(rows)), round(c.share * len(rows)))
    for i in planted:
        other = rng.choice([j for j in range(len(rows)) if captions[j] != captions[i]])
        rows[i]["conversations"][1]["value"] = captions[other]
    (c.folder / "planted.json").write_text(json.dumps(rows))
    return set(planted)


def main(c: Bench) -> None:
    """Print a table."""
    data = emoji.unpack(c.folder / "emoji-data")
    planted, records, run = plant(c, data), c.folder / "planted.json", c.folder / f"run-{c.seed}"
    subprocess.run(
        [sys.executable, RECIPES / "pretrain.py", "--source", records, data, "--unpack", "None", "--run-dir", run,
         "--tokenizer", data / "tokenizer.model", "--heldout.records", data / "heldout.json", "--heldout.images", data,
         "--data.epochs", str(c.epochs), "--data.workers", "0", "--saving.save-interval", "93", "--saving.keep", "0"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    out = c.folder / f"scores-{c.seed}"
    subprocess.run([sys.executable, RECIPES / "score_data.py", "--run", run, "--out", out], check=True)
    rows = list(csv.DictReader(out.with_name(out.name + ".tsv").open(), delimiter="\t"))
    most = round(c.worst * len(rows))
    print(f"| order | planted records among the worst {most} of {len(rows)} |\n|---|---|")
    for order in get_args(Order):
        first = sorted(rows, key=lambda row: -float(row[order]))[:most]
        found = len(planted & {int(row["number"]) for row in first})
        print(f"| {order} | {found} of {len(planted)}, {found / len(planted):.0%} |")
    print(c)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
