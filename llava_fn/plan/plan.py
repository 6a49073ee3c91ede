"""The plan of an update: what `python -m llava_fn.plan` finds out and prints; options.py says what it is."""

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
from llava_fn.plan.estimate import DEVICES, GIB, Traffic
from llava_fn.plan.options import DataSizes, PlanOptions
from llava_fn.plan.trace import KINDS, REST, Call, Product, Traced, Workload

MODELS = {"llava-1.5-7b": config.LLAVA_7B, "llava-1.5-13b": config.LLAVA_13B, "emoji": config.LLAVA_EMOJI}
COUNTED = """\
counted: the train step as it is, on the CPU's operations. Every operation in its plain form: fused ones keep less
  FLOPs of products of matrices and of attention, there of the pairs that see each other, recomputation included
  memory when most tensors are alive; a ring's bytes; micro-batches from the third on are taken to be like the second
estimated, never measured: {device} {peak:.0f} TFLOP/s in {dtype} x {a.arithmetic} (arithmetic)
  {memory:.0f} GiB x {a.memory} (memory); GB/s a device: {inside:.0f} inside a machine of {machine}, {outside:.0f} \
outside, x {a.links} (links)
  {hop:g} us a hop; no time for data, checkpoints, or waiting for the rank with most work"""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """What was found. Bytes and operations are those of rank 0, which has the most samples.

    verdict: whether it runs, and why not. order: what came of comparing the collectives of all roles, "" if they were
    not compared. better: where this one does not fit, the first plan found that does. peak, highs, kept: bytes by kind.
    """

    plan: PlanOptions
    fits: bool
    verdict: str
    samples: int = 0  # in the largest micro-batch
    peak: Mapping[str, int] = field(default_factory=dict)  # when most is alive
    highs: Mapping[str, int] = field(default_factory=dict)  # of each when most of it is
    kept: Mapping[str, int] = field(default_factory=dict)  # between updates
    traffic: tuple[Traffic, ...] = ()
    flops: Mapping[str, int] = field(default_factory=dict)
    computing: float = 0.0  # seconds
    order: str = ""
    better: Report | None = None
    traced: float = 0.0  # seconds that it took to find this out

    @property
    def seconds(self) -> tuple[float, float]:
        """Of an update: if everything is sent while something is computed, and if nothing is."""
        sending = sum(row.seconds for row in self.traffic)
        return max(self.computing, sending), self.computing + sending

    @property
    def tokens(self) -> int:
        """Of an update, on all ranks."""
        return self.plan.data.samples * self.plan.data.length


def plan(c: PlanOptions, model: Llava | None = None, say: Say = lambda line: None) -> Report:
    """The report on a plan. model: one without a name; say: is told how far it is.

    ValueError for sizes that the run itself would refuse, with its message. Where only the samples of an update are too
    few for so many processes, that is the verdict, and a better plan is looked for.
    """
    model, began = model or MODELS[c.model], time.monotonic()
    check(c, model)
    try:
        data.check_share(c.data.samples, c.data.accumulate, c.world, c.parallel.tp)
    except ValueError as error:
        report = Report(c, False, f"does not run: {error}")
    else:
        first = alone(c, model, say)
        order = agreement(c, model, first[1], say)
        report = replace(first[0], order=order or "the same on all roles", fits=first[0].fits and not order)
    if not report.fits:
        report = replace(report, better=better(c, model, report, say))
    return replace(report, traced=time.monotonic() - began)


def check(c: PlanOptions, model: Llava) -> None:
    """ValueError for sizes that the run itself would refuse whatever its data, and for samples that cannot be."""
    if min(c.world, c.machine) < 1:
        raise ValueError(f"world={c.world} processes on machines of {c.machine}; both must be at least 1")
    check_world(c.world, c.parallel.tp, min(c.world, c.machine))
    llama.check_tp(model.llama, c.parallel.tp)
    whole = lora.extended(llava.spec(model), c.lora)
    llava.execution(c.recompute, "", Zero(whole, level=c.parallel.zero, train=c.parts), model.vision)
    if c.quantise and "llama" in c.parts:
        raise ValueError(f"quantise={c.quantise} is of frozen weights, and train={c.train} trains the decoder")
    Data(samples=c.data.samples, accumulate=c.data.accumulate)
    for name, value, least in (("images", c.data.images, 0), ("labelled", c.data.labelled, 1)):
        if value is not None and value < least:
            raise ValueError(f"data.{name}={value}; it must be at least {least}")
    labelled, patches = c.data.labelled or 1, model.vision.patches
    least = 1 + c.data.images * patches + labelled
    if c.data.length < least:
        raise ValueError(
            f"data.length={c.data.length}: its first token, {c.data.images} images of {patches} and {labelled} "
            f"labelled tokens make {least}; raise it to that"
        )


