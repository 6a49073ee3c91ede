"""The plan of an update, which `python -m llava_fn.plan` prints: does it fit, what does it cost, can it deadlock?"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from llava_fn import config, llama, llava, lora
from llava_fn.batch import IMAGE, Batch, Sample, collate
from llava_fn.config import Llava, plain
from llava_fn.data import records as data
from llava_fn.data.options import Data
from llava_fn.parallel.mesh import check_world
from llava_fn.parallel.zero import Zero
from llava_fn.plan import estimate, trace
from llava_fn.plan.estimate import DEVICES, GIB, Traffic, hccl_buffers
from llava_fn.plan.options import DataSizes, PlanOptions
from llava_fn.plan.trace import KINDS, REST, Call, Product, Traced, Workload

MODELS = {"llava-1.5-7b": config.LLAVA_7B, "llava-1.5-13b": config.LLAVA_13B, "emoji": config.LLAVA_EMOJI}
COUNTED = """\
counted: the real train step, with the CPU's operators and reference kernels (fused kernels keep less)
  FLOPs of matrix products and of attention's unmasked pairs, recomputation included
  memory at its peak; bytes of ring collectives; micro-batches after the second are taken to equal the second
estimated, never measured: {device} {peak:.0f} TFLOP/s in {dtype} x {a.arithmetic} (arithmetic)
  {memory:.0f} GiB x {a.memory} (memory); GB/s per device: {inside:.0f} inside a machine of {machine}, {outside:.0f} \
outside, x {a.links} (links)
  of the memory {buffers:.2f} GiB are HCCL's: two buffers of {a.hccl} MB for each communicator, on NPUs alone
  {hop:g} us per hop; no time for data, checkpoints, or waiting for the slowest rank"""
Log = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """The cost of a plan, in the bytes and FLOPs of rank 0, which has the most samples.

    verdict: whether the plan fits, or why it does not run. order: where the ranks would deadlock, or that they do not;
    "" if their collectives were not compared. better: the first other plan that fits, if this one does not.
    """

    plan: PlanOptions
    fits: bool
    verdict: str
    samples: int = 0  # in the largest micro-batch
    peak: Mapping[str, int] = field(default_factory=dict)  # bytes by kind at the peak of all kinds together
    highs: Mapping[str, int] = field(default_factory=dict)  # bytes by kind, each at its own peak
    kept: Mapping[str, int] = field(default_factory=dict)  # bytes by kind between updates
    traffic: tuple[Traffic, ...] = ()
    flops: Mapping[str, int] = field(default_factory=dict)
    computing: float = 0.0  # seconds
    order: str = ""
    better: Report | None = None
    traced: float = 0.0  # seconds that planning took

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of an update: if communication and computation overlap, and if they do not."""
        sending = sum(t.seconds for t in self.traffic)
        return max(self.computing, sending), self.computing + sending

    @property
    def tokens(self) -> int:
        """Tokens of an update, on all ranks."""
        return self.plan.data.samples * self.plan.data.length


def plan(c: PlanOptions, model: Llava | None = None, log: Log = lambda line: None) -> Report:
    """The report on a plan. model: replaces c.model; log: takes a line before each rank is traced.

    ValueError, with the run's message, for sizes that the run would refuse. Too few samples for so many processes are
    no error but a verdict, with a better plan.
    """
    model, start = model or MODELS[c.model], time.monotonic()
    check(c, model)
    try:
        data.check_share(c.data.samples, c.data.accumulate, c.world, c.parallel.tp)
    except ValueError as error:
        report = Report(c, False, f"does not run: {error}")
    else:
        report, traced = cost(c, model, log)
        stuck = deadlock(c, model, traced, log)
        report = replace(report, order=stuck or "the same on all roles", fits=report.fits and not stuck)
    if not report.fits:
        report = replace(report, better=fitting(c, model, report, log))
    return replace(report, traced=time.monotonic() - start)


def check(c: PlanOptions, model: Llava) -> None:
    """ValueError for sizes that the run would refuse whatever its data, and for impossible samples."""
    if min(c.world, c.machine) < 1:
        raise ValueError(f"world={c.world} processes on machines of {c.machine}; both must be at least 1")
    check_world(c.world, c.parallel.tp, min(c.world, c.machine))
    llama.check_tp(model.llama, c.parallel.tp)
    whole = lora.extended(llava.spec(model), c.lora)
    llava.execution(c.recompute, "", Zero(whole, level=c.parallel.zero, train=c.parts), model.vision)
    if c.quantise and "llama" in c.parts:
        raise ValueError(f"quantise={c.quantise} needs frozen weights, but train={c.train} trains the decoder")
    Data(samples=c.data.samples, accumulate=c.data.accumulate)
    for name, value, least in (("images", c.data.images, 0), ("labelled", c.data.labelled, 1)):
        if value is not None and value < least:
            raise ValueError(f"data.{name}={value}; it must be at least {least}")
    labelled, patches = c.data.labelled or 1, model.vision.patches
    least = 1 + c.data.images * patches + labelled
    if c.data.length < least:
        raise ValueError(
            f"data.length={c.data.length}: its first token, {c.data.images} images of {patches} and {labelled} "
            f"labelled tokens make {least}; raise it to {least}"
        )


