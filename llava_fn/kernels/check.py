"""Parity and speed of every operation on a device: a case each, and how it is measured.

    python -m llava_fn.kernels.check

runs them with all else that a new card may fail at, as llava_fn/bringup says. Each operation runs in the form that the
model uses on this device (the fused form on an NPU or CUDA card) and in its reference form. An error is the largest
deviation of the values, or of the gradients, from the reference in fp32 on the CPU, as a share of the largest reference
value, on a small ragged batch. Times are medians of forward passes: on a card at the sizes of LLaVA-1.5-7B, on a CPU at
smaller ones and not in bf16, which is slow there.
"""

from __future__ import annotations

import importlib
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llava_fn.kernels.adamw import Coefficients
from llava_fn.kernels.attention import Segments
from llava_fn.kernels.decode import Held
from llava_fn.kernels.rotary import rotary_tables

LIMITS = {"float32": 1e-5, "bfloat16": 2.0**-6}  # of an error, as a share of the largest reference value
Work = tuple[int, int]  # of one forward pass: numbers read and written, and floating-point operations


@dataclass(frozen=True)
class Sizes:
    """Sizes of one batch."""

    lengths: tuple[int, ...]  # of the samples in the stream
    tails: tuple[int, ...]  # rows at the end of each sample that the last block computes
    width: int
    heads: int
    kv_heads: int
    head: int
    ffn: int
    vocab: int
    labels: int
    cache: int  # keys per row of the KV cache


SMALL = Sizes((70, 70, 33, 1), (5, 70, 1, 1), 96, 6, 2, 128, 136, 50, 9, 80)
LAPTOP = Sizes((600,) * 4, (30,) * 4, 512, 8, 8, 64, 1376, 1024, 120, 640)
CARD = Sizes((600,) * 16, (30,) * 16, 4096, 32, 32, 128, 11008, 32000, 480, 2048)


@dataclass(frozen=True)
class Case:
    """One operation. call(form, *inputs) -> the result of `form`, a function with the operation's parameters."""

    name: str
    module: str  # of kernels/
    op: str  # the module's public function
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    call: Callable
    work: Work
    gradients: bool = True
    rounds: float = 0.0  # the limit of its error where a form rounds more than LIMITS allows

    def form(self, name: str) -> Callable:
        """The module's function of this name; "chosen": the public one, which chooses by device."""
        module = importlib.import_module(f"llava_fn.kernels.{self.module}")
        return getattr(module, self.op if name == "chosen" else name)


