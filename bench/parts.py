"""The parts of bench/card.py: each yields rows of its table, some with a target and whether it is met.

The targets are those of LLaVA-1.5-7B on one NVIDIA H200. Weights are random. `tiny`: the emoji model, without targets.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import step
import torch
import tyro
from decode import prompts
from operations import ceilings
from torch.utils.flop_counter import FlopCounterMode
from weights import random

from llava_fn import config, train, tree
from llava_fn.batch import collate
from llava_fn.bringup.parts import gradients
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.data import emoji
from llava_fn.generate import assistant, decode
from llava_fn.generate.options import ChatOptions, Decoding
from llava_fn.generate.types import Vocabulary
from llava_fn.kernels import check
from llava_fn.launch.device import environment, pick_device

HERE = Path(__file__).parent
Row = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """Where and what is measured. weights: a folder for a checkpoint that the parts share."""

    device: str
    weights: Path
    tiny: bool = False

    @property
    def model(self) -> config.Llava:
        return config.LLAVA_EMOJI if self.tiny else config.LLAVA_7B

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16  # which many CPUs compute slowly

    def samples(self, n: int) -> int:
        return max(1, n // 8) if self.tiny else n

    def judged(self, row: Row, name: str, target: float, most: bool = False) -> Row:
        """The row with a target for one of its figures: at least, or at `most`, so much."""
        if self.tiny:
            return row
        value = row[name]
        assert isinstance(value, float)
        met = value <= target if most else value >= target
        return row | {"target": f"{name} {'<=' if most else '>='} {target:g}", "met": met}


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """The median of so many rounds, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        start = now(device)
        call()
        times.append(now(device) - start)
    return statistics.median(times[1:])


def machine(s: Setting) -> Iterator[Row]:
    """What is there, and its ceilings."""
    device = pick_device(s.device)
    yield {"what": "environment", **environment(device), "card": check.machine(device)["name"]}
    copy, product = ceilings(device, s.dtype)
    yield {"what": f"ceilings, {s.dtype}", "copy GB/s": copy / 1e9, "product TFLOP/s": product / 1e12}
    x = torch.zeros(8, device=device)
    many = 1000
    each = seconds(lambda: [x.add_(1) for _ in range(many)], device) / many
    yield {"what": "launch of a small operation", "us": 1e6 * each}


def operations(s: Setting) -> Iterator[Row]:
    """Parity of every operation with its reference, and its time: python -m llava_fn.kernels.check."""
    device, large = pick_device(s.device), check.SMALL if s.tiny else check.CARD
    for dtype in (torch.float32, torch.bfloat16):
        for small, big in zip(check.cases(check.SMALL), check.cases(large), strict=True):
            yield check.measure(small, big, device, dtype, 3)


def parity(s: Setting) -> Iterator[Row]:
    """Loss and gradients of a tiny model against the CPU's in fp32."""
    yield from gradients(pick_device(s.device))


def training(s: Setting, model: config.Llava, stage: str, n: int, product: float) -> Row:
    """Samples a second of one update of n samples."""
    device = pick_device(s.device)
    how = step.Bench(device=s.device, samples=n, dtype=str(s.dtype).removeprefix("torch."))
    params = random(model, device, s.dtype, train.trains(config.STAGES[stage]))
    one = step.our_step(params, collate(step.make_samples(model, stage, n)).to(device), model, how, stage)
    one(1)
    with FlopCounterMode(display=False) as counter:
        one(2)
    found = [step.timed(one, number, how) for number in range(3, 6)]
    median = statistics.median(t for t, _ in found)
    return {"what": stage, "blocks": model.llama.blocks, "samples": n, "samples/s": n / median, "ms": 1e3 * median,
            "share of product": counter.get_total_flops() / median / product,
            "GiB above the weights": max(m for _, m in found) / 2**30}  # fmt: skip


def stage1(s: Setting) -> Iterator[Row]:
    """The projector is trained."""
    _, product = ceilings(pick_device(s.device), s.dtype)
    for n, target in ((8, 36.0), (16, 38.0), (32, 40.0)):
        row = training(s, s.model, "projector", s.samples(n), product)
        yield s.judged(row, "samples/s", target) if n > 8 else row


def stage2(s: Setting) -> Iterator[Row]:
    """The decoder is trained too: 8 blocks of it, whose masters and moments fit on one card."""
    _, product = ceilings(pick_device(s.device), s.dtype)
    model = replace(s.model, llama=replace(s.model.llama, blocks=min(8, s.model.llama.blocks)))
    yield s.judged(training(s, model, "projector+llama", s.samples(16), product), "share of product", 0.72)


def checkpointed(s: Setting) -> Path:
    """A checkpoint of random weights for `decoding` and `serving`, written once."""
    if not s.weights.exists():
        p = random(s.model, pick_device(s.device), torch.bfloat16, lambda _: False)
        words = (emoji.unpack(s.weights.with_name("emoji")) / "tokenizer.model").read_bytes()
        parts = ("vision", "projector", "llama")
        manifest = checkpoint.Manifest(s.model, parts, "square", "vicuna_v1", None)
        checkpoint.save(s.weights, manifest, tree.rebuild(p, [x.cpu() for x in tree.values(p)]), None, words)
    return s.weights


