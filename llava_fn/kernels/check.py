"""Parity and speed of every operation on the device that is there, as one table to paste into an issue.

    python -m llava_fn.kernels.check

Each operation runs as the model would run it on this device (its fused form on an NPU or CUDA card) and as its
reference. Errors are the largest deviation of the values, and of the gradients, from the reference in fp32 on the CPU,
as shares of the largest exact value, on a small ragged batch. Times are medians of forward passes at the sizes of
LLaVA-1.5-7B on a card, smaller ones on a CPU, where bf16 is slow and is not timed. It ends with status 1 if an error is
above its limit.
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import tyro
from torch import Tensor

from llava_fn.kernels.adamw import Coefficients
from llava_fn.kernels.attention import Segments
from llava_fn.kernels.decode import lengths_device
from llava_fn.kernels.rotary import rotary_tables

LIMITS = {"float32": 1e-5, "bfloat16": 2.0**-6}  # of an error, as a share of the largest exact value
Moved = tuple[int, int]  # numbers read and written, and floating-point operations, in one forward pass


@dataclass(frozen=True)
class Sizes:
    """Of one batch: a stream of samples, and the rows of a cache."""

    lengths: tuple[int, ...]
    tails: tuple[int, ...]  # of the segments, read in the last block
    width: int
    heads: int
    kv_heads: int
    head: int
    ffn: int
    vocab: int
    rows: int  # labelled
    cache: int


SMALL = Sizes((70, 70, 33, 1), (5, 70, 1, 1), 96, 6, 2, 128, 136, 50, 9, 80)
LAPTOP = Sizes((600,) * 4, (30,) * 4, 512, 8, 8, 64, 1376, 1024, 120, 640)
CARD = Sizes((600,) * 16, (30,) * 16, 4096, 32, 32, 128, 11008, 32000, 480, 2048)


@dataclass(frozen=True)
class Case:
    """One operation. call(form, *inputs) -> its result, where form is a function with the operation's arguments."""

    name: str
    module: str  # of kernels/
    op: str  # its public function in that module
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    call: Callable
    moved: Moved
    gradients: bool = True

    def form(self, name: str) -> Callable:
        """The public function for the name "chosen", else the form of this name."""
        module = importlib.import_module(f"llava_fn.kernels.{self.module}")
        return getattr(module, self.op if name == "chosen" else name)