def _labelled(size: DataSizes, model: Llava) -> int:
    """Labelled tokens of a sample."""
    return size.length - size.images * model.vision.patches - 1 if size.labelled is None else size.labelled


def batches(c: PlanOptions, model: Llava, dp: int, micro: int, text: bool = False) -> list[Batch]:
    """The first `micro` micro-batches of data rank dp. text: without images, and without samples in the second."""
    images, pixels = 0 if text else c.data.images, model.vision.image
    ids = [1] + [IMAGE] * (images * model.vision.patches)
    ids += [1] * (c.data.length - len(ids))
    label = [j >= len(ids) - _labelled(c.data, model) for j in range(len(ids))]
    sample = Sample("", tuple(ids), tuple(label), torch.zeros(1, dtype=torch.uint8).expand(images, 3, pixels, pixels))
    parts = data.balanced([c.data.length] * c.data.samples, c.dp * c.data.accumulate)
    sizes = [len(part) for part in parts[dp * c.data.accumulate :][:micro]]
    if text:
        sizes[1:2] = [0] * len(sizes[1:2])
    return [collate([sample] * n, c.parallel.tp, pixels) for n in sizes]


def _trained(c: PlanOptions) -> str:
    """The trained parts in words."""
    adapters = f" and adapters of rank {c.lora.rank}" if c.lora else ""
    return f"{c.train}{adapters}" + (f" on {c.quantise}" if c.quantise else "")


def workload(c: PlanOptions, model: Llava, dp: int, tp: int) -> Workload:
    """The workload of one rank."""
    rank = dp * c.parallel.tp + tp
    return Workload(model, c.parts, c.parallel, c.world, rank, getattr(torch, c.dtype), c.recompute, c.lora, c.quantise)


def cost(c: PlanOptions, model: Llava, log: Log = lambda line: None) -> tuple[Report, Traced]:
    """The report on a plan of valid sizes, without a comparison of ranks, and the trace of rank 0 behind it."""
    micro, start = min(c.data.accumulate, trace.TRACED), time.monotonic()
    log(f"rank 0, {_summary(c)}: {micro} of {c.data.accumulate} micro-batches")
    inputs = batches(c, model, 0, micro)
    traced, device = trace.update(workload(c, model, 0, 0), inputs), DEVICES[c.device]
    events = traced.of(c.data.accumulate)
    flops = {kind: sum(e.flops for e in events if isinstance(e, Product) and e.kind == kind) for kind in trace.PRODUCTS}
    peak, limit = sum(traced.peak.values()), _limit(c)
    figures = f"{peak / GIB:.1f} GiB at the peak, {limit / GIB:.1f} GiB available"
    return Report(
        c, peak <= limit, ("fits: " if peak <= limit else "does not fit: ") + figures,
        max(len(b.records) for b in inputs), traced.peak, traced.highs, traced.kept,
        estimate.traffic(_calls(events), c.parallel.tp, c.machine, device, c.assumed), flops,
        estimate.computing(sum(flops.values()), c.dtype, device, c.assumed), traced=time.monotonic() - start,
    ), traced  # fmt: skip


def _calls(events) -> list[Call]:
    return [e for e in events if isinstance(e, Call)]


def deadlock(c: PlanOptions, model: Llava, first: Traced, log: Log = lambda line: None) -> str:
    """Where the first and last ranks of each axis would deadlock; "" if they do not. first: the trace of rank 0.

    Ranks of the last dp get text without images, and an empty second micro-batch.
    """
    micro, last = min(c.data.accumulate, 2), (c.dp - 1, c.parallel.tp - 1)
    calls = {(0, 0): _calls(first.of(micro))}
    for dp, tp in dict.fromkeys(product((0, last[0]), (0, last[1]))):
        if (dp, tp) != (0, 0):
            log(f"rank {dp * c.parallel.tp + tp} (dp {dp}, tp {tp}): {'text alone' if dp else 'with images'}")
            traced = trace.update(workload(c, model, dp, tp), batches(c, model, dp, micro, text=dp > 0))
            calls[dp, tp] = _calls(traced.events)
    return trace.deadlock(calls)


def fitting(c: PlanOptions, model: Llava, report: Report, log: Log = lambda line: None) -> Report | None:
    """The first plan that fits, or None. report: on `c` itself.

    Tried are more micro-batches, ZeRO 1 and 3, recomputation, and other sizes of tp.
    """
    for variant in _variants(c, model):
        for accumulate in _accumulations(variant):
            other = replace(variant, data=replace(variant.data, accumulate=accumulate))
            tried = report if other == c else cost(other, model, log)[0]
            if tried.fits:
                return tried
            if tried.peak and sum(tried.peak.values()) - tried.peak[REST] > _limit(c):
                break  # smaller micro-batches save activations alone
    return None


def _limit(c: PlanOptions) -> float:
    """Bytes of a device that tensors can occupy."""
    return DEVICES[c.device].memory * c.assumed.memory - _buffers(c)


