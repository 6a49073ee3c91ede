"""A plan's bytes, operations and memory against formulas, its checks against planted mistakes."""

import json
import math
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from llava_fn import config, llama, llava, optim, spec, train, tree
from llava_fn.config import STAGES, Parallel
from llava_fn.launch import cli
from llava_fn.parallel.zero import Zero
from llava_fn.plan import estimate, options, plan, trace
from llava_fn.plan.estimate import DEVICES, GIB, Device
from llava_fn.plan.options import Assumed, DataSizes, PlanOptions
from llava_fn.plan.trace import FROZEN, GRADIENTS, MASTERS, MOMENTS, REST, WEIGHTS, Call

C = config.Llava(
    config.Vision(image=8, patch=4, width=12, blocks=2, heads=2, ffn=20),
    config.Llama(vocab=48, width=24, blocks=1, heads=4, kv_heads=4, ffn=36),
)
SMALL = PlanOptions(
    world=4, train="projector+llama", data=DataSizes(samples=8, length=20, images=1, labelled=8), recompute=False
)


def deeper(model):
    return replace(model, llama=replace(model.llama, blocks=model.llama.blocks + 1))


def parallel(world=4, **fields):
    return {"world": world, "parallel": Parallel(**fields)}


@cache
def alone(c, model):
    return plan.cost(c, model)


def seen(c=SMALL, model=C, **changes):
    return alone(replace(c, **changes), model)


def sent(report, axis):
    """Collective -> bytes that rank 0 sends over the axis."""
    return {row.op: row.sent for row in report.traffic if row.axis == axis}


def filled(path_params, n):
    """Numbers of leaves of which n ranks keep shards along dim 0, with the rows of zeros."""
    return sum(math.ceil(p.shape[0] / n) * n * math.prod(p.shape[1:]) for _, p in path_params)


def leaves(model, stage, blocks=None):
    """(path, Param) of what is trained; blocks: only those in blocks, or only the others."""
    rows = [(path, p) for path, p in spec.leaves(llava.spec(model)) if train.trains(STAGES[stage])(path)]
    return [row for row in rows if blocks is None or ("blocks" in row[0]) == blocks]


SCALARS = 4 * 8 + 4 + 4  # four counts, the norm, the loss


@pytest.mark.parametrize("world, micro", [(2, 2), (3, 1), (4, 1)])
def test_zero_1_gathers_bf16_weights_and_scatters_fp32_gradients_once_an_update(world, micro):
    report, _ = seen(**parallel(world, zero=1), data=replace(SMALL.data, accumulate=micro))
    n, numbers = world, filled(leaves(C, "projector+llama"), world)
    assert sent(report, "dp") == {
        "all_gather": pytest.approx((n - 1) / n * 2 * numbers),
        "reduce_scatter": pytest.approx((n - 1) / n * 4 * numbers),
        "all_reduce": pytest.approx(2 * (n - 1) / n * SCALARS),
    }


def test_zero_0_sums_fp32_gradients_on_every_rank():
    report, _ = seen(**parallel(4, zero=0))
    numbers = sum(math.prod(p.shape) for _, p in leaves(C, "projector+llama"))
    scalars = SCALARS - 4  # every rank knows the norm
    assert sent(report, "dp") == {"all_reduce": pytest.approx(2 * 3 / 4 * (4 * numbers + scalars))}


@pytest.mark.parametrize("micro, ahead", [(1, True), (2, False), (5, True)])
def test_zero_3_gathers_blocks_forward_and_backward_in_every_micro_batch(micro, ahead):
    data = replace(SMALL.data, samples=20, accumulate=micro)
    model = deeper(C)
    report, _ = seen(model=model, **parallel(4, zero=3, ahead=ahead), data=data, recompute=True, train="all")
    blocks, rest = (filled(leaves(model, "all", kind), 4) for kind in (True, False))
    assert sent(report, "dp") == {
        "all_gather": pytest.approx(3 / 4 * 2 * (micro * 2 * blocks + rest)),
        "reduce_scatter": pytest.approx(3 / 4 * 4 * (micro * blocks + rest)),
        "all_reduce": pytest.approx(2 * 3 / 4 * SCALARS),
    }


