"""Time of answers from pixels to tokens: ours and transformers' `generate`, same weights, same prompts, in turns.

    python bench/decode.py --model prop --rows 8
    python bench/decode.py --device cuda --model 7b --dtype bfloat16 --compile inductor
    python bench/decode.py --model smollm2 --new 64

The peer is LlavaForConditionalGeneration.generate with its static cache and sdpa attention; on a card and with
--compile it compiles its step too. It has no padding to do: all prompts are equally long, an image and 45 tokens of
text. SmolLM2-135M has real weights and 602 tokens of text instead. It is measured in int8 too, and against llama.cpp if
the package xllamacpp is installed. Prefill is the time to the first token, image tower included; a step is the mean
time of a token after it, on the host. A step is bound by memory: it reads every weight of the decoder's blocks and the
head once, and the keys and values so far; the last column is the share of the device's copy bandwidth that this comes
to. The tokens must agree in fp32. On a CPU with one thread the figure is CPU seconds of the process (work done,
whatever else the machine does), else wall seconds. Medians over rounds, and ratios. Needs the test extra.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import smollm2
import step
import torch
import tyro
from operations import ceilings
from step import HF_IMAGE, MODELS, peer_model
from tensordict import TensorDict
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from llava_fn import config, linear, tree, vit
from llava_fn.batch import IMAGE, Sample
from llava_fn.generate import decode
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model, Prompt, Vocabulary
from llava_fn.kernels import check
from llava_fn.parallel.mesh import Axis
from llava_fn.weights.model import from_state_dict

TEXT = 45
Clock = Callable[[], float]  # seconds, once the device is idle
Answer = Callable[[], tuple[list[list[int]], list[float]]]  # tokens of each step; times of start, first token and end


@dataclass(frozen=True)
class Bench:
    """One comparison."""

    model: Literal["brief", "prop", "7b", "smollm2"] = "prop"
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
        if self.model == "smollm2" and (self.rows, self.device, self.dtype) != (1, "cpu", "float32"):
            raise ValueError("smollm2 is measured at one row, on a CPU, in float32")


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


def ours(m: Model, ask: Callable[[], list[Prompt]], n: int, clock: Clock) -> Answer:
    """Greedy answers of n tokens, as `decode.generate` makes them, to what `ask` returns."""
    vocabulary, d = Vocabulary(m.config.llama.vocab, (-1,), lambda _: ""), Decoding(tokens=n)

    def answer() -> tuple[list[list[int]], list[float]]:
        marks = [clock()]
        prompts = ask()
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


def seen_by(peer: torch.nn.Module, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """The samples as transformers takes them."""
    ids, pixels = torch.tensor([s.ids for s in samples]), torch.cat([s.pixels for s in samples])
    ids = torch.where(ids == IMAGE, HF_IMAGE, ids).to(pixels.device)
    return {"input_ids": ids, "pixel_values": vit.normalise(pixels).to(peer.dtype)}


def theirs(peer: torch.nn.Module, inputs: dict[str, torch.Tensor], n: int, clock: Clock) -> Answer:
    """The same by transformers."""
    mask = torch.ones_like(inputs["input_ids"])

    def answer() -> tuple[list[list[int]], list[float]]:
        streamer, start = Marks(clock), clock()
        peer.generate(
            **inputs, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=n,
            cache_implementation="static", pad_token_id=0, streamer=streamer,
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


def arranged(p: TensorDict, backend: str, quantise: linear.Kind | None = None) -> TensorDict:
    """The parameters as an assistant places them."""
    return tree.build(linear.arranged(linear.placed(p, None, None, quantise, Axis("tp")), False, backend))


def with_llama_cpp(c: Bench) -> list[dict]:
    """The table of SmolLM2: ours in fp32 and int8, transformers, llama.cpp."""
    peer, tokenizer, llama, p = smollm2.load()
    peer.generation_config.eos_token_id = None
    ids, whole, clock = smollm2.text(tokenizer, 602), config.Llava(config.LLAVA_EMOJI.vision, llama), clock_of(c)
    peers: dict[str, Callable] = {}
    for name, params in (("ours, fp32", arranged(p, c.compile)), ("ours, int8", arranged(p, c.compile, "int8"))):
        m = Model(params, whole, step=decode.compiled_step(c.compile))
        peers[name] = ours(m, lambda m=m: [Prompt(tuple(ids), m.embed[:0])], c.new, clock)
    peers["transformers, fp32"] = theirs(peer, {"input_ids": torch.tensor([ids])}, c.new, clock)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("F32", "F16", "Q8_0") if importlib.util.find_spec("xllamacpp") else ():
            smollm2.write_gguf(kind, path := Path(folder) / f"{kind}.gguf")
            peers[f"llama.cpp, {kind}"] = smollm2.llama_cpp(path, ids, c.new, clock, c.threads)
        return speeds(peers, tokenizer, c, len(ids))


def speeds(peers: dict[str, Callable], tokenizer: PreTrainedTokenizerBase, c: Bench, prompt: int) -> list[dict]:
    """Tokens/s of each, in turns, and how many characters of its answer equal the first one's."""
    rounds = [{name: answer() for name, answer in peers.items()} for _ in range(c.rounds)]
    said = [tokens if isinstance(tokens, str) else tokenizer.decode([int(t) for (t,) in tokens])
            for tokens, _ in rounds[0].values()]  # fmt: skip
    out = []
    for name, text in zip(peers, said, strict=True):
        prefill, one = (statistics.median(x) for x in zip(*(
            (b - a, (end - b) / (c.new - 1)) for a, b, end in (r[name][1] for r in rounds)
        ), strict=True))  # fmt: skip
        same = len(os.path.commonprefix([text, said[0]]))
        out.append({"who": name, "prefill tokens/s": prompt / prefill, "tokens/s": 1 / one, "step ms": 1e3 * one,
                    "same text": f"{same} of {len(said[0])}"})  # fmt: skip
    return out


def main(c: Bench) -> list[dict]:
    """Print a table, or JSON; return its rows."""
    torch.set_num_threads(c.threads)
    if c.model == "smollm2":
        rows, about = with_llama_cpp(c), check.machine(torch.device("cpu")) | asdict(replace(c, json=False))
        print(json.dumps({"about": about, "rows": rows}) if c.json else f"{about}\n\n{check.show(rows)}")
        return rows
    model, device, dtype = MODELS[c.model], torch.device(c.device), getattr(torch, c.dtype)
    peer = peer_model(model, step.Bench(device=c.device)).eval().to(dtype)
    peer.generation_config.eos_token_id = None
    peer.generation_config.disable_compile = not c.compile
    p, samples, clock = from_state_dict(peer.state_dict(), model), prompts(model, c.rows, c.device), clock_of(c)
    m = Model(arranged(p, c.compile), model, step=decode.compiled_step(c.compile))
    pair = {
        "ours": ours(m, lambda: decode.prompts(m, samples), c.new, clock),
        "transformers": theirs(peer, seen_by(peer, samples), c.new, clock),
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
