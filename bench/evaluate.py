"""An evaluation's own costs: reading a large TSV, scoring DocVQA, and how long the device waits for images.

    python bench/evaluate.py

The TSV, in a temporary folder, holds pages of random bytes in base64. A process of its own reads it, shows its peak
memory, and computes the MD5 and the SHA-256 meanwhile, as of the real file. For the last figure a model with random
weights of the size of `prop` in step.py answers, and the pages are noise in the size of scans. The figure is the share
of its time that the loop of an evaluation waits for images, from its second batch on.
"""

from __future__ import annotations

import base64
import csv
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from step import MODELS

from llava_fn import llava, spec, tree
from llava_fn.data import emoji
from llava_fn.data.tokenizer import read_tokenizer
from llava_fn.evaluate import prompts, run, tally, tsv
from llava_fn.evaluate.folder import Settings
from llava_fn.evaluate.records import Dataset, Prediction, Question
from llava_fn.generate.assistant import Assistant
from llava_fn.generate.options import Decoding, Form
from llava_fn.launch.device import pick_device

ROOT = Path(__file__).parents[1]
ROWS = 5349  # of DocVQA's validation set
READ = """
import sys, time
from pathlib import Path
from llava_fn.evaluate import tsv
start = time.perf_counter()
rows = len(tsv.open_table(Path(sys.argv[1])).questions)
seconds = time.perf_counter() - start
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(rows, seconds, peak)
"""


@dataclass(frozen=True)
class Bench:
    """What is measured, and how large it is."""

    gigabytes: float = 1.0  # of the TSV that is read
    rows: int = ROWS  # that are scored
    questions: int = 48  # that are answered
    batch: int = 8
    workers: int = 2
    tokens: int = 16  # of an answer
    width: int = 1700  # pixels of a page; DocVQA's are about so large
    height: int = 2200
    model: Literal["brief", "prop", "7b"] = "prop"
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"


def write(path: Path, images: Iterable[bytes]) -> Path:
    """A TSV in DocVQA's columns."""
    with path.open("w", encoding="utf-8", newline="") as f:
        out = csv.writer(f, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        out.writerow(["index", "question", "answer", "split", "image"])
        for j, content in enumerate(images):
            out.writerow([j, f'What is "{j}"?', "['x', 'y']", "val", base64.b64encode(content).decode()])
        f.flush()
        os.fsync(f.fileno())  # or the disk would still write while it is read
    return path


def reading(folder: Path, c: Bench) -> str:
    """Rate and peak memory of reading a file."""
    draw = random.Random(0)
    size = 300_000
    path = write(folder / "DocVQA_VAL.tsv", (draw.randbytes(size) for _ in range(int(c.gigabytes * 1e9 * 0.75 / size))))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", READ, path], env=env, check=True, capture_output=True, text=True)
    rows, seconds, peak = map(float, done.stdout.split())
    megabytes = path.stat().st_size / 1e6
    path.unlink()
    rate = f"{megabytes / seconds:.0f} MB/s (target: 150 at least)"
    return f"read: {megabytes:.0f} MB, {rows:.0f} rows: {rate}, peak {peak * 1.024e-3:.0f} MB (target: under 500)"


def scoring(c: Bench) -> str:
    """Seconds to score answers of some words, each against three golds, and to make intervals of the scores."""
    draw = random.Random(0)
    word = "".join(draw.choices("abcdefghij ", k=40))
    data = Dataset("DocVQA_VAL", "docvqa", Path("x"), ("index", "question", "answer", "split"))
    questions, predictions = [], {}
    for j in range(c.rows):
        golds = [word[j % 20 : j % 20 + 15 + k] for k in range(3)]
        cells = {"index": str(j), "question": "q", "answer": str(golds), "split": "val"}
        questions.append(Question(j, str(j), cells, str(j // 4)))
        predictions[str(j)] = Prediction(str(j), "".join(draw.choices("abcdefghij ", k=20)), 9, 0.1)
    start = time.perf_counter()
    rows = tally.score_rows(data, questions, predictions, "anls")
    scored = time.perf_counter()
    tally.summarise("m", data, rows, "anls", {}, False)
    ended = time.perf_counter()
    target = f" (target: under 2 s for {ROWS})" if c.rows == ROWS else ""
    more = f"figures and intervals in {ended - scored:.2f} s more"
    return f"score: {c.rows} rows in {scored - start:.2f} s{target}, {more}"


def pages(c: Bench) -> Iterator[bytes]:
    """JPEGs of smooth noise, one for each question."""
    rng = np.random.default_rng(0)
    for _ in range(c.questions):
        coarse = Image.fromarray(rng.integers(0, 256, (c.height // 8, c.width // 8, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((c.width, c.height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
        yield out.getvalue()


def assistant(folder: Path, c: Bench) -> Assistant:
    """Random weights."""
    model, device = MODELS[c.model], pick_device(c.device)
    words = read_tokenizer(emoji.unpack(folder / "emoji") / "tokenizer.model")
    params = spec.init(llava.spec(model), 0)
    params = tree.rebuild(params, [x.to(device, getattr(torch, c.dtype)) for x in tree.values(params)])
    return Assistant(params, model, words, Form("llava_v1", "pad"), "llava_v1")


def waiting(folder: Path, c: Bench) -> str:
    """The share of its time that the loop of an evaluation waits for images."""
    a, table = assistant(folder, c), tsv.open_table(write(folder / "pages.tsv", pages(c)), "docvqa")
    s = Settings("", prompts.style("vlmevalkit", a.form), Decoding(c.tokens), a.context, c.dtype, None)
    queries = run.queries(table, s, run.parts(table, s), a.tokenizer, a.config.vision.patches)
    waits: list[float] = []

    def timed(batches: Iterable[run.ReadyBatch]) -> Iterator[run.ReadyBatch]:
        source = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            waits.append(time.perf_counter() - start)
            if batch is None:
                return
            yield batch

    shares, answered = run.batches(queries, s, c.batch, 1), 0
    ends = []
    for predictions in run.answer(a, timed(run.ahead(table, a, shares, c.workers)), s.decoding):
        ends.append(time.perf_counter())
        answered += len(predictions)
    seconds, share = ends[-1] - ends[0], sum(waits[1:-1]) / (ends[-1] - ends[0])
    rate = (answered - len(shares[0])) / seconds
    first = f"the first batch came after {waits[0]:.2f} s"
    of = f"{seconds:.1f} s ({c.model}, {rate:.2f} answers/s)"
    return f"wait: {100 * share:.2f} % (target: under 2 %) of {of}; {first}"


def main(c: Bench) -> None:
    """Print the figures, each beside its target, and the load of the machine."""
    print(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as name:
        print(reading(Path(name), c), flush=True)
        print(scoring(c), flush=True)
        print(waiting(Path(name), c), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