def attention_cases(s: Sizes) -> list[Case]:
    """Attention: causal, causal as in the last block, and full with CLIP's heads of 64."""
    stream, last, t = Segments.of(s.lengths), Segments(s.tails, s.lengths), sum(s.lengths)
    q, kv = (t, s.heads, s.head), (t, s.kv_heads, s.head)
    pairs = s.heads * s.head * sum(n * n for n in s.lengths)
    numbers = 2 * t * (s.heads + s.kv_heads) * s.head
    clip = ((t, s.heads, 64),) * 3
    kinds: list[tuple[str, tuple[tuple[int, ...], ...], Segments, bool, int]] = [
        ("attention, causal", (q, kv, kv), stream, True, 2 * pairs),
        ("attention, last rows", ((sum(s.tails), *q[1:]), kv, kv), last, True, 0),
        ("attention, full", clip, stream, False, 4 * pairs * 64 // s.head),
    ]
    return [
        Case(name, "attention", "attention", shapes, _attend(segments, causal), (numbers, flops))
        for name, shapes, segments, causal, flops in kinds
    ]


def cache_cases(s: Sizes) -> list[Case]:
    """A step of decoding: one token of each row to a cache of rows and to one in pages, and its keys and values."""
    b = len(s.lengths)
    cache, new = (b, s.cache, s.kv_heads, s.head), (b, s.kv_heads, s.head)
    lengths = tuple(max(1, s.cache - 9 * j) for j in range(b))

    def decode(form: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return form(q, k, v, Held.of(torch.tensor(lengths, device=q.device), s.cache, None, lengths))

    def paged(form: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (pages, size), table = k.shape[:2], torch.arange(len(k), dtype=torch.int32, device=q.device)
        held = tuple(max(1, pages // b * size - 9 * j) for j in range(b))
        table = table.flip(0).view(b, -1)
        return form(q, k, v, Held.of(torch.tensor(held, device=q.device), pages // b * size, table, held))

    def write(form: Callable, k: Tensor, v: Tensor, *new: Tensor) -> tuple[Tensor, Tensor]:
        form(k := k.clone(), v := v.clone(), *new, torch.arange(b, device=k.device) * (s.cache + 1))
        return k, v

    q = (b, s.heads, s.head)
    read = 2 * sum(lengths) * s.kv_heads * s.head
    pages = (b * -(-s.cache // 256), 256, s.kv_heads, s.head)
    return [
        Case("decoding", "decode", "decode_attention", (q, cache, cache), decode, (read, 0), gradients=False),
        Case("decoding, in pages", "decode", "decode_attention", (q, pages, pages), paged, (read, 0), False),
        Case("keys and values", "write_kv", "write_kv", (cache, cache, new, new), write, (0, 0), gradients=False),
    ]


def _attend(segments: Segments, causal: bool) -> Callable:
    return lambda form, q, k, v: form(q, k, v, segments, causal)


def other_cases(s: Sizes) -> list[Case]:
    """Norms, activations, rotary embedding, cross-entropy."""
    t, d, f = sum(s.lengths), s.width, s.ffn
    positions = torch.cat([torch.arange(n) for n in s.lengths])
    targets = torch.arange(s.labels) % s.vocab

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

    def int8(form: Callable, x: Tensor, w: Tensor) -> Tensor:
        return form(x, (32 * w).round().clamp(-127, 127).to(torch.int8), w[:, :1].float().abs() / 32)

    pointwise = (2 * t * f, 0)
    return [
        Case("RMSNorm", "rms_norm", "rms_norm", ((t, d), (d,)), with_eps, (2 * t * d, 0)),
        Case("add and RMSNorm", "add_rms_norm", "add_rms_norm", ((t, d), (t, d), (d,)), with_eps, (4 * t * d, 0)),
        Case("LayerNorm", "layer_norm", "layer_norm", ((t, d), (d,), (d,)), with_eps, (2 * t * d, 0)),
        Case("rotary", "rotary", "rotary", ((t, s.heads, s.head),), rotate, (2 * t * s.heads * s.head, 0)),
        Case("SwiGLU", "swiglu", "swiglu", ((t, d), (f, d), (f, d)), plain, (0, 4 * t * d * f)),
        Case("int8 linear", "int8_linear", "int8_linear", ((t, d), (f, d)), int8, (0, 2 * t * d * f), False, 2**-14),
        Case("quick GELU", "quick_gelu", "quick_gelu", ((t, f),), plain, pointwise),
        Case("GELU", "gelu", "gelu", ((t, f),), plain, pointwise),
        Case("cross-entropy", "cross_entropy", "cross_entropy", ((s.labels, s.vocab),), loss, (s.labels * s.vocab, 0)),
    ]  # fmt: skip


def adamw_case(s: Sizes) -> Case:
    """One update of one matrix, always in fp32. The result is the parameter."""

    def update(form: Callable, *leaves: Tensor) -> Tensor:
        p, g, m, v = (x.detach().float().clone() for x in leaves)
        form([p], [g], [m], [v.square()], 3, Coefficients(1e-2, 0.9, 0.999, 1e-8, 0.1))
        return p

    d = s.width
    return Case("AdamW", "adamw", "adamw", ((d, d),) * 4, update, (11 * d * d, 0), gradients=False)


def cases(s: Sizes) -> list[Case]:
    """Every operation of kernels/ that has more than one form, at these sizes."""
    return [*attention_cases(s), *cache_cases(s), *other_cases(s), adamw_case(s)]


def inputs(case: Case, device: torch.device, dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """Random inputs, the same numbers on every device."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng).to(dtype).to(device).requires_grad_(gradients) for shape in case.shapes]


def results(case: Case, form: Callable, x: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    """The values and, with `gradients`, the gradients of the inputs for fixed output gradients; fp32, on the host."""
    out = case.call(form, *x)
    out = list(out) if isinstance(out, tuple) else [out]
    if gradients:
        rng = torch.Generator().manual_seed(1)
        weights = [torch.randn(y.shape, generator=rng).to(y.dtype).to(y.device) for y in out]
        out += torch.autograd.grad(out, list(x), weights)
    return [y.detach().float().cpu() for y in out]


def errors(case: Case, form: Callable, device: torch.device, dtype: torch.dtype) -> list[float]:
    """The largest error of the values and, if the case has gradients, of the gradients; see the module."""
    rounded = [x.float().requires_grad_(case.gradients) for x in inputs(case, torch.device("cpu"), dtype, False)]
    exact = results(case, case.form("reference"), rounded, case.gradients)
    checked = results(case, form, inputs(case, device, dtype, case.gradients), case.gradients)
    shares = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(checked, exact, strict=True)]
    values = len(exact) - len(case.shapes) * case.gradients
    return [max(shares[:values]), *([max(shares[values:])] if case.gradients else [])]


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, after two rounds of warm-up; the calls take turns. On a CPU, CPU time."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 2):
        for call, own in zip(calls, times, strict=True):
            synchronize()
            start = clock()
            call()
            synchronize()
            own.append(clock() - start)
    return [own[2:] for own in times]


def measure(small: Case, large: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> dict:
    """A row of the table: errors of the small case, times of the large one."""
    shares, name = errors(small, small.form("chosen"), device, dtype), str(dtype).removeprefix("torch.")
    out = {"operation": small.name, "dtype": name, "values": shares[0]}
    out |= {"gradients": shares[1]} if small.gradients else {}
    out["ok"] = max(shares) <= max(LIMITS[name], small.rounds)
    if device.type == "cpu" and dtype == torch.bfloat16:
        return out
    x = inputs(large, device, dtype, False)
    forms = [large.form(form) for form in ("chosen", "reference")]
    with torch.no_grad():
        times = seconds([lambda form=form: large.call(form, *x) for form in forms], device, rounds)
    return out | dict(zip(("ms", "reference ms"), (1e3 * statistics.median(t) for t in times), strict=True))


def machine(device: torch.device) -> dict:
    """The device and versions behind the figures."""
    npu = sys.modules.get("torch_npu")
    name = platform.machine() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    out = {"device": device.type, "name": name, "torch": torch.__version__, "python": platform.python_version()}
    return out | ({"torch_npu": npu.__version__} if npu else {})


def show(rows: Sequence[dict]) -> str:
    """The rows as a table in Markdown; a row may lack keys."""
    keys = list(dict.fromkeys(key for r in rows for key in r))
    cells = [[_cell(r.get(key, "")) for key in keys] for r in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [keys, ["---"] * len(keys), *cells])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    runpy.run_module("llava_fn.bringup", run_name="__main__")  # by its name: it stands above kernels/
