"""recipes/pretrain.py as a person runs it: what a run leaves behind, kills and resumes, and every wrong input."""

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from pretraining import SCRIPT, figures, rows, run_of, same, write
from warm import family, lines, recipe, until

from llava_fn import config, llava, spec, tree
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.launch.processes import World
from llava_fn.runs import guard

pretrain = recipe("pretrain")


@pytest.fixture(scope="module")
def small(tiny, emojis, tmp_path_factory):
    """18 updates."""
    return run_of(emojis, tmp_path_factory.mktemp("data"), tiny, samples=5)


def same_run(a: Path, b: Path, step=18) -> None:
    """Figures, skipped records, parameters and moments are equal to the bit."""
    assert figures(a) == figures(b)
    assert rows(a, "skipped.jsonl") == rows(b, "skipped.jsonl")
    one, two = (checkpoint.load(checkpoint.at(f / "run" / "checkpoints", step), moments=True) for f in (a, b))
    same(one.params, two.params)
    same(one.moments[0], two.moments[0])
    same(one.moments[1], two.moments[1])


@pytest.fixture(scope="module")
def finished(launcher, small, tmp_path_factory):
    """A run that nothing disturbed, and what it wrote."""
    folder = tmp_path_factory.mktemp("finished")
    status, log = launcher.run(folder, "--config", write(folder, small))
    assert status == 0, log
    return folder, log


# What a run leaves behind.


def test_a_run_leaves_config_environment_metrics_skipped_checkpoints_and_pages(finished, small):
    run = finished[0] / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "skipped.jsonl", "checkpoints", "loss.png", "samples.html",
        "lock",
    }  # fmt: skip
    assert config.structure(type(small), json.loads((run / "config.json").read_text())) == replace(
        small, recompute="off"
    )
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] in torch.__version__ and environment["device"]["type"] == "cpu"
    assert [row["step"] for row in rows(finished[0])] == list(range(1, 19))
    fields = {"step", "loss", "grad_norm", "lr", "tokens", "labelled", "samples", "seconds", "wait", "memory_gib"}
    assert all(set(row) == fields and 0 < row["loss"] < 20 for row in rows(finished[0]))
    assert sum(row["samples"] for row in rows(finished[0])) == 6 * 12
    assert [(row["record"], "none.png" in row["reason"]) for row in rows(finished[0], "skipped.jsonl")] == [
        ("some.json[12] id bad", True)
    ] * 6
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["000016", "000018"]


def test_the_loss_is_drawn_and_the_captions_are_shown(finished, emojis):
    folder, log = finished
    with Image.open(folder / "run" / "loss.png") as picture:
        assert picture.format == "PNG" and picture.size == (960, 600)
        assert len(picture.convert("RGB").getcolors(100_000)) > 20
    page = (folder / "run" / "samples.html").read_text()
    captions = [r["conversations"][1]["value"] for r in json.loads((emojis / "heldout.json").read_text())]
    assert all(f"<td>{caption}<td" in page and caption in log for caption in captions)
    assert page.count("data:image/png;base64,") == 3
    assert re.search(r"\d+.\d% of 3 held-out captions are right to the letter; [\d.]+ nats per token", log)


def test_the_log_outside_a_terminal_is_plain_lines(finished):
    log = finished[1]
    assert "\r" not in log and "\x1b" not in log
    assert log.startswith("13 records, 18 updates; 0.0 M parameters trained, 0.0 M frozen; random at the start: ")
    assert "random at the start: vision, projector, llama; starts at update 1\n" in log
    assert re.search(r"^step 1/18 loss \d\.\d+ \d+ tokens/s .* ETA \d+ s$", log, re.M)
    assert re.search(r"^step 18/18 loss .* skipped 6 ETA 0 s$", log, re.M)