DECODING = {  # kind of weights -> rows -> tokens a second
    None: {1: 250.0, 8: 1500.0, 32: 4500.0},
    "int8": {1: 380.0, 8: 1500.0, 32: 4500.0},
}


def decoding(s: Setting) -> Iterator[Row]:
    """Answers of 64 tokens to an image and 45 tokens, greedy: bf16 and int8, as recipes load the model."""
    device = pick_device(s.device)
    copy, _ = ceilings(device, s.dtype)
    for kind, targets in DECODING.items():
        options = ChatOptions(
            (checkpointed(s),), device=s.device, dtype=str(s.dtype).removeprefix("torch."), quantise=kind, context=1024
        )
        m = assistant.load(options).model
        if kind is None:
            pixels = prompts(m.config, 1, str(device))[0].pixels
            yield {"what": "image tower", "ms": 1e3 * seconds(lambda m=m, x=pixels: decode.features(m, x), device)}
        for rows, target in targets.items():
            for row in answered(m, s, rows, kind or str(s.dtype), copy):
                name = "tokens/s" if "tokens/s" in row else "ms"
                wanted = target if name == "tokens/s" else 20.0
                yield s.judged(row, name, wanted, most=name == "ms") if name == "tokens/s" or rows == 1 else row


def answered(m: assistant.Model, s: Setting, rows: int, name: str, copy: float) -> Iterator[Row]:
    """The prefill and the steps of so many rows."""
    device, d = m.embed.device, Decoding(tokens=8 if s.tiny else 64)
    asked, words = decode.prompts(m, prompts(m.config, rows, str(device))), Vocabulary(m.config.llama.vocab, (-1,), str)
    size, times = decode.room(m, asked, d), []
    for _ in range(4):
        marks, cache = [now(device)], m.launcher.lend(m, rows, size)
        steps = decode.steps(m, decode.prefill(m, asked, cache, words), d, [0] * rows)
        next(steps).tolist()
        marks.append(now(device))
        list(decode.on_host(steps))
        m.launcher.done(cache)
        times.append((marks[1] - marks[0], (now(device) - marks[1]) / (d.tokens - 1)))
    first, one = (statistics.median(t) for t in zip(*times[1:], strict=True))
    yield {"what": f"prefill, {name}", "rows": rows, "ms": 1e3 * first}
    c, p = m.config.llama, m.params["llama"]
    keys = 2 * c.blocks * rows * (len(asked[0].ids) + d.tokens // 2) * c.kv_heads * c.head * m.embed.itemsize
    moved = sum(x.nbytes for x in tree.values(p)) - m.embed.nbytes * (not c.tied) + keys
    yield {"what": f"decoding, {name}", "rows": rows, "ms": 1e3 * one, "tokens/s": rows / one,
           "share of copy": moved / one / copy}  # fmt: skip


SERVING = {8: 14.0, 32: 26.0, 128: 35.0}  # clients -> requests a second


def serving(s: Setting) -> Iterator[Row]:
    """The server, over HTTP, an image and 64 tokens a request: bench/serve.py."""
    clients, tokens = ("1", "2") if s.tiny else ("1", "8", "32", "128"), "8" if s.tiny else "64"
    command = [sys.executable, str(HERE / "serve.py"), "--weights", str(checkpointed(s)), "--json", "--rounds", "1"]
    command += ["--slots", clients[-1], "--context", "512" if s.tiny else "1024", "--tokens", tokens]
    command += ["--requests", "4" if s.tiny else "256", "--clients", *clients]
    for row in json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)["rows"]:
        del row["tree"]
        target = SERVING.get(row["clients"])
        yield s.judged(row, "requests_s", target) if target else row
        if row["clients"] == 32:
            first = {"clients": 32, "first_p99_ms": row["first_p99_ms"]}
            yield s.judged(first, "first_p99_ms", 500.0, most=True)


def peers(s: Setting) -> Iterator[Row]:
    """Ours and transformers' in turns: what bench/step.py and bench/decode.py print."""
    small = ["--model", "prop", "--rounds", "1"]
    large = ["--model", "7b", "--dtype", "bfloat16", "--device", s.device, "--rounds", "3"]
    options = {"step.py": ["--samples", "1" if s.tiny else "16"], "decode.py": ["--new", "4" if s.tiny else "24"]}
    for script, more in options.items():
        command = [sys.executable, str(HERE / script), *(small if s.tiny else large), *more]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        yield from ({"what": script, "printed": line} for line in lines if line.strip())


PARTS = {
    part.__name__: part for part in (machine, parity, stage1, decoding, serving, stage2, operations, peers)
}  # those of bench/card.py, which has their time limits


def main(name: tyro.conf.Positional[str], s: tyro.conf.OmitArgPrefixes[Setting]) -> None:
    """Print the rows of a part as lines of JSON."""
    torch.set_num_threads(1 if s.device == "cpu" else torch.get_num_threads())
    for row in PARTS[name](s):
        print(json.dumps({"part": name} | row), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
