"""Time of each operation: as the model runs it here, its reference, and a library's form, in turns, in one process.

    python bench/operations.py --dtype float32

"ours" is the form that the device chooses. The peer is what transformers or torch would run. Figures are medians with
the spread from the lower to the upper quartile; on a CPU, CPU seconds of the process (run it with one thread:
OMP_NUM_THREADS=1), else wall seconds around a synchronised call. GB/s counts every number that has to be read and
written once; the share is that of a copy of a large tensor, or for TFLOP/s of a large matrix product, measured before.
Sizes are those of a decoder with the shares of LLaVA-1.5-7B on a CPU, and of the 7B itself on a card. Needs the test
extra.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange, repeat
from torch import Tensor
from transformers.activations import QuickGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from llava_fn.kernels import Segments, check


@dataclass(frozen=True)
class Bench:
    """One table."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 15
    compile: bool = False  # also the reference through torch.compile
    only: str = ""  # operations whose name begins so
    json: bool = False


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """torch's attention, segment by segment."""
    out, groups = [], q.shape[1] != k.shape[1]
    for a, b, c in zip(q.split(segments.queries), k.split(segments.keys), v.split(segments.keys), strict=True):
        mask = None
        if causal and len(a) != len(b):
            mask = torch.ones(len(a), len(b), dtype=torch.bool, device=q.device).tril(len(b) - len(a))
        a, b, c = (rearrange(x, "t n h -> 1 n t h") for x in (a, b, c))
        x = F.scaled_dot_product_attention(a, b, c, mask, is_causal=causal and mask is None, enable_gqa=groups)
        out.append(rearrange(x, "1 n t h -> t n h"))
    return torch.cat(out)


def decoding(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """As transformers decodes: keys repeated for the query heads, a mask."""
    mask = torch.arange(k.shape[1], device=q.device) < lengths.to(q.device)[:, None]
    k, v = (repeat(x, "b s m h -> b (m g) s h", g=q.shape[1] // x.shape[2]) for x in (k, v))
    return F.scaled_dot_product_attention(q[:, :, None], k, v, mask[:, None, None])[:, :, 0]


def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' formula, whose model rounds the tables once, before all blocks."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return (x * cos) + (rotate_half(x) * sin)


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """transformers' LlamaRMSNorm with this gain."""
    return LlamaRMSNorm.forward(SimpleNamespace(weight=gain, variance_epsilon=eps), x)


def add_rms(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The addition, then `rms`."""
    total = x + y
    return total, rms(total, gain, eps)


def adamw(params: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor], step: int, c) -> None:
    """torch.optim.AdamW in its default form."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(params, c.lr, (c.beta1, c.beta2), c.eps, c.weight_decay)
    for p, m, v in zip(params, first, second, strict=True):
        optimizer.state[p] = {"step": torch.tensor(float(step - 1)), "exp_avg": m, "exp_avg_sq": v}
    optimizer.step()


PEERS = {  # a library's form of each operation, with the arguments of ours
    "attention, causal": sdpa,
    "attention, last rows": sdpa,
    "attention, full": sdpa,
    "decoding": decoding,
    "RMSNorm": rms,
    "add and RMSNorm": add_rms,
    "LayerNorm": lambda x, gain, bias, eps: F.layer_norm(x, gain.shape, gain, bias, eps),
    "rotary": rotation,
    "SwiGLU": lambda x, gate, up: F.silu(F.linear(x, gate)) * F.linear(x, up),
    "quick GELU": QuickGELUActivation(),
    "GELU": F.gelu,
    "cross-entropy": lambda x, targets: F.cross_entropy(x.float(), targets, reduction="none"),
    "AdamW": adamw,
    "silu times up": lambda gate, up: F.silu(gate) * up,
}


def find_device() -> torch.device:
    """The accelerator that is there, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy, and floating-point operations a second of a matrix product."""
    big, n = (2**26, 1024) if device.type == "cpu" else (2**30, 8192)
    source, target = (torch.randint(256, (big,), dtype=torch.uint8, device=device) for _ in "ab")
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in "ab")  # a card multiplies ones faster
    copy, product = check.seconds([lambda: target.copy_(source), lambda: a @ b], device, 7)
    return 2 * big / min(copy), 2 * n**3 / min(product)


def training(case: check.Case, x: Sequence[Tensor]) -> Callable[[Callable], object]:
    """A forward and a backward pass with gradients for every input."""
    leaves = [y.detach().requires_grad_() for y in x]

    def call(form: Callable) -> object:
        out = case.call(form, *leaves)
        out = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(out, leaves, [torch.ones_like(y) for y in out])

    return call


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def row(case: check.Case, peer: Callable, c: Bench, top: tuple[float, float], train: bool) -> dict:
    """One line: times in ms, the peer's time over ours, and how near ours comes to the ceiling `top`."""
    device, dtype = find_device(), getattr(torch, c.dtype)
    x = check.inputs(case, device, dtype, False)
    forms = {"ours": case.form("chosen")}
    if case.op != "gated":
        forms["reference"] = case.form("reference")
    if c.compile:
        forms["compiled"] = torch.compile(forms.get("reference", forms["ours"]))
    forms["peer"] = peer
    run = training(case, x) if train else lambda form: case.call(form, *x)
    with torch.set_grad_enabled(train):
        times = check.seconds([lambda form=form: run(form) for form in forms.values()], device, c.rounds)
    found = {name: quartiles(t) for name, t in zip(forms, times, strict=True)}
    out = {"operation": case.name, "pass": "training" if train else "forward"}
    for name, (low, middle, high) in found.items():
        out |= {f"{name} ms": 1e3 * middle, f"{name} spread": f"{1e3 * low:.3g} to {1e3 * high:.3g}"}
    out["peer / ours"] = found["peer"][1] / found["ours"][1]
    numbers, flops = case.work
    if not train:
        bytes_second, flops_second = numbers * dtype.itemsize / found["ours"][1], flops / found["ours"][1]
        speed = f"{flops_second / 1e12:.3g} TFLOP/s" if flops else f"{bytes_second / 1e9:.3g} GB/s"
        out |= {"speed": speed, "share": flops_second / top[1] if flops else bytes_second / top[0]}
    return out


def main(c: Bench) -> list[dict]:
    """Print the table, or JSON; return its rows."""
    device = find_device()
    s = check.LAPTOP if device.type == "cpu" else check.CARD
    top, found = ceilings(device, getattr(torch, c.dtype)), []
    t = sum(s.lengths)
    gated = check.Case("silu times up", "swiglu", "gated", ((t, s.ffn),) * 2, lambda f, *x: f(*x), (3 * t * s.ffn, 0))
    for case in [*check.cases(s), gated]:
        if case.name.startswith(c.only):
            for train in (False, True)[: 1 + case.gradients]:
                found.append(row(case, PEERS[case.name], c, top, train))
    about = check.machine(device) | {"threads": torch.get_num_threads(), "dtype": c.dtype, "rounds": c.rounds}
    about |= {"copy GB/s": round(top[0] / 1e9, 1), "matmul TFLOP/s": round(top[1] / 1e12, 3)}
    print(json.dumps({"about": about, "rows": found}) if c.json else f"{about}\n\n{check.show(found)}")
    return found


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
