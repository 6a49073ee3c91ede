"""Runs of several processes as a person starts them: figures, resuming on another mesh, kills, hangs, wrong input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from pretraining import ROOT, SCRIPT, figures, rows, run_of, same, write
from warm import until

from llava_fn import config
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.config import Parallel
from llava_fn.launch import agreement, watchdog

MODEL = config.Llava(
    config.Vision(image=16, patch=8, width=16, blocks=3, heads=2, ffn=32),
    config.Llama(vocab=512, width=16, blocks=2, heads=4, kv_heads=2, ffn=32),
)
STEPS = 12
KINDS = {  # name -> (processes, Parallel)
    "dp2 zero1": (2, Parallel(zero=1)),
    "dp2 zero3": (2, Parallel(zero=3)),
    "tp2": (2, Parallel(tp=2, zero=0, check_interval=2)),
    "dp2 tp2": (4, Parallel(tp=2)),
}


@pytest.fixture(scope="module")
def small(emojis, tmp_path_factory):
    """12 updates, whose checkpoints all stay."""
    c = run_of(emojis, tmp_path_factory.mktemp("data"), MODEL, samples=7)
    calm = replace(c.optim, eps=1e-3)  # else Adam blows up rounding where a gradient is nearly zero
    return replace(c, saving=replace(c.saving, keep=0), optim=calm)


def start(launcher, folder, c, world, *more, own=((),), strike=None):
    """The process ids of a run of `world` processes. own: arguments of each process besides those of all."""
    return launcher.start_ranks(folder, world, "--config", write(folder, c), *more, own=own, strike=strike)


def run(launcher, folder, c, world, *more, own=((),)):
    """-> (exit statuses, what each process wrote)."""
    statuses = [launcher.wait(child) for child in start(launcher, folder, c, world, *more, own=own)]
    return statuses, [(folder / f"log{r}").read_text() for r in range(world)]


def many(c, kind):
    world, parallel = KINDS[kind]
    return replace(c, parallel=parallel), world


@pytest.fixture(scope="module")
def alone(launcher, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    status, log = launcher.run(folder, "--config", write(folder, small))
    assert status == 0, log
    return folder


@pytest.fixture(scope="module")
def runs(launcher, small, tmp_path_factory):
    """kind -> a run that nothing disturbed, and what its processes wrote."""
    done = {}

    def get(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp("many")
            statuses, logs = run(launcher, folder, *many(small, kind))
            assert statuses == [0] * len(statuses), logs
            done[kind] = folder, logs
        return done[kind]

    return get


def one_epoch(c, folder):
    """A config of as many updates as `c`, in one epoch of six times its records, whose bad images have names each."""
    (source,) = c.data.sources
    *good, bad = json.loads(source.records.read_text())
    names = [f"none{j}.png" for j in range(6)]
    records = [*good * 6, *(bad | {"id": name, "image": str(folder / name)} for name in names)]
    (folder / "six.json").write_text(json.dumps(records))
    return replace(c, data=replace(c.data, sources=(replace(source, records=folder / "six.json"),), epochs=1.0))


def saved(folder, step):
    """A checkpoint of a run, on one process."""
    return checkpoint.load(checkpoint.at(folder / "run" / "checkpoints", step), moments=True)


def close(a, b, limit=1e-4):
    """Figures of two runs, step by step."""
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=limit), (x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_several_processes_is_that_of_one(alone, runs, kind):
    folder, _ = runs(kind)
    close(figures(folder), figures(alone))
    assert sorted(map(str, rows(folder, "skipped.jsonl"))) == sorted(map(str, rows(alone, "skipped.jsonl")))
    one, two = saved(alone, STEPS), saved(folder, STEPS)
    for x, y in zip((one.params, *one.moments), (two.params, *two.moments), strict=True):
        for path in x.keys(True, True):
            torch.testing.assert_close(x[path], y[path], rtol=1e-3, atol=1e-4)


def test_the_first_process_shows_and_the_others_have_a_log_each(runs):
    folder, logs = runs("dp2 tp2")
    assert "4 processes (dp=2, tp=2, zero=1); starts at update 1\n" in logs[0] and "held-out captions" in logs[0]
    assert logs[1:] == ["", "", ""]
    said = [(folder / "run" / "log" / f"rank-0000{r}.log").read_text() for r in (1, 2, 3)]
    assert all(re.search(r"^step 12/12 loss", text, re.M) and "held-out" not in text for text in said)


@pytest.mark.parametrize("before, after", [("dp2 zero3", "dp2 tp2"), ("dp2 tp2", "")])
def test_a_run_goes_on_on_another_mesh(launcher, small, alone, runs, tmp_path, before, after):
    origin, _ = runs(before)
    c, world = many(small, after) if after else (small, 1)
    statuses, logs = run(launcher, tmp_path, c, world, "--saving.resume", origin / "run" / "checkpoints" / "000006")
    assert statuses == [0] * world, logs
    assert "goes on from" in logs[0]
    close(figures(tmp_path), figures(alone)[6:])


@pytest.mark.slow
def test_after_a_kill_the_same_mesh_has_the_same_figures_to_the_bit(launcher, small, tmp_path):
    """With tensor parallelism: tests/campaigns/kills.py."""
    c, world = many(one_epoch(small, tmp_path), "dp2 zero3")
    whole = tmp_path / "whole"
    whole.mkdir()
    statuses, logs = run(launcher, whole, c, world)
    assert statuses == [0] * world, logs
    waits = next(row["record"] for row in rows(whole, "skipped.jsonl") if 6 <= row["step"] <= 10)
    held = tmp_path / waits.rpartition(" ")[2]
    os.mkfifo(held)  # whose reader waits for ever, so that the run does not end before it is killed
    children = start(launcher, tmp_path, c, world)
    assert until((tmp_path / "run" / "checkpoints" / "000004").is_dir, *children)
    os.kill(children[1], signal.SIGKILL)
    statuses = []
    for child in children:
        time.sleep(0.2)
        os.kill(child, signal.SIGKILL)  # as torchrun does with the others
        statuses.append(launcher.wait(child))
    assert -signal.SIGKILL in statuses
    held.unlink()
    statuses, logs = run(launcher, tmp_path, c, world)
    assert statuses == [0] * world, logs
    assert figures(tmp_path) == figures(whole)
    one, two = saved(tmp_path, STEPS), saved(whole, STEPS)
    same(one.params, two.params)
    same(one.moments[1], two.moments[1])


@pytest.mark.parametrize("kind", ["dp2 zero3", "tp2"])
def test_a_signal_to_one_process_stops_all_after_the_same_update(launcher, small, runs, tmp_path, kind):
    """The rest of the run saves in the background, which must leave the same checkpoints."""
    c, world = many(small, kind)
    at = signal.SIGTERM, "run/metrics.jsonl", 1
    children = start(launcher, tmp_path, c, world, "--saving.save-interval", "1000", strike=at)
    assert [launcher.wait(child) for child in children] == [143] * world, (tmp_path / "log0").read_text()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [len(rows(tmp_path))] < [STEPS]
    statuses, logs = run(launcher, tmp_path, replace(c, saving=replace(c.saving, background=True)), world)
    assert statuses == [0] * world, logs
    assert figures(tmp_path) == figures(runs(kind)[0])
    for step in (8, 12):
        same(saved(tmp_path, step).params, saved(runs(kind)[0], step).params)


def test_the_watchdog_names_the_process_that_hangs_and_ends_the_others(launcher, small, tmp_path):
    c, world = many(small, "dp2 zero1")
    c = replace(c, parallel=replace(c.parallel, silence=15.0), data=replace(c.data, epochs=500.0))
    children = start(launcher, tmp_path, c, world)
    assert until((tmp_path / "run" / "checkpoints" / "000002").is_dir, *children)
    os.kill(children[1], signal.SIGSTOP)
    assert launcher.wait(children[0]) == watchdog.STATUS
    os.kill(children[1], signal.SIGKILL)
    launcher.wait(children[1])
    said = (tmp_path / "log0").read_text()
    assert re.search(r"watchdog of rank 0: nothing has moved for 15 s: rank 1 in '[\w ]+', and it is not heard", said)
    assert "pretrain.py" in said and "--parallel.silence" in said


def test_the_one_that_has_begun_least_is_named():
    heard = [(9, "update 4", 50), (8, "data 4", 50), (9, "update 4", 50)]
    later = [(n, name, pulse + 3) for n, name, pulse in heard]
    said = watchdog.report(heard, later, 0, 30)
    assert "for 30 s: rank 1 in 'data 4'; the others are in 'update 4'." in said


def test_a_bad_record_is_named_by_the_process_that_has_it(launcher, small, tmp_path):
    c, world = many(small, "dp2 zero1")
    children = start(launcher, tmp_path, replace(c, data=replace(c.data, on_bad_record="error")), world)
    logs = [tmp_path / f"log{r}" for r in range(world)]
    until(lambda: any("none.png" in log.read_text() for log in logs if log.exists()), *children)
    said = [log.read_text() for log in logs]
    for child in children:
        os.kill(child, signal.SIGKILL)
        launcher.wait(child)
    (rank,) = [r for r in range(world) if "none.png" in said[r]]
    assert f"error (rank {rank}): step 1: 1 bad records" in said[rank] and "some.json[12] id bad" in said[rank]


@pytest.mark.parametrize(
    "world, fields, said",
    [
        (2, {"tp": 3}, "tp=3 does not divide the 2 processes; tp can be one of 1, 2"),
        (1, {"tp": 2}, "tp=2 does not divide the 1 processes; tp can be one of 1"),
        (4, {"tp": 4}, "tp=4 does not divide the decoder's kv_heads=2; tp can be one of 1, 2"),
        (
            2,
            {"zero": 3, "recompute": "off"},
            "zero=3 gathers a block's weights again in the backward pass; it needs recompute",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_every_process(launcher, small, tmp_path, world, fields, said):
    c = replace(small, recompute=fields.pop("recompute", "auto"), parallel=Parallel(**fields))
    statuses, logs = run(launcher, tmp_path, c, world)
    assert statuses == [1] * world
    assert all(said in log for log in logs) and not (tmp_path / "run").exists()  # it comes with the first collective


@pytest.mark.parametrize("samples, advice", [
    (3, "at least 4, or lower accumulate to at most 1"), (1, "at least 4, or start fewer processes"),
])  # fmt: skip
def test_an_update_of_too_few_samples_is_refused(launcher, small, tmp_path, samples, advice):
    c = replace(small, data=replace(small.data, samples=samples, accumulate=2))
    statuses, logs = run(launcher, tmp_path, c, 2)
    said = f"data.samples={samples} of an update cannot be shared out to 4 micro-batches (2 processes / tp=1 x "
    assert statuses == [1, 1] and f"{said}accumulate=2); raise it to {advice}" in logs[1]


def test_processes_that_were_told_different_things_end_before_the_first_update(launcher, small, tmp_path):
    statuses, logs = run(launcher, tmp_path, small, 2, own=((), ("--optim.lr", "0.1")))
    assert statuses == [1, 1] and not (tmp_path / "run" / "metrics.jsonl").exists()
    for rank, log in enumerate(logs):
        assert f"error (rank {rank}): the processes do not agree on the run (that of rank 0 -> theirs):" in log
        assert "rank 1: run.recipe.optim.lr: 0.002 -> 0.1" in log


def test_a_number_changes_with_any_bit():
    x = torch.randn(7, 3)
    y = x.clone()
    y.view(torch.int32)[2, 1] ^= 1
    assert agreement.bits(x) == agreement.bits(x.clone()) != agreement.bits(y)


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_and_it_goes_on(launcher, small, tmp_path):
    c, world = many(small, "dp2 zero1")
    c = replace(c, data=replace(c.data, epochs=30.0))  # so many updates that it does not end before it is killed
    (tmp_path / "whole").mkdir()
    assert run(launcher, tmp_path / "whole", c, world)[0] == [0] * world
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world),
               "--max-restarts", "3", "--standalone", str(SCRIPT), "--config", str(write(tmp_path, c))]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=subprocess.STDOUT)
        for step in ("000002", "000020"):
            found = []
            while process.poll() is None and not (found and (tmp_path / "run" / "checkpoints" / step).is_dir()):
                time.sleep(0.01)
                found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(found[-1]), signal.SIGKILL)
            time.sleep(1)  # torchrun takes a moment to see it
        assert process.wait(timeout=300) == 0, (tmp_path / "out").read_text()
    assert figures(tmp_path) == figures(tmp_path / "whole")