def test_a_terminal_gets_a_line_that_renews_itself(launcher, small, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    child = launcher.start(tmp_path, "--config", write(tmp_path, small), output=os.ttyname(theirs))
    seen = b""
    while b"all of them" not in seen and select.select([ours], [], [], 300)[0]:
        seen += os.read(ours, 65536)
    assert launcher.wait(child) == 0
    os.close(ours), os.close(theirs)
    assert b"\r" in seen and re.search(rb"18/18 \[.*loss \d\.\d+ ", seen) and b"ETA" not in seen


def test_a_finished_run_is_started_again_from_its_own_config_and_changes_nothing(launcher, finished, tmp_path):
    before = figures(finished[0]), checkpoint.fingerprint(finished[0] / "run/checkpoints/000018")
    status, log = launcher.run(finished[0], "--config", "run/config.json")
    assert status == 0 and "goes on from run/checkpoints/000018" in log
    assert (figures(finished[0]), checkpoint.fingerprint(finished[0] / "run/checkpoints/000018")) == before
    status, log = launcher.run(tmp_path, "--config", finished[0] / "run/config.json")
    assert status == 0, log
    same_run(finished[0], tmp_path)


def test_help_names_the_flags(tmp_path):
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and list(tmp_path.iterdir()) == []
    for flag in ("--config NAME", "--run-dir", "--data.samples", "--optim.lr", "--saving.resume", "--model.vision.act"):
        assert flag in shown.stdout, flag


def test_a_worker_process_gives_the_same_run(launcher, finished, small, tmp_path):
    status, log = launcher.run(tmp_path, "--config", write(tmp_path, small), "--data.workers", "1")
    assert status == 0, log
    same_run(finished[0], tmp_path)


# Kills and resumes.


def parts(folder: Path) -> list[str]:
    path = folder / "run" / "checkpoints"
    return [p.name for p in path.iterdir() if p.name.startswith(".")] if path.exists() else []


METRICS = "run/metrics.jsonl"


def test_a_run_killed_again_and_again_equals_one_that_was_not(launcher, finished, small, tmp_path):
    """In the midst of each second save, and after an update."""
    path, torn = write(tmp_path, small), 0
    arguments = "--config", path, "--saving.save-interval", "1"
    for attempt in range(12):
        at = METRICS, lines([tmp_path / METRICS]) + 1
        if attempt % 2:
            checkpoint.clean(tmp_path / "run/checkpoints")  # else what the last one left would be taken for a save
            at = "run/checkpoints/.*", 1
        child = launcher.start(tmp_path, *arguments, strike=(signal.SIGKILL, *at))
        assert launcher.wait(child) == -signal.SIGKILL, (tmp_path / "log").read_text()
        torn += bool(parts(tmp_path))
    status, log = launcher.run(tmp_path, *arguments)
    assert status == 0 and "goes on from" in log, log
    assert parts(tmp_path) == [] and torn
    same_run(finished[0], tmp_path)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_a_run_that_a_signal_stops_has_a_checkpoint_and_goes_on_to_the_bit(
    launcher, finished, small, tmp_path, number, status
):
    """With workers, and with the signal sent to them too, as a cluster does."""
    path = write(tmp_path, small)
    arguments = ("--config", path, "--data.workers", "1", "--saving.save-interval", "1000")
    child = launcher.start(tmp_path, *arguments, strike=(number, METRICS, 1))
    assert launcher.wait(child) == status, (tmp_path / "log").read_text()
    (at,), log = checkpoint.steps(tmp_path / "run/checkpoints"), (tmp_path / "log").read_text()
    assert (
        at == lines([tmp_path / METRICS]) < 18 and f"; the same command goes on from run/checkpoints/{at:06d}\n" in log
    )
    assert f"{number.name}: the run stops after this update" in log and "held-out captions" not in log
    status, log = launcher.run(tmp_path, *arguments)
    assert status == 0 and f"goes on from run/checkpoints/{at:06d}" in log, log
    same_run(finished[0], tmp_path)


def test_a_killed_run_leaves_no_worker_behind(launcher, small, tmp_path):
    endless = replace(small, data=replace(small.data, workers=1, epochs=1e4))
    child = launcher.start(tmp_path, "--config", write(tmp_path, endless))
    assert until(lambda: lines([tmp_path / METRICS]), child)
    workers = family(child)
    os.kill(child, signal.SIGKILL)
    launcher.wait(child)
    assert len(workers) >= 2
    end = time.monotonic() + 300
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_resuming_from_a_step_goes_back_to_it(launcher, finished, small, tmp_path):
    path = write(tmp_path, replace(small, saving=replace(small.saving, keep=0)))
    status, log = launcher.run(tmp_path, "--config", path)
    assert status == 0, log
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/checkpoints").iterdir()}
    status, log = launcher.run(tmp_path, "--config", path, "--saving.resume", "6")
    assert status == 0 and "goes on from run/checkpoints/000006" in log
    written = {p.name for p, at in before.items() if p.stat().st_mtime_ns != at}
    assert written == {f"{s:06d}" for s in range(8, 19, 2)}
    same_run(finished[0], tmp_path)
    assert json.loads((tmp_path / "run/config.json").read_text())["saving"]["resume"] == "auto"


def test_a_run_without_optimizer_state_goes_on_only_where_told(launcher, small, tmp_path):
    path = write(tmp_path, small)
    assert launcher.run(tmp_path, "--config", path, "--saving.no-save-optim")[0] == 0
    assert not (tmp_path / "run/checkpoints/000016/optim.safetensors").exists()
    status, log = launcher.run(tmp_path, "--config", path, "--saving.resume", "16")
    assert status == 1 and log == (
        "error: run/checkpoints/000016 was saved without optimizer state; resume it with --saving.no-load-optim\n"
    )
    status, log = launcher.run(tmp_path, "--config", path, "--saving.resume", "16", "--saving.no-load-optim")
    assert status == 0 and "goes on from run/checkpoints/000016" in log
    assert json.loads((tmp_path / "run/config.json").read_text())["saving"]["load_optim"] is True


def test_a_second_run_in_the_same_folder_is_refused_by_the_name_of_the_first(launcher, small, tmp_path):
    path = write(tmp_path, replace(small, data=replace(small.data, epochs=200.0)))
    child = launcher.start(tmp_path, "--config", path, output=tmp_path / "first")
    until(lambda: lines([tmp_path / METRICS]) > 1, child)
    status, log = launcher.run(tmp_path, "--config", path)
    assert status == 1 and re.search(rf"error: run is in use by process {child} on \S+; wait for its end, or", log), log
    os.kill(child, signal.SIGKILL)
    launcher.wait(child)
    status, log = launcher.run(
        tmp_path, "--config", write(tmp_path, small), "--run-dir", "run", "--saving.resume", "no"
    )
    assert "in use" not in log  # the lock has gone with its process


def test_a_run_in_the_way_and_a_changed_config_are_refused(launcher, finished):
    folder, _ = finished
    path = folder / "my.json"
    status, log = launcher.run(folder, "--config", path, "--saving.resume", "no")
    assert status == 1 and log == "error: run already holds a run; choose another run folder, or resume=auto\n"
    status, log = launcher.run(folder, "--config", path, "--data.seed", "43", "--optim.lr", "0.5")
    assert status == 1 and log.splitlines() == [
        "error: run/checkpoints/000018 belongs to another config; undo these, or start a new run that trains on from "
        "it: the same command with another --run-dir and --base run/checkpoints/000018:",
        "  recipe.data.seed: 42 -> 43",
        "  recipe.optim.lr: 0.002 -> 0.5",
    ]
    more = ("--data.seed", "43", "--run-dir", "more", "--data.epochs", "1")  # the advice is taken
    status, log = launcher.run(folder, "--config", path, *more, "--base", "run/checkpoints/000018")
    assert status == 0 and "random at the start: none; starts at update 1" in log, log
    assert launcher.run(folder, "--config", path, *more, "--base", "run")[0] == 0  # the same checkpoint
    status, log = launcher.run(folder, "--config", path, "--base", "run", "--model.llama.eps", "1e-3")
    assert status == 1 and "run/checkpoints/000018 brings another model" in log and "llama.eps: 1e-05 -> 0.001" in log


def test_a_filesystem_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(guard.fcntl, "flock", refused)
    with guard.lock(tmp_path, tmp_path / "lock", World()):
        said = capsys.readouterr().err
    assert said.startswith(f"warning: the filesystem of {tmp_path} has no locks ([Errno 37] No locks available)")


# A base.


@pytest.mark.parametrize("train", ["projector", "projector+llama"])
def test_a_run_on_a_base_trains_and_saves_only_its_part(launcher, small, tiny, tokenizer, tmp_path, train):
    towers = spec.init({k: v for k, v in llava.spec(tiny).items() if k != "projector"}, 9)
    manifest = checkpoint.Manifest(tiny, ("vision", "llama"), "square", "plain", None)
    checkpoint.save(tmp_path / "base", manifest, towers, None, tokenizer.model)
    based = replace(small, base=Path("base"), model=None, tokenizer=None, train=train)
    status, log = launcher.run(tmp_path, "--config", write(tmp_path, based))
    assert status == 0 and "random at the start: projector; starts" in log, log
    own = checkpoint.load(tmp_path / "run/checkpoints/000018")
    assert own.manifest.parts == ("projector", "llama")[: 1 + (train != "projector")]
    assert {path[0] for path in tree.paths(own.params)} == set(own.manifest.parts)
    whole = checkpoint.load_model(tmp_path / "run/checkpoints/000018").params
    assert set(tree.paths(whole)) == {path for path, _ in spec.leaves(llava.spec(tiny))}
    same(whole["vision"], towers["vision"])
    assert torch.equal(whole["llama", "embed"], towers["llama", "embed"]) == (train == "projector")
    (tmp_path / "base" / "SHA256SUMS").write_text("")
    status, log = launcher.run(tmp_path, "--config", tmp_path / "my.json")
    assert status == 1 and log.startswith("error: base is damaged: SHA256SUMS does not agree with manifest.json,")


# Wrong input: one message, no traceback, exit status not 0.


def change(c: dict, where: str, value) -> None:
    *path, last = where.split(".")
    for name in path:
        c = c[int(name) if isinstance(c, list) else name]
    c[last] = value


WRONG = [
    ({"dropout": 0.1}, [], {}, r"my.json: Pretrain: .*dropout"),
    ({"model.llama.depth": 2}, [], {}, r"my.json: .*depth"),
    ({"data.samples": "many"}, [], {}, r"my.json: Pretrain: .*data.samples"),
    ({"data.samples": 0}, [], {}, r"data.samples=0; it must be at least 1"),
    ({"model.llama.heads": 3}, [], {}, r"llama.width=16 is not a multiple of llama.heads=3"),
    ({"train": "head"}, [], {}, r"my.json: .*train"),
    ({"model.llama.vocab": 500}, [], {}, "error: the tokenizer has 512 pieces, but llama.vocab is only 500"),
    ({"tokenizer": "my.json"}, [], {}, "error: my.json: not a sentencepiece model"),
    ({"tokenizer": "none.model"}, [], {}, "error: .*none.model"),
    ({"tokenizer": None}, [], {}, "error: give a base, which brings model and tokenizer, or a model and a tokenizer"),
    (
        {"base": "none", "model": None, "tokenizer": None},
        [],
        {},
        "error: none is not a checkpoint of llava_fn; recipes/convert",
    ),
    ({"train": "projector"}, [], {}, "error: vision, llama is not trained, and no base brings it"),
    ({"data.sources.0.records": "none.json"}, [], {}, "error: none.json: no such file"),
    ({"data.sources": []}, [], {}, "error: the data set is empty"),
    ({"data.template": "vicuna_v7"}, [], {}, "no conversation template 'vicuna_v7'; there are: "),
    ({"data.on_bad_record": "error"}, [], {}, r"error: step \d: 1 bad records; mend .*\n  some.json.12. id bad: "),
    ({"heldout.records": "none.json"}, [], {}, "error: none.json: no such file"),
    ({"saving.resume": "4"}, [], {}, r"error: resume=4: there is no run/checkpoints/000004; run has the steps \[\]"),
    ({"compile": "nothing"}, [], {}, "error: compile=nothing is no backend of torch.compile; there are: .*inductor"),
    ({}, ["--run-dir", "my.json"], {}, "error: .*my.json"),
    ({}, [], {"WORLD_SIZE": "2"}, "error: WORLD_SIZE=2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ({}, [], {"HCCL_BUFFSIZE": "0"}, "HCCL_BUFFSIZE='0'"),
    ({}, ["--config", "nothing"], {}, "nothing: no such preset and no such file"),
    ({}, ["--config"], {}, r"--config \{emoji,published\}\|FILE(.|\n)*expected one argument"),
    ({}, ["--optim.lr", "fast"], {}, "--optim.lr"),
    ({}, ["--optim.rate", "1"], {}, "--optim.rate"),
    ({}, ["--model.llama.heads", "3"], {}, "llama.heads=3"),
]


@pytest.mark.parametrize("changes, args, env, said", WRONG, ids=lambda x: str(x)[:40])
def test_wrong_input_ends_with_a_message_and_without_a_traceback(launcher, small, tmp_path, changes, args, env, said):
    values = config.plain(small)
    for where, value in changes.items():
        change(values, where, value)
    (tmp_path / "my.json").write_text(json.dumps(values))
    first = [] if "--config" in args else ["--config", "my.json"]
    status, log = launcher.run(tmp_path, *first, *args, **env)
    assert status not in (0, -signal.SIGKILL) and "Traceback" not in log, log
    assert re.search(said, log), log
    assert len(log) < 1500 and not (tmp_path / "run" / "checkpoints" / "000002").exists()


@pytest.mark.parametrize("content", ["[1]", "{", "null", "\xff"])
def test_a_config_file_that_is_no_config_is_refused_by_name(launcher, tmp_path, content):
    (tmp_path / "my.json").write_bytes(content.encode("latin-1"))
    status, log = launcher.run(tmp_path, "--config", "my.json")
    assert status == 1 and log.startswith("my.json") and "Traceback" not in log, log


def test_the_paths_of_the_data_set_follow_unpack_alone(tmp_path):
    c = pretrain.follow(replace(pretrain.EMOJI, unpack=tmp_path, tokenizer=Path("mine.model")))
    (source,) = c.data.sources
    assert (source.records, source.images, c.heldout.records) == (
        tmp_path / "train.json", tmp_path, tmp_path / "heldout.json",
    )  # fmt: skip
    assert c.tokenizer == Path("mine.model")
    assert pretrain.follow(pretrain.EMOJI) == pretrain.EMOJI
    other = replace(pretrain.EMOJI, unpack=None, heldout=None, tokenizer=None)
    assert pretrain.follow(other) == other
