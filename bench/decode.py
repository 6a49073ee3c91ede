"""Time of answers from pixels to tokens: ours and transformers' `generate`, same weights, same prompts, in turns.

    python bench/decode.py --model prop --rows 8
    python bench/decode.py --device cuda --model 7b --dtype bfloat16 --compile inductor

The peer is LlavaForConditionalGeneration.generate with its static cache and sdpa attention; on a card and with
--compile it compiles its step too. It has no padding to do: all prompts are equally long, an image and 45 tokens of
text. Prefill is the time to the first token, image tower included; a step is the mean time of a token after it, on the
host. A step is bound by memory: it reads every weight of the decoder's blocks and the head once, and the keys and
values so far; the last column is the share of the device's copy bandwidth that this comes to. The tokens must agree in
fp32. On a CPU with one thread the figure is CPU seconds of the process (work done, whatever else the machine does),
else wall seconds. Medians over rounds, and ratios. Needs the test extra.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import step
import torch
import tyro
from operations import ceilings
from step import HF_IMAGE, MODELS, peer_model
from tensordict import TensorDict
from transformers.generation.streamers import BaseStreamer

from llava_fn import config, tree, vit
from llava_fn.batch import IMAGE, Sample
from llava_fn.generate import decode
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model, Vocabulary
from llava_fn.kernels import check
from llava_fn.weights.model import from_state_dict

TEXT = 45
Clock = Callable[[], float]  # seconds, once the device is idle
Answer = Callable[[], tuple[list[list[int]], list[float]]]  # tokens of each step; times of start, first token and end


@dataclass(frozen=True)
class Bench:
    """One comparison."""

    model: Literal["brief", "prop", "7b"] = "prop"
    rows: int = 1
    new: int = 24
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: str = ""  # backend for our decoding step, e.g. inductor
    json: bool = False

    def __post_init__(self) -> None:
        if self.new < 2:
            raise ValueError(f"new={self.new}: must be at least 2, the first token and a step")


def prompts(c: config.Llava, rows: int, device: str) -> list[Sample]:
    """An image and text, of one length in every row."""
    rng = torch.Generator().manual_seed(0)
    out = []
    for j in range(rows):
        words = torch.randint(4, c.llama.vocab, (TEXT,), generator=rng).tolist()
        ids = (1, *[IMAGE] * c.vision.patches, *words)
        pixels = torch.randint(0, 256, (1, 3, c.vision.image, c.vision.image), generator=rng, dtype=torch.uint8)
        out.append(Sample(str(j), ids, (False,) * len(ids), pixels.to(device)))
    return out


def clock_of(c: Bench) -> Clock:
    """CPU seconds of one thread, or wall seconds."""
    if c.device == "cpu":
        return time.process_time if c.threads == 1 else time.perf_counter

    def wait() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return wait


def ours(m: Model, samples: list[Sample], n: int, clock: Clock) -> Answer:
    """Greedy answers of n tokens, as `decode.generate` makes them."""
    vocabulary, d = Vocabulary(m.config.llama.vocab, (-1,), lambda _: ""), Decoding(tokens=n)

    def answer() -> tuple[list[list[int]], list[float]]:
        marks = [clock()]
        prompts = decode.prompts(m, samples)
        state = decode.prefill(m, prompts, m.cache(len(prompts), decode.room(m, prompts, d)), vocabulary)
        steps = decode.steps(m, state, d, [0] * len(prompts))
        tokens = [next(steps).tolist()]
        marks.append(clock())
        tokens += decode.on_host(steps)
        return [[token for (token,) in row] for row in tokens], [*marks, clock()]

    return answer


@dataclass(frozen=True)
class Marks(BaseStreamer):
    """The streamer that transformers calls with the prompt, and then with each step's tokens."""

    clock: Clock
    tokens: list[list[int]] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        """Note the tokens, and the time of the first."""
        self.tokens.append(value.tolist())
        if len(self.tokens) == 2:
            self.marks.append(self.clock())

    def end(self) -> None:
        """Nothing is left to do."""


def theirs(peer: torch.nn.Module, samples: list[Sample], n: int, clock: Clock) -> Answer:
    """The same by transformers."""
    ids, pixels = torch.tensor([s.ids for s in samples]), torch.cat([s.pixels for s in samples])
    ids = torch.where(ids == IMAGE, HF_IMAGE, ids).to(pixels.device)
    pixels, mask = vit.normalise(pixels).to(peer.dtype), torch.ones_like(ids)

    def answer() -> tuple[list[list[int]], list[float]]:
        streamer, start = Marks(clock), clock()
        peer.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, do_sample=False, max_new_tokens=n,
            min_new_tokens=n, cache_implementation="static", pad_token_id=0, streamer=streamer,
        )  # fmt: skip
        return streamer.tokens[1:], [start, *streamer.marks, clock()]

    return answer


def step_bytes(p: TensorDict, samples: list[Sample], c: Bench) -> int:
    """Bytes that a step reads: the decoder without the embedding table, and the keys and values halfway through."""
    t = MODELS[c.model].llama
    keys = 2 * t.blocks * c.rows * (len(samples[0].ids) + c.new // 2) * t.kv_heads * t.head
    weights = sum(x.numel() for x in tree.values(p["llama"])) - p["llama"]["embed"].numel()
    return (weights + keys) * getattr(torch, c.dtype).itemsize


def measure(pair: dict[str, Answer], c: Bench, size: int, copy: float) -> list[dict]:
    """A row for each of the two, and their ratio. size: bytes of a step; copy: bytes a second."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pair}
    for _ in range(c.rounds):
        for name, answer in pair.items():
            a, b, end = answer()[1]
            times[name].append((b - a, (end - b) / (c.new - 1)))
    table = []
    for name, rounds in times.items():
        prefill, one = (statistics.median(x) for x in zip(*rounds, strict=True))
        spread = [1e3 * f(x for _, x in rounds) for f in (min, max)]
        table.append({
            "who": name, "prefill ms": 1e3 * prefill, "step ms": 1e3 * one, "from": spread[0], "to": spread[1],
            "tokens/s": c.rows / one, "GB/s": size / one / 1e9, "share of copy": size / one / copy,
        })  # fmt: skip
    ratio = {key: table[1][key] / table[0][key] for key in ("prefill ms", "step ms")}
    return [*table, {"who": "ratio"} | ratio]


def main(c: Bench) -> list[dict]:
    """Print a table, or JSON; return its rows."""
    torch.set_num_threads(c.threads)
    model, device, dtype = MODELS[c.model], torch.device(c.device), getattr(torch, c.dtype)
    peer = peer_model(model, step.Bench(device=c.device)).eval().to(dtype)
    peer.generation_config.eos_token_id = None
    peer.generation_config.disable_compile = not c.compile
    p, samples, clock = from_state_dict(peer.state_dict(), model), prompts(model, c.rows, c.device), clock_of(c)
    pair = {
        "ours": ours(Model(p, model, step=decode.compiled_step(c.compile)), samples, c.new, clock),
        "transformers": theirs(peer, samples, c.new, clock),
    }
    (one, _), (other, _) = (answer() for answer in pair.values())
    same = statistics.mean(a == b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    rows = measure(pair, c, step_bytes(p, samples, c), ceilings(device, dtype)[0])
    clocks = "CPU seconds" if clock is time.process_time else "wall seconds"
    about = check.machine(device) | asdict(replace(c, json=False)) | {"same tokens": same, "figure": clocks}
    print(json.dumps({"about": about, "rows": rows}) if c.json else f"{about}\n\n{check.show(rows)}")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
