"""What int8 linears cost: next-token agreement with the model as it was, nats per token, memory, and time of a step.

    python bench/quantise.py --emoji runs/emoji

On SmolLM2-135M's real weights, out of the package that ships them, with text of the language reference that comes with
Python; and, given a run of recipes/pretrain.py on the emoji, on their held-out captions. Every token is predicted from
the true ones before it. Agreement: how often both models find the same token most likely; nats: the mean negative
log-likelihood of the true token. A step is one of decoding at one row, eager, in wall milliseconds. Needs the test
extra.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from smollm2 import load, text
from tensordict import TensorDict
from torch import Tensor

from llava_fn import config, linear, llama, llava, tree
from llava_fn.batch import Stream, collate
from llava_fn.cache import Cache
from llava_fn.data import emoji
from llava_fn.data import records as data
from llava_fn.data.options import Source
from llava_fn.data.tokenizer import open_tokenizer
from llava_fn.generate import assistant
from llava_fn.kernels.check import show
from llava_fn.weights import model

Score = Callable[[TensorDict], Tensor]  # -> logits f[n, v]


@dataclass(frozen=True)
class Bench:
    """emoji: a run's folder or a checkpoint. rows, tokens: pieces of the text, and their length.

    chunk: tokens of the text that pass the model at a time. A CPU takes the product that int8 has for steps of decoding
    up to 16, or up to 7 if it has VNNI; with more it makes each weight whole, or with VNNI multiplies integers.
    """

    emoji: Path | None = None
    rows: int = 8
    tokens: int = 512
    chunk: int = 16
    smollm2: bool = True


def size(p: TensorDict) -> float:
    """MiB."""
    return sum(x.numel() * x.element_size() for x in tree.values(p)) / 2**20


def step_ms(p: TensorDict, c: config.Llama) -> float:
    """Median of twenty steps after a short prompt."""
    cache, ids, times = Cache.empty(c, 1, 64, p["llama"]["embed"]), torch.tensor([3]), []
    for _ in range(24):
        begin = time.perf_counter()
        _, cache = llama.decode_step(p["llama"], ids, cache, c)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[4:])


@torch.no_grad()
def compare(name: str, p: TensorDict, c: config.Llama, score: Score, targets: Tensor) -> dict:
    """One line of the table."""
    small = linear.quantise(p)
    before, after = score(p).float(), score(small).float()
    nats = [torch.nn.functional.cross_entropy(x, targets).item() for x in (before, after)]
    return {
        "model": name, "tokens": len(targets),
        "agreement %": f"{100 * (before.argmax(-1) == after.argmax(-1)).double().mean():.2f}",
        "nats": f"{nats[0]:.4f}", "int8 nats": f"{nats[1]:.4f}", "change": f"{nats[1] - nats[0]:+.4f}",
        "MiB": f"{size(p):.1f}", "int8 MiB": f"{size(small):.1f}",
        "blocks MiB": f"{size(p['llama', 'blocks']):.1f}", "int8 blocks MiB": f"{size(small['llama', 'blocks']):.1f}",
        "step ms": f"{step_ms(p, c):.1f}", "int8 step ms": f"{step_ms(small, c):.1f}",
    }  # fmt: skip


def captions(folder: Path) -> dict:
    """On the held-out emoji."""
    source = assistant.open_weights([folder])
    c, p = model.config(source), tree.cast(model.load(source), torch.float32)
    how = data.Preparation(
        open_tokenizer(source.tokenizer), source.template, source.compat, source.image_mode, c.vision.image,
        c.vision.patches, 2048,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        emoji.unpack(Path(place) / "emoji")
        records = data.read(Source(Path(place) / "emoji/heldout.json", Path(place) / "emoji"))
        batch = collate([data.sample(record, how) for record in records])

    def score(p: TensorDict) -> Tensor:
        return llama.logits(p["llama"], llava.forward(p, batch, c)[batch.labelled], c.llama)

    return compare(f"emoji, {len(records)} held-out captions", p, c.llama, score, batch.targets)


def hidden(p: TensorDict, ids: Tensor, c: config.Llama, chunk: int) -> Tensor:
    """Hidden states of a text, int64[t] -> t d, `chunk` tokens at a time."""
    cache, out = Cache.empty(c, 1, len(ids), p["embed"]), []
    for at, part in zip(range(0, len(ids), chunk), ids.split(chunk), strict=True):
        x, cache = llama.prefill(p, p["embed"][part], Stream.of([len(part)], None, [at]), cache, c)
        out.append(x)
    return torch.cat(out)


def smollm2(rows: int, tokens: int, chunk: int) -> dict:
    """On text."""
    _, tokenizer, c, p = load()
    ids = torch.tensor(text(tokenizer, rows * tokens)).view(rows, tokens)

    def score(p: TensorDict) -> Tensor:
        x = [hidden(p["llama"], row, c, chunk)[:-1] for row in ids]
        return llama.logits(p["llama"], torch.cat(x), c)

    return compare("SmolLM2-135M", p, c, score, ids[:, 1:].flatten())


def main(c: Bench) -> None:
    """Print the table."""
    rows = [captions(c.emoji)] if c.emoji else []
    print(show(rows + ([smollm2(c.rows, c.tokens, c.chunk)] if c.smollm2 else [])))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