def _labelled(size: DataSizes, model: Llava) -> int:
    return size.length - size.images * model.vision.patches - 1 if size.labelled is None else size.labelled


def batches(c: PlanOptions, model: Llava, dp: int, micro: int, text: bool = False) -> list[Batch]:
    """The first micro-batches of a rank of the data axis. text: no images, and in the second one not even a sample."""
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
    adapters = f" and adapters of rank {c.lora.rank}" if c.lora else ""
    return f"{c.train}{adapters}" + (f" on {c.quantise}" if c.quantise else "")


def _job(c: PlanOptions, model: Llava, dp: int, tp: int) -> Workload:
    rank = dp * c.parallel.tp + tp
    return Workload(model, c.parts, c.parallel, c.world, rank, getattr(torch, c.dtype), c.recompute, c.lora, c.quantise)


def alone(c: PlanOptions, model: Llava, say: Say = lambda line: None) -> tuple[Report, Traced]:
    """The report on a plan whose sizes are right, and what rank 0 was seen to do; roles are not compared."""
    micro, began = min(c.data.accumulate, trace.TRACED), time.monotonic()
    say(f"rank 0, {_brief(c)}: {micro} of {c.data.accumulate} micro-batches")
    mine = batches(c, model, 0, micro)
    seen, device = trace.update(_job(c, model, 0, 0), mine), DEVICES[c.device]
    events = seen.of(c.data.accumulate)
    flops = {kind: sum(e.flops for e in events if isinstance(e, Product) and e.kind == kind) for kind in trace.PRODUCTS}
    need, have = sum(seen.peak.values()) / GIB, device.memory * c.assumed.memory / GIB
    figures = f"{need:.1f} GiB at the peak, {have:.1f} GiB to be had"
    return Report(
        c, need <= have, ("fits: " if need <= have else "does not fit: ") + figures,
        max(len(b.records) for b in mine), seen.peak, seen.highs, seen.kept,
        estimate.traffic(_calls(events), c.parallel.tp, c.machine, device, c.assumed), flops,
        estimate.computing(sum(flops.values()), c.dtype, device, c.assumed), traced=time.monotonic() - began,
    ), seen  # fmt: skip


def _calls(events) -> list[Call]:
    return [e for e in events if isinstance(e, Call)]


def agreement(c: PlanOptions, model: Llava, first: Traced, say: Say = lambda line: None) -> str:
    """What would keep ranks waiting for each other for ever; "" if nothing does. first: what rank 0 does.

    Compared are the first and the last rank of each axis. Those of the last dp have text alone, and if there is a
    second micro-batch, no sample in it.
    """
    micro, last = min(c.data.accumulate, 2), (c.dp - 1, c.parallel.tp - 1)
    calls = {(0, 0): _calls(first.of(micro))}
    for dp, tp in dict.fromkeys(product((0, last[0]), (0, last[1]))):
        if (dp, tp) != (0, 0):
            say(f"rank {dp * c.parallel.tp + tp} (dp {dp}, tp {tp}): {'text alone' if dp else 'with images'}")
            seen = trace.update(_job(c, model, dp, tp), batches(c, model, dp, micro, text=dp > 0))
            calls[dp, tp] = _calls(seen.events)
    return trace.disagreement(calls)


def better(c: PlanOptions, model: Llava, found: Report, say: Say = lambda line: None) -> Report | None:
    """The first plan that fits, of more micro-batches, ZeRO 1 and 3, recomputation, and other sizes of tp; or None."""
    for way in _ways(c, model):
        for accumulate in _accumulations(way):
            other = replace(way, data=replace(way.data, accumulate=accumulate))
            report = found if other == c else alone(other, model, say)[0]
            if report.fits:
                return report
            if report.peak and sum(report.peak.values()) - report.peak[REST] > _limit(c):
                break  # smaller micro-batches save activations alone
    return None


