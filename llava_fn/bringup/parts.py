"""The parts of the first hour: each yields rows; one with ok=False is beyond its limit.

    python -m llava_fn.bringup.parts PART DEVICE

prints the rows of one part as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from llava_fn import batch, train, tree
from llava_fn.bringup import ranks, tiny
from llava_fn.bringup.options import OPERATIONS, slug
from llava_fn.bringup.process import show, telling
from llava_fn.generate import decode
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model, Vocabulary
from llava_fn.grad import value_and_grad
from llava_fn.kernels import check
from llava_fn.launch.device import environment, pick_device

Row = dict[str, object]
DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of logits and gradients of a model, as a share of the largest


def machine(device: torch.device) -> Iterator[Row]:
    """Versions and variables as a run records them; then that the device computes: a product, read by the host."""
    yield {"what": "versions", **check.machine(device)}
    yield {"what": "environment", **environment(device)}
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    off = float((((y := x.to(device)) @ y).cpu() - x @ x).abs().max() / (x @ x).abs().max())
    yield {"what": "a product of matrices", "error": off, "limit": 1e-3, "ok": off <= 1e-3}


def operation(name: str, device: torch.device) -> Iterator[Row]:
    """Values and gradients of one operation against its reference, and its time: a case of kernels/check.py."""
    small, large = (
        next(case for case in check.cases(sizes) if case.name == name)
        for sizes in (check.SMALL, check.LAPTOP if device.type == "cpu" else check.CARD)
    )
    for dtype in DTYPES:
        row = check.measure(small, large, device, dtype, 3)
        del row["operation"]
        yield {"what": (what := row.pop("dtype")), "limit": check.LIMITS[what], **row}


def share(found: Tensor, exact: Tensor) -> float:
    """The largest error, as a share of the largest exact value; infinite if something is not finite."""
    off = float((found.float().cpu() - exact).abs().max() / exact.abs().max())
    return off if math.isfinite(off) else math.inf


def logits(device: torch.device, dtype: torch.dtype, ids: list[Tensor]) -> list[Tensor]:
    """f32[b, v] of a prefill and of a step for each of ids, int64[b]; without them, greedily for six steps."""
    m = Model(tree.cast(tiny.params(device), dtype), tiny.MODEL)
    prompts = decode.prompts(m, tiny.samples(3))
    state = decode.prefill(m, prompts, m.cache(len(prompts), 64), Vocabulary(m.config.llama.vocab, (2,), str))
    out = [decode.logits(m, state)]
    for j in range(6):
        state = decode.step(m, state, (ids[j] if ids else out[-1].argmax(1)).to(device))
        out.append(decode.logits(m, state))
    return out


def decoding(device: torch.device) -> Iterator[Row]:
    """A prefill and six steps against the CPU's in fp32, after the same tokens; then every way to choose tokens."""
    exact = logits(CPU, torch.float32, [])
    ids = [x.argmax(1) for x in exact]
    for dtype in DTYPES:
        off = [share(a, b) for a, b in zip(logits(device, dtype, ids), exact, strict=True)]
        limit = LIMITS[dtype]
        yield {"what": f"{dtype}", "prefill": off[0], "steps": max(off[1:]), "limit": limit, "ok": max(off) <= limit}
    m = Model(tree.cast(tiny.params(device), torch.bfloat16), tiny.MODEL)
    vocabulary = Vocabulary(m.config.llama.vocab, (2,), str)
    sampled = Decoding(
        tokens=8, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, logprobs=True
    )
    for what, d in (("sampling", sampled), ("beams", Decoding(tokens=8, beams=2))):
        answers = decode.generate(m, decode.prompts(m, tiny.samples(3)), d, vocabulary)
        fine = all(0 <= i < vocabulary.size for row in answers for answer in row for i in answer.ids)
        finite = all(math.isfinite(x) for row in answers for answer in row for x in answer.logprobs)
        yield {"what": what, "tokens": sum(len(a.ids) for row in answers for a in row), "ok": fine and finite}


def gradients(device: torch.device) -> Iterator[Row]:
    """Loss and all gradients of the tiny model against the CPU's in fp32."""
    many = batch.collate(tiny.samples(6))

    def run(where: torch.device, dtype: torch.dtype) -> tuple[float, list[Tensor]]:
        state, task = tiny.task(where, dtype)
        weights = task.zero.fetch(state.params)
        (loss, _), found = value_and_grad(train.loss)(weights, many.to(where), 1, 0.01, task)
        return float(loss), [x.float().cpu() for x in tree.values(found)]

    exact, want = run(CPU, torch.float32)
    least = 1e-3 * float(torch.stack([g.norm() for g in want]).norm())  # a key's bias has no gradient but rounding
    for dtype in DTYPES:
        loss, found = run(device, dtype)
        off = [float((a - b).norm()) / max(float(b.norm()), least) for a, b in zip(found, want, strict=True)]
        same = all(map(torch.equal, found, run(device, dtype)[1]))
        worst = max((x if math.isfinite(x) else math.inf for x in off), default=math.inf)
        ok = worst <= LIMITS[dtype] and abs(loss - exact) <= LIMITS[dtype] * exact
        yield {"what": str(dtype), "loss off by": abs(loss - exact) / exact, "worst gradient off by": worst,
               "limit": LIMITS[dtype], "the same bits twice": same, "ok": ok}  # fmt: skip