@pytest.mark.parametrize("tp, recompute, each", [(2, False, 4), (4, True, 6)])
def test_a_block_gathers_and_scatters_its_tokens_over_tp(tp, recompute, each):
    """2 + 2 forward and 2 + 2 backward, and the forward ones again where the whole block is recomputed."""
    less, more = (seen(model=m, **parallel(2 * tp, tp=tp), recompute=recompute)[0] for m in (C, deeper(C)))
    once = (tp - 1) / tp * 4 * 20 * C.llama.width * 2
    for op in ("all_gather", "reduce_scatter"):
        assert sent(more, "tp")[op] - sent(less, "tp")[op] == pytest.approx(each * once)
    assert sent(more, "tp")["all_reduce"] == sent(less, "tp")["all_reduce"]


def test_cross_entropy_sends_three_numbers_a_labelled_row_and_no_logits():
    report, events = seen(**parallel(4, tp=4), data=replace(SMALL.data, samples=4))
    tokens, rows = 4 * 20, 4 * 8
    embedding = 2 * tokens * C.llama.width
    assert sent(report, "tp")["all_reduce"] == pytest.approx(2 * 3 / 4 * (embedding + 2 * 4 * rows) + 2 * 3 / 4 * 4)
    tops = [
        e for e in events.events if isinstance(e, Call) and e.op == "all_gather" and e.inputs[0][0] == torch.float32
    ]
    assert [e.inputs for e in tops if e.axis == "tp" and len(e.inputs) == 1] == [((torch.float32, rows),)]


@pytest.mark.parametrize("stage", ["projector", "all"])
def test_features_of_images_are_gathered_once(stage):
    """Five images of a sample are filled up to eight, one to four. The backward pass sends nothing."""
    one = replace(SMALL.data, samples=1, length=40)
    few, many = (seen(**parallel(4, tp=4), train=stage, data=replace(one, images=n))[0] for n in (1, 5))
    more = 3 / 4 * 4 * C.vision.patches * C.llama.width * 2
    assert sent(many, "tp")["all_gather"] - sent(few, "tp")["all_gather"] == pytest.approx(more)
    assert sent(many, "tp")["reduce_scatter"] == sent(few, "tp")["reduce_scatter"]