def _buffers(c: PlanOptions) -> int:
    return hccl_buffers(c.dp, c.parallel.tp, c.assumed.hccl) if c.device == "910B" else 0


def _variants(c: PlanOptions, model: Llava) -> Iterator[PlanOptions]:
    """The plan with other ZeRO levels, recomputation and sizes of tp that the run accepts, the nearest first."""
    sizes = [c.parallel.tp] + [tp for tp in range(1, c.machine + 1) if tp != c.parallel.tp]
    levels, recompute = dict.fromkeys((c.parallel.zero, 1, 3)), dict.fromkeys((c.recompute, True))
    for tp, zero, again in product(sizes, levels, recompute):
        variant = replace(c, recompute=again, parallel=replace(c.parallel, tp=tp, zero=zero))
        try:
            check(variant, model)
        except ValueError:
            continue
        yield variant


def _accumulations(c: PlanOptions) -> list[int]:
    """Numbers of micro-batches to try: c's, doubled while each gets a sample; from 1 on if c's are already too many."""
    most = c.data.samples // c.dp
    first = c.data.accumulate if c.data.accumulate <= most else 1
    return [first * 2**k for k in range(most.bit_length()) if first * 2**k <= most]


def _summary(c: PlanOptions) -> str:
    mesh = f"dp {c.dp} x tp {c.parallel.tp}, zero {c.parallel.zero}"
    return f"{mesh}, accumulate {c.data.accumulate}, recompute {'on' if c.recompute else 'off'}"


def table(*rows: tuple[str, ...]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  " + "  ".join(line) for line in lines)


def text(r: Report) -> str:
    """The report as text."""
    c = r.plan
    parts = [f"{c.model}, {_trained(c)} trained, on {c.world} x {c.device}: {_summary(c)}, {c.dtype}",
             f"{c.data.samples} samples of {c.data.length} tokens and {c.data.images} images per update"]  # fmt: skip
    if r.peak:
        parts += ["", *_figures(r)]
    parts += ["", r.verdict]
    if r.order:
        parts.append(f"collectives of the first and last ranks of each axis, with and without images: {r.order}")
    if r.better:
        parts += ["", "A plan that fits:", text(replace(r.better, traced=0.0))]
    elif not r.fits:
        parts.append("no other ZeRO level, accumulate, recompute or tp fits either; take more devices, or larger ones")
    return "\n".join(parts)


def _figures(r: Report) -> list[str]:
    memory = [(kind, *(_short(x[kind] / GIB) for x in (r.peak, r.highs, r.kept))) for kind in KINDS]
    memory += [("all", *(_short(sum(x.values()) / GIB) for x in (r.peak, r.peak, r.kept)))]
    sent = [
        (f"{t.op} over {t.axis}", str(t.size), str(t.calls), _short(t.sent / GIB), _short(t.seconds)) for t in r.traffic
    ]
    work = [(kind, _short(n / 1e12)) for kind, n in (*r.flops.items(), ("all", sum(r.flops.values())))]
    fast, slow = r.seconds
    return [
        table(("memory of rank 0, GiB", "at the peak", "at its own peak", "between updates"), *memory), "",
        table(("sent by rank 0", "ranks", "calls", "GiB", "s"), *sent), "",
        table(("computed by rank 0", "TFLOP"), *work), "",
        f"{_short(fast)} to {_short(slow)} s per update, {_short(r.computing)} s of it computing: with communication "
        "fully overlapped, or not at all;",
        f"{r.tokens / slow:,.0f} to {r.tokens / fast:,.0f} tokens/s; {r.samples} samples in a micro-batch",
    ]  # fmt: skip


def _short(x: float) -> str:
    """A number with three significant digits, or all digits of its whole part."""
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}".rstrip(".") if x >= 0.001 else f"{x:.1e}" if x else "0"


def assumptions(c: PlanOptions) -> str:
    """What is counted, and the assumptions behind what is estimated."""
    d = DEVICES[c.device]
    return COUNTED.format(
        device=c.device, peak=getattr(d, c.dtype) / 1e12, dtype=c.dtype, a=c.assumed, memory=d.memory / GIB,
        inside=d.inside / 1e9, outside=d.outside / 1e9, machine=c.machine, hop=c.assumed.hop * 1e6,
        buffers=_buffers(c) / GIB,
    )  # fmt: skip


def as_json(r: Report) -> dict:
    """The report as JSON holds it, in seconds and bytes."""
    fast, slow = r.seconds
    more = {"seconds": {"overlapped": fast, "one_after_another": slow}, "tokens": r.tokens}
    return plain(replace(r, better=None)) | more | {"better": as_json(r.better) if r.better else None}


def main(c: PlanOptions) -> None:
    """Print the report."""
    report = plan(c, log=lambda line: print(line, file=sys.stderr, flush=True))
    if c.json:
        print(json.dumps(as_json(report) | {"assumptions": assumptions(c)}, indent=1))
    else:
        print(f"{text(report)}\n\n{assumptions(c)}\ntraced in {report.traced:.0f} s")