def attention_cases(s: Sizes) -> list[Case]:
    """Causal over the stream, over the rows that the last block reads, CLIP's heads of 64, one token to a cache."""
    stream, last, t, b = Segments.of(s.lengths), Segments(s.tails, s.lengths), sum(s.lengths), len(s.lengths)
    q, kv, cache = (t, s.heads, s.head), (t, s.kv_heads, s.head), (b, s.cache, s.kv_heads, s.head)
    pairs = s.heads * s.head * sum(n * n for n in s.lengths)
    numbers = 2 * t * (s.heads + s.kv_heads) * s.head
    lengths = torch.tensor([max(1, s.cache - 9 * j) for j in range(b)])

    def decode(form: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return form(q, k, v, lengths.to(lengths_device(q.device)))

    clip = ((t, s.heads, 64),) * 3
    kinds: list[tuple[str, tuple[tuple[int, ...], ...], Segments, bool, int]] = [
        ("attention, causal", (q, kv, kv), stream, True, 2 * pairs),
        ("attention, last rows", ((sum(s.tails), *q[1:]), kv, kv), last, True, 0),
        ("attention, full", clip, stream, False, 4 * pairs * 64 // s.head),
    ]
    out = [
        Case(name, "attention", "attention", shapes, _attend(segments, causal), (numbers, flops))
        for name, shapes, segments, causal, flops in kinds
    ]
    shapes = ((b, s.heads, s.head), cache, cache)
    read = 2 * int(lengths.sum()) * s.kv_heads * s.head
    return [*out, Case("decoding", "decode", "decode_attention", shapes, decode, (read, 0), gradients=False)]


def _attend(segments: Segments, causal: bool) -> Callable:
    return lambda form, q, k, v: form(q, k, v, segments, causal)


def other_cases(s: Sizes) -> list[Case]:
    """Norms, activations, rotary embedding, cross-entropy."""
    t, d, f = sum(s.lengths), s.width, s.ffn
    positions = torch.cat([torch.arange(n) for n in s.lengths])
    targets = torch.arange(s.rows) % s.vocab

    @cache
    def tables(device: torch.device) -> tuple[Tensor, Tensor]:
        return rotary_tables(positions.to(device), s.head, 10000.0)

    def rotate(form: Callable, x: Tensor) -> Tensor:
        return form(x, *tables(x.device))

    def loss(form: Callable, x: Tensor) -> Tensor:
        return form(x, targets.to(x.device))

    def with_eps(form: Callable, *x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return form(*x, 1e-5)

    def plain(form: Callable, *x: Tensor) -> Tensor:
        return form(*x)

    pointwise = (2 * t * f, 0)
    return [
        Case("RMSNorm", "rms_norm", "rms_norm", ((t, d), (d,)), with_eps, (2 * t * d, 0)),
        Case("add and RMSNorm", "add_rms_norm", "add_rms_norm", ((t, d), (t, d), (d,)), with_eps, (4 * t * d, 0)),
        Case("LayerNorm", "layer_norm", "layer_norm", ((t, d), (d,), (d,)), with_eps, (2 * t * d, 0)),
        Case("rotary", "rotary", "rotary", ((t, s.heads, s.head),), rotate, (2 * t * s.heads * s.head, 0)),
        Case("SwiGLU", "swiglu", "swiglu", ((t, d), (f, d), (f, d)), plain, (0, 4 * t * d * f)),
        Case("quick GELU", "quick_gelu", "quick_gelu", ((t, f),), plain, pointwise),
        Case("GELU", "gelu", "gelu", ((t, f),), plain, pointwise),
        Case("cross-entropy", "cross_entropy", "cross_entropy", ((s.rows, s.vocab),), loss, (s.rows * s.vocab, 0)),
    ]  # fmt: skip


def adamw_case(s: Sizes) -> Case:
    """One update of one matrix: the result is the parameter. It is fp32 whatever the computation's dtype."""

    def update(form: Callable, *leaves: Tensor) -> Tensor:
        p, g, m, v = (x.detach().float().clone() for x in leaves)
        form([p], [g], [m], [v.square()], 3, Coefficients(1e-2, 0.9, 0.999, 1e-8, 0.1))
        return p

    d = s.width
    return Case("AdamW", "adamw", "adamw", ((d, d),) * 4, update, (11 * d * d, 0), gradients=False)


def cases(s: Sizes) -> list[Case]:
    """Every operation of kernels/ that has more than one form, at these sizes."""
    return [*attention_cases(s), *other_cases(s), adamw_case(s)]


def inputs(case: Case, device: torch.device, dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """The same numbers on every device."""
    rng = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=rng).to(dtype).to(device) for shape in case.shapes]
    return [x.requires_grad_() for x in made] if gradients else made


def results(case: Case, form: Callable, x: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    """The values and, if asked for, the gradients of every input for fixed ones of the values; fp32, on the host."""
    out = case.call(form, *x)
    out = list(out) if isinstance(out, tuple) else [out]
    if gradients:
        rng = torch.Generator().manual_seed(1)
        weights = [torch.randn(y.shape, generator=rng).to(y.dtype).to(y.device) for y in out]
        out += torch.autograd.grad(out, list(x), weights)
    return [y.detach().float().cpu() for y in out]


def errors(case: Case, form: Callable, device: torch.device, dtype: torch.dtype) -> list[float]:
    """The largest error of the values and, where there are gradients, of the gradients; see the module."""
    exact = results(case, case.form("reference"), _widened(case, dtype), case.gradients)
    mine = results(case, form, inputs(case, device, dtype, case.gradients), case.gradients)
    shares = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, exact, strict=True)]
    values = len(exact) - len(case.shapes) * case.gradients
    return [max(shares[:values]), *([max(shares[values:])] if case.gradients else [])]


def _widened(case: Case, dtype: torch.dtype) -> list[Tensor]:
    rounded = inputs(case, torch.device("cpu"), dtype, False)
    return [x.float().requires_grad_(case.gradients) for x in rounded]


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds of each call in each round; the calls take turns. On a CPU they are those of the process."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 2):
        for call, mine in zip(calls, times, strict=True):
            wait()
            began = clock()
            call()
            wait()
            if turn > 1:  # the first two warm up
                mine.append(clock() - began)
    return times


def row(small: Case, large: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> dict:
    """One line of the table."""
    found, name = errors(small, small.form("chosen"), device, dtype), str(dtype).removeprefix("torch.")
    out = {"operation": small.name, "dtype": name, "values": found[0]}
    out |= {"gradients": found[1]} if small.gradients else {}
    out["ok"] = max(found) <= LIMITS[name]
    if device.type == "cpu" and dtype == torch.bfloat16:
        return out
    x = inputs(large, device, dtype, False)
    forms = [large.form(form) for form in ("chosen", "reference")]
    with torch.no_grad():
        times = seconds([lambda form=form: large.call(form, *x) for form in forms], device, rounds)
    return out | dict(zip(("ms", "reference ms"), (1e3 * statistics.median(t) for t in times), strict=True))


def machine(device: torch.device) -> dict:
    """What the figures were made on."""
    npu = sys.modules.get("torch_npu")
    name = platform.machine() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    found = {"device": device.type, "name": name, "torch": torch.__version__, "python": platform.python_version()}
    return found | ({"torch_npu": npu.__version__} if npu else {})


def show(rows: Sequence[dict]) -> str:
    """Rows of one set of keys, or of fewer, as a table in Markdown."""
    keys = list(dict.fromkeys(key for r in rows for key in r))
    cells = [[_cell(r.get(key, "")) for key in keys] for r in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [keys, ["---"] * len(keys), *cells])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(rounds: int = 5, as_json: bool = False) -> int:
    """Check every operation in fp32 and bf16; 1 if one of them is wrong. rounds: of each timing."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    large = cases(LAPTOP if device.type == "cpu" else CARD)
    rows = [
        row(small, big, device, dtype, rounds)
        for dtype in (torch.float32, torch.bfloat16)
        for small, big in zip(cases(SMALL), large, strict=True)
    ]
    found = {"machine": machine(device), "rows": rows}
    print(json.dumps(found) if as_json else f"{found['machine']}\n\n{show(rows)}")
    return int(not all(r["ok"] for r in rows))


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