@pytest.mark.parametrize("level, tp", [(0, 1), (1, 1), (3, 1), (1, 2), (3, 2)])
def test_what_is_kept_between_updates_follows_from_the_spec(level, tp):
    """Masters in fp32 and two moments, sharded over their owners; frozen parts in bf16."""
    report, _ = seen(**parallel(4, zero=level, tp=tp), recompute=True)
    numbers = 0
    for _, p in leaves(C, "projector+llama"):
        cut = tp if set(p.axes) & set(spec.RULES) else 1
        shape = [size // cut if name in spec.RULES else size for size, name in zip(p.shape, p.axes, strict=True)]
        shape[0] = math.ceil(shape[0] / (4 // cut)) if level else shape[0]
        numbers += math.prod(shape)
    frozen = sum(math.prod(p.shape) for path, p in spec.leaves(llava.spec(C)) if path[0] == "vision")
    kept = {MASTERS: 4 * numbers, MOMENTS: 8 * numbers, FROZEN: 2 * frozen}
    assert report.kept == kept | {WEIGHTS: 0, GRADIENTS: 0, REST: 0}
    assert report.peak | kept == report.peak and report.highs | kept == report.highs


@pytest.mark.parametrize("micro, each", [(1, 4 + 4 / 4), (2, 4 + 2), (3, 4 + 2)])
def test_weights_and_gradients_are_whole_at_the_peak_of_zero_1(micro, each):
    """fp32, and a shard of the sum; or the sum so far and a micro-batch's as they arrive. Never two in fp32."""
    report, _ = seen(**parallel(4, zero=1), data=DataSizes(samples=4 * micro, length=8, labelled=3, accumulate=micro))
    numbers = filled(leaves(C, "projector+llama"), 4)
    assert report.peak[WEIGHTS] == 2 * numbers
    assert all(report.highs[kind] >= report.peak[kind] for kind in report.peak) and report.highs[REST] > 1000
    assert report.highs[GRADIENTS] == each * numbers


def test_recomputation_keeps_less_and_computes_the_blocks_again():
    four = replace(C, llama=replace(C.llama, blocks=4))
    (without, _), (with_it, _) = (seen(model=four, world=1, recompute=yes) for yes in (False, True))
    assert with_it.peak[REST] < 0.6 * without.peak[REST] and with_it.highs[REST] < 0.6 * without.highs[REST]
    assert with_it.flops[trace.MATRICES] > 1.2 * without.flops[trace.MATRICES]


@pytest.mark.parametrize("stage, recompute, products, pairs", [
    ("projector+llama", False, 6, 14), ("projector+llama", True, 8, 18), ("projector", False, 4, 14),
])  # fmt: skip
def test_operations_of_a_block_are_those_of_its_weights_and_of_causal_attention(stage, recompute, products, pairs):
    """2 a weight and token in each direction that is computed; 4 forward and 10 backward a pair and channel."""
    less, more = (seen(model=m, train=stage, recompute=recompute, world=1)[0].flops for m in (C, deeper(C)))
    tokens, weights = 8 * 20, 4 * 24 * 24 + 3 * 24 * 36
    assert more[trace.MATRICES] - less[trace.MATRICES] == products * weights * tokens
    assert more[trace.ATTENTION] - less[trace.ATTENTION] == pairs * 24 * 8 * (20 * 21 // 2)


def test_attention_of_the_last_block_counts_the_rows_that_are_read():
    report, _ = seen(world=1, train="projector")
    read = 8 + 1  # a row predicts the token after it
    hidden = read * (read - 1) // 2
    tower = 2 * 2 * 12 * 8 * 5 * 5 * C.vision.used
    assert report.flops[trace.ATTENTION] == 14 * 24 * 8 * (20 * read - hidden) + tower


def test_micro_batches_after_the_second_do_what_it_does():
    five = replace(SMALL, data=replace(SMALL.data, samples=20, accumulate=5), parallel=Parallel(zero=3), recompute=True)
    _, three = seen(five)
    whole = trace.update(plan.workload(five, C, 0, 0), plan.batches(five, C, 0, 5))
    assert three.micro == 3 and three.of(5) == whole.events
    assert three.peak | {REST: 0} == whole.peak | {REST: 0}
    assert 0 < whole.peak[REST] - three.peak[REST] < 1000  # the pixels and ids of two more
    assert three.of(4) != three.of(5)
    assert three.of(2) == trace.update(plan.workload(five, C, 0, 0), plan.batches(five, C, 0, 2)).events


def test_two_micro_batches_do_not_tell_what_five_do():
    _, two = seen(data=replace(SMALL.data, accumulate=2))
    with pytest.raises(ValueError, match="a trace of 2 micro-batches does not give the events of 5"):
        two.of(5)


def test_a_trace_without_memory_is_the_trace_of_a_real_update():
    """The same operations and the same memory, alive for as long, as with numbers."""
    c = replace(SMALL, world=1, data=replace(SMALL.data, accumulate=2))
    _, fake = seen(c)
    params = tree.split(spec.init(llava.spec(C), 0), train.trains(STAGES[c.train]))
    state = train.TrainState(0, params[0], optim.init(params[0]))
    zero = Zero(llava.spec(C), level=1, dtype=torch.bfloat16)
    task = train.Task(tree.cast(params[1], torch.bfloat16), C, optim.Optim(), 100, zero)

    class Real(trace.Recorder):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::_local_scalar_dense":
                return func(*args)
            return super().__torch_dispatch__(func, types, args, kwargs)

    recorder = Real([])
    recorder.label(MASTERS, tree.values(state.params))
    recorder.label(FROZEN, tree.values(task.frozen))
    recorder.label(MOMENTS, tree.values(state.moments.first) + tree.values(state.moments.second))
    with recorder:
        train.train_step(state, plan.batches(c, C, 0, 2), task)
    assert tuple(recorder.events) == fake.events
    real = recorder.alive(recorder.highest())
    assert {k: v for k, v in real.items() if k != REST} == {k: v for k, v in fake.peak.items() if k != REST}
    assert real[REST] == pytest.approx(fake.peak[REST], rel=0.1, abs=2000)


@pytest.mark.parametrize("changes, micro", [
    (parallel(4, zero=3), 1), (parallel(4, tp=2, zero=3), 2), (parallel(4, tp=4, zero=0), 1),
])  # fmt: skip
def test_all_roles_meet_in_every_collective(changes, micro):
    c = replace(SMALL, **changes, train="all", recompute=True, data=replace(SMALL.data, samples=12, accumulate=micro))
    assert plan.plan(c, C).order == "the same on all roles"


ADAPTERS = {"train": "projector", "lora": config.Lora(rank=2, alpha=3.0, dropout=0.1)}


@pytest.mark.parametrize("quantise", [None, "int8"])
@pytest.mark.parametrize("changes", [parallel(4), parallel(4, tp=2, zero=3)], ids=["zero1", "tp2 zero3"])
def test_all_roles_meet_where_adapters_are_trained(changes, quantise):
    c = replace(SMALL, **changes, **ADAPTERS, quantise=quantise, recompute=True)
    report = plan.plan(c, C)
    assert report.order == "the same on all roles" and "projector and adapters of rank 2" in plan.text(report)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_frozen_decoder_is_sharded_with_level_3_and_small_in_four_bits(zero):
    wide = replace(C, llama=replace(C.llama, width=64, heads=4, kv_heads=4, ffn=128, blocks=2))
    c = replace(SMALL, **parallel(4, zero=zero), **ADAPTERS, recompute=True)
    blocks = [(path, p) for path, p in spec.leaves(llava.spec(wide)) if path[:2] == ("llama", "blocks")]
    linears = sum(math.prod(p.shape) for path, p in blocks if len(p.shape) == 2)
    norms = sum(math.prod(p.shape) for path, p in blocks if len(p.shape) == 1)
    rest = spec.count({k: v for k, v in llava.spec(wide).items() if k != "projector"}) - linears - norms
    ranks = 4 if zero == 3 else 1
    for kind, bytes_of_one in ((None, 2), ("int8", 1), ("nf4", 0.5 + 4 / 64)):
        _, traced = plan.cost(replace(c, quantise=kind), wide)
        rows = sum(p.shape[0] * 4 for path, p in blocks if len(p.shape) == 2) if kind == "int8" else 0  # scales
        assert traced.kept[FROZEN] == 2 * rest + (2 * norms + bytes_of_one * linears + rows) / ranks


def test_a_quantised_decoder_that_is_trained_is_refused():
    with pytest.raises(ValueError, match="quantise=int8 needs frozen weights, but train=projector.llama trains"):
        plan.plan(replace(SMALL, quantise="int8"), C)


def test_a_rank_without_images_that_leaves_the_tower_out_is_found(monkeypatch):
    """What execution(images=...) prevents, where the tower's blocks are gathered in them."""
    execution = llava.execution
    monkeypatch.setattr(llava, "execution", lambda *args: replace(execution(*args), min_images=0))
    report = plan.plan(replace(SMALL, **parallel(4, zero=3), train="all", recompute=True), C)
    assert not report.fits and "dp 0 tp 0 waits in collective" in report.order and "dp 3 tp 0" in report.order


def test_a_block_that_leaves_a_collective_out_on_one_rank_is_found(monkeypatch):
    class Lame(llava.TP):
        def enter(self, x):
            return x.repeat(self.axis.size, 1) if self.axis.rank else super().enter(x)

    block = llama.block
    monkeypatch.setattr(llama, "block", lambda *args: block(*args[:-1], Lame(args[-1].axis)))
    report = plan.plan(replace(SMALL, **parallel(4, tp=2)), C)
    assert not report.fits and "tp 0 waits in collective" in report.order and "over tp" in report.order


def call(op, axis, numbers=4):
    return Call(op, axis, 2, ((torch.float32, numbers),))


A, B, X = call("all_gather", "dp"), call("all_gather", "tp"), call("all_reduce", "all")
ORDERS = {
    "everyone alike": ([[A, B, X]] * 4, ""),
    "another size": ([[A], [A], [call("all_gather", "dp", 5)], [A]], "of 5 elements over dp"),
    "another operation": ([[A], [A], [call("all_reduce", "dp")], [A]], "all_reduce of 4 elements"),
    "one too few": ([[X, X], [X, X], [X, X], [X]], "dp 1 tp 1 ends after 1 collectives"),
    "other tp axes do otherwise": ([[B, X], [B, X], [X], [X]], ""),
    "each axis in the same order, but crossed": ([[A, B], [B, A], [B, A], [A, B]], "waits in collective 1"),
    "another dtype": ([[A], [A], [replace(A, inputs=((torch.bfloat16, 4),))], [A]], "waits"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_ranks_wait_for_each_other_until_all_of_an_axis_bring_the_same(name):
    rows, told = ORDERS[name]
    said = trace.deadlock(dict(zip([(0, 0), (0, 1), (1, 0), (1, 1)], rows, strict=True)))
    assert told in said and bool(said) == bool(told)


WRONG = {
    "no processes": ({"world": 0}, "world=0 processes on machines of 8; both must be at least 1"),
    "tp of no divisor": ({"world": 6, "parallel": Parallel(tp=4)}, "tp=4 does not divide the 6 processes"),
    "tp across machines": ({"machine": 2, "parallel": Parallel(tp=4)}, "tp=4 would join processes of several machines"),
    "tp of no divisor of heads": ({"world": 8, "parallel": Parallel(tp=8)}, "tp=8 does not divide the decoder's heads"),
    "ZeRO 3 that keeps activations": ({"parallel": Parallel(zero=3)}, "zero=3 gathers a block's weights again"),
    "no samples": ({"data": DataSizes(samples=0)}, "data.samples=0; it must be at least 1"),
    "no room for images": (
        {"data": DataSizes(length=5)},
        "data.length=5: .* 1 images of 4 and 1 labelled tokens make 6;",
    ),
    "too many labels": (
        {"data": DataSizes(length=20, labelled=16)},
        "data.length=20: .* and 16 labelled tokens make 21;",
    ),
    "fewer than no images": ({"data": DataSizes(images=-1)}, "data.images=-1; it must be at least 0"),
    "no labels": ({"data": DataSizes(labelled=0)}, "data.labelled=0; it must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_sizes_that_the_run_refuses_are_refused(name):
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        plan.plan(replace(SMALL, **changes), C)


def test_too_few_samples_are_a_verdict_with_a_plan_that_runs():
    report = plan.plan(replace(SMALL, world=16, data=replace(SMALL.data, accumulate=2)), C)
    assert not report.fits and "data.samples=8 of an update cannot be shared out to 32 micro-batches" in report.verdict
    assert (report.better.plan.parallel.tp, report.better.plan.data.accumulate, report.better.fits) == (2, 1, True)
    assert "A plan that fits:\n" in plan.text(report) and "dp 8 x tp 2" in plan.text(report)


def test_a_plan_knows_the_buffers_of_hccl():
    """Two for each communicator, of which a mesh of one axis has one."""
    assert [estimate.hccl_buffers(*mesh, 200) / 2**20 for mesh in ((1, 1), (8, 1), (1, 8), (4, 2))] == [
        0,
        400,
        400,
        1200,
    ]
    c = replace(SMALL, world=4, machine=4, parallel=Parallel(tp=2), assumed=Assumed(hccl=300))
    limits = [plan._limit(replace(c, device=name)) for name in ("910B", "A100")]
    assert limits == [0.9 * DEVICES["910B"].memory - 1800 * 2**20, 0.9 * DEVICES["A100"].memory]
    assert "1.76 GiB are HCCL's: two buffers of 300 MB" in plan.assumptions(c)
    with pytest.raises(ValueError, match="assumed.hccl=0"):
        Assumed(hccl=0)


def small_device(monkeypatch, mib):
    """It has room for this much beside the buffers of a communicator."""
    monkeypatch.setitem(plan.DEVICES, "910B", Device(1e12, 1e11, (mib + 400) * 2**20 / 0.9, 1e9, 1e8))


def test_a_plan_that_does_not_fit_names_the_first_that_does(monkeypatch):
    wide = replace(C, llama=replace(C.llama, width=96, blocks=3, ffn=256))
    c = replace(SMALL, world=2, machine=2, data=DataSizes(samples=2, length=8, labelled=3))
    peaks = {}
    for zero in (1, 3):
        report, _ = seen(replace(c, recompute=zero == 3, parallel=Parallel(zero=zero)), wide)
        peaks[zero] = sum(report.peak.values()) / 2**20
    assert peaks[3] < 0.9 * peaks[1]
    small_device(monkeypatch, (peaks[1] + peaks[3]) / 2)
    found = plan.plan(c, wide)
    assert not found.fits and found.verdict.startswith("does not fit: ") and found.better.fits
    assert (found.better.plan.parallel.zero, found.better.plan.recompute) == (3, True)
    small_device(monkeypatch, 0.01)
    nothing = plan.plan(replace(c, recompute=True), C)
    assert nothing.better is None and "take more devices" in plan.text(nothing)


def test_seconds_follow_from_the_table():
    device, a = Device(1e12, 1e11, GIB, inside=8e9, outside=1e9), Assumed(arithmetic=0.5, links=0.5, hop=1e-3)
    assert estimate.computing(3e12, "bfloat16", device, a) == 6
    assert estimate.computing(3e12, "float32", device, a) == 60

    def one(call, tp=2, machine=8):
        (row,) = estimate.traffic([call, call], tp, machine, device, a)
        assert (row.calls, row.size) == (2, call.size)
        return row.sent, row.seconds

    given = ((torch.float32, 10**6),)
    assert one(Call("all_gather", "tp", 2, given)) == (8e6, pytest.approx(8e6 / 4e9 + 2 * 1e-3))
    assert one(Call("all_gather", "dp", 4, given)) == (24e6, pytest.approx(24e6 / 4e9 + 2 * 3e-3))  # in one machine
    assert one(Call("reduce_scatter", "dp", 8, given)) == (7e6, pytest.approx(7e6 / 2e9 + 2 * 7e-3))  # 4 of 8 networks
    assert one(Call("all_reduce", "all", 64, given)) == (15.75e6, pytest.approx(15.75e6 / 4e9 + 2 * 12e-3))
    with pytest.raises(ValueError, match="assumed.links=0; it is a share"):
        Assumed(links=0)


def test_command_line_prints_tables_and_json(monkeypatch, capsys):
    args = "--model emoji --train all --data.length 40 --data.samples 8 --device H200 --no-recompute --world".split()
    plan.main(cli.parse(options.PRESETS, options.DESCRIPTION, [*args, "2"]))
    out, err = capsys.readouterr()
    assert "fits: " in out and "the same on all roles" in out and "989 TFLOP/s in bfloat16 x 0.45" in out
    assert "rank 1 (dp 1, tp 0): text alone" in err
    plan.main(cli.parse(options.PRESETS, options.DESCRIPTION, [*args, "1", "--json"]))
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["plan"]["parallel"]["tp"] == 1 and report["tokens"] == 320
    assert report["seconds"]["overlapped"] == report["seconds"]["one_after_another"] == report["computing"] > 0


def test_a_plan_needs_a_process_of_its_own():
    with trace.world(2, 0, 1):
        with pytest.raises(ValueError, match="belongs to a group already"):
            plan.plan(SMALL, C)


@pytest.mark.slow
def test_7b_on_512_devices():
    report = plan.plan(PlanOptions(world=512, parallel=Parallel(tp=4)), log=lambda line: print(line, file=sys.stderr))
    assert report.fits and report.order == "the same on all roles"
    assert 13 < sum(report.peak.values()) / GIB < 14