def updates(device: torch.device) -> list[train.Metrics]:
    """What three updates of the tiny model see."""
    state, task = tiny.task(device)
    many, seen = [batch.collate(tiny.samples(3)).to(device)], []
    for _ in range(3):
        state, metrics = train.train_step(state, many, task)
        seen.append(metrics)
    return seen


def training(device: torch.device) -> Iterator[Row]:
    """Gradients; then three updates, whose losses must be the CPU's."""
    yield from gradients(device)
    pairs = zip(updates(device), updates(CPU), strict=True)
    off = max(abs(a.loss - b.loss) / b.loss for a, b in pairs)
    yield {"what": "losses of three updates", "off by": off, "limit": 1e-3, "ok": off <= 1e-3}


def waits(device: torch.device, work: Callable[[], object]) -> Counter[str]:
    """The runtime's calls that make the host wait for the device during `work`, as the device's profiler names them."""
    module = import_module("torch_npu.profiler" if device.type == "npu" else "torch.profiler")
    activities = [module.ProfilerActivity.CPU]
    activities += [getattr(module.ProfilerActivity, device.type.upper())] if device.type != "cpu" else []
    with tempfile.TemporaryDirectory() as folder:
        with module.profile(activities=activities, **_levels(module, device)) as profile:
            work()
        profile.export_chrome_trace(str(trace := Path(folder) / "trace.json"))
        found = json.loads(trace.read_text())
    events = found if isinstance(found, list) else found["traceEvents"]
    return Counter(name for event in events if is_wait(name := str(event.get("name", ""))))


def _levels(module: object, device: torch.device) -> dict:
    """On an NPU the calls of AscendCL are traced from level 1 on."""
    if device.type != "npu":
        return {}
    level = module.ProfilerLevel.Level1  # pyright: ignore[reportAttributeAccessIssue]  # torch_npu.profiler
    made = module._ExperimentalConfig(profiler_level=level)  # pyright: ignore[reportAttributeAccessIssue]
    return {"experimental_config": made}


def is_wait(name: str) -> bool:
    """Whether an event of a trace is a call of CUDA's or AscendCL's runtime that waits: to synchronise, or a copy."""
    runtime = name.removeprefix("AscendCL@")
    if not runtime.startswith(("cuda", "cu", "acl", "rt")):
        return False
    return "Synchronize" in runtime or ("Memcpy" in runtime and "Async" not in runtime)


def host_waits(device: torch.device) -> Iterator[Row]:
    """Of an update, where one wait is meant, and of eight decoding steps, where none is; after a warm-up."""
    state, task = tiny.task(device)
    many = [batch.collate(tiny.samples(3)).to(device)]
    state = train.train_step(state, many, task)[0]
    yield {"what": "an update", **_counted(waits(device, lambda: train.train_step(state, many, task)))}
    m = Model(tree.cast(tiny.params(device), torch.bfloat16), tiny.MODEL)
    vocabulary, d = Vocabulary(m.config.llama.vocab, (), str), Decoding(tokens=9)

    def begun() -> Iterator[Tensor]:
        prompts = decode.prompts(m, tiny.samples(3))
        return decode.steps(m, decode.prefill(m, prompts, m.cache(len(prompts), 64), vocabulary), d, [0] * len(prompts))

    list(begun())
    tokens = begun()
    next(tokens)
    yield {"what": "eight decoding steps", **_counted(waits(device, lambda: list(tokens)))}


def _counted(found: Mapping[str, int]) -> Row:
    return {"waits": sum(found.values()), "calls": dict(found)}


def two_ranks(device: torch.device) -> Iterator[Row]:
    """Two processes: HCCL on NPUs, NCCL on CUDA, gloo on a CPU. The first of them prints their rows."""
    cards = 2 if device.type == "cpu" else torch.get_device_module(device).device_count()
    if cards < 2:
        yield {"what": "two ranks", "skipped": "needs two cards, and one is visible"}
        return
    ranks.start(device)


PARTS: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    "environment": machine,
    **{slug(name): lambda device, name=name: operation(name, device) for name in OPERATIONS},
    "decode-step": decoding,
    "train-step": training,
    "host-waits": host_waits,
    "two-ranks": two_ranks,
}


def main(part: str, device: str) -> None:
    """Print the rows of a part."""
    with telling(part):
        for row in PARTS[part](pick_device(device)):
            show(part, row)


if __name__ == "__main__":
    main(*sys.argv[1:])