def _limit(c: PlanOptions) -> float:
    return DEVICES[c.device].memory * c.assumed.memory


def _ways(c: PlanOptions, model: Llava) -> Iterator[PlanOptions]:
    """The plan with other ZeRO levels, recomputation and sizes of tp, nearest first, as far as the run accepts them."""
    sizes = [c.parallel.tp] + [tp for tp in range(1, c.machine + 1) if tp != c.parallel.tp]
    levels, recompute = dict.fromkeys((c.parallel.zero, 1, 3)), dict.fromkeys((c.recompute, True))
    for tp, zero, again in product(sizes, levels, recompute):
        way = replace(c, recompute=again, parallel=replace(c.parallel, tp=tp, zero=zero))
        try:
            check(way, model)
        except ValueError:
            continue
        yield way


def _accumulations(c: PlanOptions) -> list[int]:
    """Numbers of micro-batches in which each has a sample: those asked for and multiples; or else, 1 and multiples."""
    most = c.data.samples // c.dp
    first = c.data.accumulate if c.data.accumulate <= most else 1
    return [first * 2**k for k in range(most.bit_length()) if first * 2**k <= most]


def _brief(c: PlanOptions) -> str:
    mesh = f"dp {c.dp} x tp {c.parallel.tp}, zero {c.parallel.zero}"
    return f"{mesh}, accumulate {c.data.accumulate}, recompute {'on' if c.recompute else 'off'}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[x.ljust(w) if not j else x.rjust(w) for j, (x, w) in enumerate(zip(row, widths, strict=True))]
             for row in (head, *rows)]  # fmt: skip
    return "\n".join("  " + "  ".join(line).rstrip() for line in lines)


def text(r: Report) -> str:
    """The report for a person."""
    c, parts = r.plan, []
    parts.append(f"{c.model}, {_trained(c)} trained, on {c.world} x {c.device}: {_brief(c)}, {c.dtype}")
    parts.append(f"{c.data.samples} samples of {c.data.length} tokens and {c.data.images} images an update")
    if r.peak:
        parts += ["", *_figures(r)]
    parts += ["", r.verdict]
    if r.order:
        parts.append(f"collectives of the first and last ranks, with images and without: {r.order}")
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
    work = [(kind, _short(n / 1e12)) for kind, n in r.flops.items()]
    fast, slow = r.seconds
    return [
        table(("memory of rank 0, GiB", "at the peak", "at its own", "between updates"), memory), "",
        table(("sent by rank 0", "ranks", "calls", "GiB", "s"), sent), "",
        table(("computed by rank 0", "TFLOP"), [*work, ("all", _short(sum(r.flops.values()) / 1e12))]), "",
        f"{_short(fast)} to {_short(slow)} s an update, {_short(r.computing)} s of it computing: if all that is sent "
        "overlaps, or nothing;",
        f"{r.tokens / slow:,.0f} to {r.tokens / fast:,.0f} tokens/s; {r.samples} samples in a micro-batch",
    ]  # fmt: skip


def _short(x: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}".rstrip(".") if x >= 0.001 else f"{x:.1e}" if x else "0"


def assumptions(c: PlanOptions) -> str:
    """What the figures of a report rest on."""
    d = DEVICES[c.device]
    return COUNTED.format(
        device=c.device, peak=getattr(d, c.dtype) / 1e12, dtype=c.dtype, a=c.assumed, memory=d.memory / GIB,
        inside=d.inside / 1e9, outside=d.outside / 1e9, machine=c.machine, hop=c.assumed.hop * 1e6,
    )  # fmt: skip


def as_json(r: Report) -> dict:
    """The report for a machine; seconds and bytes."""
    fast, slow = r.seconds
    more = {"seconds": {"overlapped": fast, "one_after_another": slow}, "tokens": r.tokens}
    return plain(replace(r, better=None)) | more | {"better": as_json(r.better) if r.better else None}


def main(c: PlanOptions) -> None:
    """Print the report."""
    report = plan(c, say=lambda line: print(line, file=sys.stderr, flush=True))
    if c.json:
        print(json.dumps(as_json(report) | {"assumptions": assumptions(c)}, indent=1))
    else:
        print(f"{text(report)}\n\n{assumptions(c)}\ntraced in {report.traced:.0f} s")
