"""Time of answers from pixels to tokens: ours and transformers' `generate`, same weights, same prompts, in turns.

    python bench/generate.py --model prop --rows 8

The peer is LlavaForConditionalGeneration.generate with its static cache and sdpa attention. It has no padding to do:
all prompts are equally long, an image and 45 tokens of text. The first token's time is the prefill with the image
tower; a step is the time from one token to the next, on the host. The tokens must agree in fp32. The figure is CPU
seconds of the process with one thread (work done, whatever else the machine does), and wall seconds with more. Medians
over rounds, and ratios. Needs the test extra.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Literal

import step
import torch
import tyro
from step import HF_IMAGE, MODELS, peer_model
from tensordict import TensorDict
from transformers.generation.streamers import BaseStreamer

from llava_fn import config, generate, image, llava
from llava_fn.batch import Sample
from llava_fn.cache import Cache
from llava_fn.generate import Words
from llava_fn.sampling import Decoding
from llava_fn.text import IMAGE
from llava_fn.weights.model import from_state_dict

TEXT = 45
Answer = Callable[[], tuple[list[list[int]], list[float]]]  # tokens of each step; the clock, before and after each


@dataclass(frozen=True)
class Bench:
    """One comparison."""

    model: Literal["brief", "prop"] = "prop"
    rows: int = 1
    new: int = 24
    rounds: int = 5
    threads: int = 1
    compile: str = ""  # backend for our decoding step, e.g. inductor; the peer stays eager
    json: bool = False


def prompts(c: config.Llava, rows: int) -> list[Sample]:
    """An image and text, of one length in every row."""
    rng = torch.Generator().manual_seed(0)
    out = []
    for j in range(rows):
        words = torch.randint(4, c.llama.vocab, (TEXT,), generator=rng).tolist()
        ids = (1, *[IMAGE] * c.vision.patches, *words)
        pixels = torch.randint(0, 256, (1, 3, c.vision.image, c.vision.image), generator=rng, dtype=torch.uint8)
        out.append(Sample(str(j), ids, (False,) * len(ids), pixels))
    return out


def ours(
    p: TensorDict, samples: list[Sample], c: config.Llava, n: int, clock: Callable, run: llava.Execution
) -> Answer:
    """Greedy answers that nothing ends, as `generate.generate` makes them."""
    words, d = Words(c.llama.vocab, (-1,), lambda _: ""), Decoding(tokens=n)

    def answer() -> tuple[list[list[int]], list[float]]:
        said, marks = [], [clock()]
        asked = generate.prompts(p, samples, c, run)
        cache = Cache.empty(c.llama, len(asked), generate.room(asked, d), p["llama"]["embed"])
        state = generate.prefill(p, asked, cache, words, c, run=run)
        for new in generate.on_host(generate.steps(p, state, d, [0] * len(asked), c, run)):
            said.append([token for (token,) in new])
            marks.append(clock())
        return said, marks

    return answer


@dataclass(frozen=True)
class Marks(BaseStreamer):
    """What transformers hands its tokens to: the prompt, then one of each row a step."""

    clock: Callable
    said: list[list[int]] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        """Note tokens and time."""
        self.said.append(value.tolist())
        self.marks.append(self.clock())

    def end(self) -> None:
        """Nothing is left to do."""


def theirs(peer: torch.nn.Module, samples: list[Sample], n: int, clock: Callable) -> Answer:
    """The same by transformers."""
    ids = torch.tensor([s.ids for s in samples])
    ids, pixels = torch.where(ids == IMAGE, HF_IMAGE, ids), image.normalise(torch.cat([s.pixels for s in samples]))
    mask = torch.ones_like(ids)

    def answer() -> tuple[list[list[int]], list[float]]:
        seen, began = Marks(clock), clock()
        peer.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, do_sample=False, max_new_tokens=n,
            min_new_tokens=n, cache_implementation="static", pad_token_id=0, streamer=seen,
        )  # fmt: skip
        return seen.said[1:], [began, *seen.marks[1:]]

    return answer


def main(c: Bench) -> dict[str, dict[str, float]]:
    """Print a table, or JSON; return it."""
    torch.set_num_threads(c.threads)
    clock = time.process_time if c.threads == 1 else time.perf_counter
    model = MODELS[c.model]
    peer, samples = peer_model(model, step.Bench()).eval(), prompts(model, c.rows)
    peer.generation_config.eos_token_id = None
    params = from_state_dict(peer.state_dict(), model)
    pair = {
        "ours": ours(params, samples, model, c.new, clock, llava.execution(backend=c.compile)),
        "transformers": theirs(peer, samples, c.new, clock),
    }
    (mine, _), (other, _) = (answer() for answer in pair.values())
    same = statistics.mean(a == b for x, y in zip(mine, other, strict=True) for a, b in zip(x, y, strict=True))
    times: dict[str, list[list[float]]] = {name: [] for name in pair}
    for _ in range(c.rounds):
        for name, answer in pair.items():
            marks = answer()[1]
            times[name].append([1e3 * (b - a) for a, b in pairwise(marks)])
    found = {name: {"prefill ms": statistics.median(t[0] for t in rounds),
                    "step ms": statistics.median(x for t in rounds for x in t[1:])}
             for name, rounds in times.items()}  # fmt: skip
    found["ratio"] = {k: found["transformers"][k] / v for k, v in found["ours"].items()}
    about = asdict(c) | {"same tokens": same, "clock": clock.__name__, "torch": torch.__version__}
    if c.json:
        print(json.dumps({"about": about, "found": found}))
    else:
        print(about)
        for name, row in found.items():
            print(f"{name:>13} " + "  ".join(f"{k} {v:.2f}" for k, v in row.items()))
    return found


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
