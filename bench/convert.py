"""Time and peak memory of a conversion, against copying the same files: LLaVA-1.5 of random bytes, 7B unless told.

    python bench/convert.py --to llava_fn
    python bench/convert.py --to llava-hf --blocks 2

Makes a checkpoint in the llava-hf layout (14 GB), then round by round copies it (`cp -r`, then `sync`) and converts it,
each in a process of its own, with the files dropped from the page cache before.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from llava_fn import llava, spec
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.config import LLAVA_7B, Llava
from llava_fn.launch import cli
from llava_fn.weights import export, placing
from llava_fn.weights.source import OURS, PARTS, Weights

ROOT = Path(__file__).parents[1]
F16 = torch.float16
PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""  # a process's own figure: what a parent learns from wait4 begins with the parent's memory


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    to: Literal["llava_fn", "llava-hf", "liuhaotian"] = "llava_fn"
    blocks: int = 32  # of the decoder; fewer for a short run
    rounds: int = 3
    folder: Path = Path(tempfile.gettempdir())  # where there is room for three copies
    json: bool = False  # print one JSON object instead of text


def random_leaf(shape: tuple[int, ...], rng: np.random.Generator) -> Leaf:
    """fp16 of random bits, made when it is read."""
    size = math.prod(shape) * 2
    return Leaf(shape, F16, lambda: torch.frombuffer(bytearray(rng.bytes(size)), dtype=F16).view(shape))


def make(folder: Path, c: Llava) -> int:
    """Write a random model of this size in the llava-hf layout, and return its largest tensor's bytes."""
    rng, words = np.random.default_rng(0), Path(importlib.util.find_spec("mistral_common").origin).parent
    parts = {part: placing.shapes(part, c, (c.llama.width, c.vision.width)) for part in PARTS}
    leaves = {f"{part}/{k}": random_leaf(shape, rng) for part, inner in parts.items() for k, shape in inner.items()}
    words = (words / "data/tokenizer.model.v1").read_bytes()
    source = Weights("random", OURS, leaves, {}, (), c.vision, c.llama,
                     tokenizer=words, image_mode="pad", template="v1")  # fmt: skip
    export.export(source, folder, "llava-hf")
    return max(x.nbytes for x in leaves.values())


def measured(command: list[str], files: Path) -> tuple[float, float]:
    """Seconds until everything is on the disk, and peak MiB, of a process that finds nothing of `files` in memory."""
    for path in files.iterdir():
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return time.perf_counter() - began, float(said.split()[-1]) if PEAK in command else 0.0


def main(c: Bench) -> None:
    """Print seconds, their ratio and the peak memory. ValueError if the disk is too small."""
    size = dataclasses.replace(LLAVA_7B, llama=dataclasses.replace(LLAVA_7B.llama, blocks=c.blocks))
    gib = 2 * spec.count(llava.spec(size)) / 2**30
    if (free := shutil.disk_usage(c.folder).free / 2**30) < 2.2 * gib:
        need = f"{c.folder} has {free:.0f} GiB free, this needs {2.2 * gib:.0f}"
        raise ValueError(f"{need}; name another --folder, or fewer --blocks")
    convert = [sys.executable, "-c", PEAK, str(ROOT / "recipes/convert.py")]
    rows: dict[str, list[tuple[float, float]]] = {"copy": [], "convert": []}
    with tempfile.TemporaryDirectory(dir=c.folder) as name:
        root = Path(name)
        largest = make(root / "hf", size)
        bare = measured([*convert, "--help"], root / "hf")[1]
        for _ in range(c.rounds):
            for what, command in {
                "copy": ["bash", "-c", f"cp -r {root}/hf {root}/out && sync {root}/out/*"],
                "convert": [*convert, str(root / "hf"), str(root / "out"), "--to", c.to],
            }.items():
                rows[what].append(measured(command, root / "hf"))
                shutil.rmtree(root / "out")
    seconds = {what: statistics.median(t for t, _ in rows[what]) for what in ("copy", "convert")}
    report(c, {
        "gib": gib, "to": c.to, "copy_s": seconds["copy"], "convert_s": seconds["convert"],
        "ratio": statistics.median(b / a for (a, _), (b, _) in zip(rows["copy"], rows["convert"], strict=True)),
        "spread": [b / a for (a, _), (b, _) in zip(rows["copy"], rows["convert"], strict=True)],
        "peak_mib": max(m for _, m in rows["convert"]), "bare_mib": bare, "largest_mib": largest / 2**20,
    })  # fmt: skip


def report(c: Bench, row: dict) -> None:
    """One JSON object, or a few lines."""
    if c.json:
        print(json.dumps(row))
        return
    print(f"{row['gib']:.1f} GiB to {c.to}: copy {row['copy_s']:.1f} s, convert {row['convert_s']:.1f} s, "
          f"ratio {row['ratio']:.2f} ({min(row['spread']):.2f} to {max(row['spread']):.2f})")  # fmt: skip
    limit = 2 * row["largest_mib"] + 300
    print(f"peak {row['peak_mib']:.0f} MiB, of which {row['bare_mib']:.0f} before anything is read; "
          f"twice the largest tensor and 300 MiB are {limit:.0f}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, tyro.cli(Bench, description=__doc__))
