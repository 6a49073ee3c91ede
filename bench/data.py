"""How many samples a second one core prepares, and so how many cores feed one device; what an index of records costs.

    python bench/data.py
    python bench/data.py --index 665000 --lines 10000000

Photograph-like JPEGs of the sizes of LLaVA-Pretrain are written to a temporary folder, then read as training reads
them: decode, bicubic resize, tokenize, lay out. In one process, and in workers. `--index` writes a JSON list of so many
conversations of LLaVA-1.5's length (about 920 bytes), `--lines` JSON lines of 200 bytes, and reads them as a run does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from llava_fn import config
from llava_fn.data import emoji
from llava_fn.data import records as data
from llava_fn.data.options import Data, Source
from llava_fn.data.tokenizer import read_tokenizer


@dataclass(frozen=True)
class Bench:
    """What is read."""

    records: int = 256
    width: int = 500  # pixels of a picture; LLaVA-Pretrain's longest sides are about 500
    height: int = 375
    workers: int = 2
    goal: float = 32.0  # samples a second of one device
    index: int = 0  # records of a JSON list
    lines: int = 0  # records of JSON lines


def write(folder: Path, c: Bench) -> Source:
    """A data set of smooth noise, which JPEG compresses about as photographs."""
    rng, records = np.random.default_rng(0), []
    for j in range(c.records):
        coarse = Image.fromarray(rng.integers(0, 256, (c.height // 8, c.width // 8, 3), dtype=np.uint8))
        coarse.resize((c.width, c.height), Image.Resampling.BICUBIC).save(folder / f"{j}.jpg", quality=85)
        turns = [("human", "<image>\nDescribe it."), ("gpt", "a picture of some coloured clouds, number " + str(j))]
        values = [{"from": role, "value": value} for role, value in turns]
        records.append({"id": str(j), "image": f"{j}.jpg", "conversations": values})
    (folder / "records.json").write_text(json.dumps(records))
    return Source(folder / "records.json", folder)


def status(name: str) -> float:
    """MiB of this process. RssAnon: now, without pages of files; VmRSS: now, with them; VmHWM: the most of VmRSS."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name)]
    return int(line.split()[1]) / 1024


def measure(path: Path) -> None:
    """Read a file as a run does, in a process of its own, and print the time and the memory that it adds.

    A process that has read another file holds freed memory, which this one would fill without growing.
    """
    private, before, start = status("RssAnon"), status("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    try:
        records = data.read(Source(path, path.parent))
        said = f"{len(records)} records, {status('RssAnon') - private:.0f} MiB kept"
    except ValueError as error:
        said = str(error).removeprefix(f"{path}, ")
    seconds, most = time.perf_counter() - start, status("VmHWM") - before
    print(f"{path.name}, {path.stat().st_size / 1e6:.0f} MB: {seconds:.1f} s, at most {most:.0f} MiB more: {said}")


def read(folder: Path, name: str, count: int, words: int) -> None:
    """Write so many records and measure reading them, then the same with the end cut off, as by a broken download."""
    path, lines = folder / name, name.endswith(".jsonl")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is a picture. " * words}]
    with path.open("w") as f:
        f.write("" if lines else "[")
        for i in range(count):
            text = json.dumps({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
            f.write(f"{text}\n" if lines else f"{',' if i else ''}{text}")
        f.write("" if lines else "]")
    for _ in range(2):
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(path,))
        process.start()
        process.join()
        os.truncate(path, path.stat().st_size - 30)
    path.unlink()


def main(c: Bench) -> None:
    """Print the rates."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if c.index or c.lines:
            for file, count, words in (("list.json", c.index, 46), ("lines.jsonl", c.lines, 4)):
                if count:
                    read(folder, file, count, words)
            return
        source = write(folder, c)
        options = Data(sources=(source,), samples=32, workers=c.workers, epochs=4.0)
        vision = config.LLAVA_7B.vision
        tokenizer = read_tokenizer(emoji.unpack(folder / "emoji") / "tokenizer.model")
        preparation = data.preparation(tokenizer, vision.image, vision.patches, options)
        records = data.read(source)
        start = time.process_time()
        for record in records:
            data.sample(record, preparation)
        rate = c.records / (time.process_time() - start)
        print(f"one core: {rate:.0f} samples a CPU second; {c.goal / rate:.1f} cores feed {c.goal:.0f} samples/s")
        schedule, steps = data.schedule([records], options, preparation), []
        for step in data.steps([records], schedule, preparation, 0, schedule.steps()):
            steps.append((time.perf_counter(), len(step.batches[0].records)))
        seconds, count = steps[-1][0] - steps[0][0], sum(n for _, n in steps[1:])
        print(f"{c.workers} workers: {count / seconds:.0f} samples/s over {seconds:.1f} s, batches of 32 laid out")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
