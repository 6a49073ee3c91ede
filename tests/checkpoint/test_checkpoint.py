"""Checkpoints: bitwise round trips, damage of every kind, full disks, kills, and bases."""

import json
import shutil
import subprocess
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import copy, interrupted, largest_file

from llava_fn import llava, optim, spec, tree
from llava_fn.checkpoint import boxes
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.folder import Base, Manifest
from llava_fn.parallel.zero import Zero
from llava_fn.plan import trace
from llava_fn.runs import report
from llava_fn.runs.options import Saving
from llava_fn.runs.origin import open_origin
from llava_fn.runs.run import Run, find_checkpoint
from llava_fn.train import TrainState

FILES = ["SHA256SUMS", "manifest.json", "optim.safetensors", "params.safetensors", "tokenizer.model"]


@pytest.fixture(scope="module")
def params(tiny):
    return spec.init(llava.spec(tiny), 0)


@pytest.fixture(scope="module")
def moments(tiny):
    return spec.init(llava.spec(tiny), 1), spec.init(llava.spec(tiny), 2)


@pytest.fixture(scope="module")
def manifest(tiny):
    recipe = {"optim": {"lr": 1e-3}, "loss": "token_mean"}
    parts = ("vision", "projector", "llama")
    return Manifest(tiny, parts, "square", "plain", None, 7, recipe=recipe, data=[{"a": 1.5}])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, manifest, params, moments, tokenizer):
    """One whole checkpoint; tests copy it before they touch it."""
    folder = tmp_path_factory.mktemp("saved") / "000007"
    checkpoint.save(folder, manifest, params, moments, tokenizer.model)
    return folder


def same(a, b) -> None:
    assert tree.paths(a) == tree.paths(b)
    for x, y in zip(tree.values(a), tree.values(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


# Round trips.


def test_a_round_trip_changes_no_bit(saved, manifest, params, moments, tokenizer):
    loaded = checkpoint.load(saved, moments=True)
    assert loaded.manifest == manifest and loaded.tokenizer == tokenizer.model
    same(loaded.params, params)
    same(loaded.moments[0], moments[0])
    same(loaded.moments[1], moments[1])
    assert checkpoint.load(saved).moments is None


def test_numbers_that_are_not_finite_survive(tmp_path, manifest, params, tokenizer):
    odd = tree.rebuild(params, [p.clone() for p in tree.values(params)])
    odd["projector", "b1"][:3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    checkpoint.save(tmp_path / "a", manifest, odd, None, tokenizer.model)
    back = checkpoint.load(tmp_path / "a").params["projector", "b1"]
    assert torch.equal(back.view(torch.int32), odd["projector", "b1"].view(torch.int32))


def test_sha256sum_accepts_a_checkpoint(saved):
    assert sorted(p.name for p in saved.iterdir()) == FILES
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=saved, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 4


def test_the_fingerprint_is_that_of_the_content(saved, tmp_path, manifest, params, moments, tokenizer):
    checkpoint.save(tmp_path / "a", manifest, params, moments, tokenizer.model)
    checkpoint.save(tmp_path / "b", replace(manifest, step=8), params, moments, tokenizer.model)
    prints = [checkpoint.fingerprint(f) for f in (saved, tmp_path / "a", tmp_path / "b")]
    assert prints[0] == prints[1] != prints[2]


def test_moments_that_were_not_saved_are_asked_for_in_vain(tmp_path, manifest, params, tokenizer):
    checkpoint.save(tmp_path / "a", manifest, params, None, tokenizer.model)
    with pytest.raises(ValueError, match="a was saved without optimizer state; .*--saving.no-load-optim"):
        checkpoint.load(tmp_path / "a", moments=True)


# Damage.


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found_and_the_file_named(saved, tmp_path, name):
    folder = copy(saved, tmp_path)
    content = (folder / name).read_bytes()
    rng = torch.Generator().manual_seed(len(name))
    newlines = [i for i, byte in enumerate(content) if byte == 10] if name == "SHA256SUMS" else []
    places = {0, len(content) - 1, *newlines, *torch.randint(len(content), (12,), generator=rng).tolist()}
    for place in sorted(places):
        for bit in (0, 5) if place in newlines else (place % 8,):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (folder / name).write_bytes(changed)
            with pytest.raises(ValueError) as caught:
                checkpoint.load(folder, moments=True)
            assert f"{folder} is damaged" in str(caught.value) and str(caught.value).isprintable()
            said = str(caught.value).partition("does not agree with ")[2]
            assert name in said if name != "SHA256SUMS" else said.partition(";")[0]
    (folder / name).write_bytes(content)
    checkpoint.load(folder, moments=True)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named(saved, tmp_path, name):
    folder = copy(saved, tmp_path)
    content = (folder / name).read_bytes()
    for length in (0, len(content) // 2, len(content) - 1):
        (folder / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"000007 is damaged: .*{name}"):
            checkpoint.load(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"000007 .*{name}"):
        checkpoint.load(folder)


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: p.mkdir()])
def test_an_added_file_or_folder_is_named(saved, tmp_path, make):
    folder = copy(saved, tmp_path)
    make(folder / "extra")
    with pytest.raises(ValueError, match="000007 is damaged: SHA256SUMS does not agree with extra;"):
        checkpoint.load(folder)


def forge(folder: Path, **changes) -> None:
    """Change fields of the manifest and make the sums agree again."""
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(values | changes))
    (folder / "SHA256SUMS").write_text(checkpoint.sums(folder))


def test_an_unknown_field_of_the_manifest_is_named(saved, tmp_path):
    folder = copy(saved, tmp_path)
    forge(folder, dropout=0.1)
    with pytest.raises(ValueError, match="manifest.json: Manifest: .*dropout"):
        checkpoint.load(folder)


def test_leaves_that_do_not_fit_the_model_are_listed(saved, tmp_path):
    folder = copy(saved, tmp_path)
    model = json.loads((folder / "manifest.json").read_text())["model"]
    forge(folder, model=model | {"llama": model["llama"] | {"ffn": 40}})
    with pytest.raises(ValueError, match=r"llama/blocks/1/w_up is \(32, 16\), not \(40, 16\)"):
        checkpoint.load(folder)
    forge(folder, model=model | {"llama": model["llama"] | {"blocks": 3}})
    with pytest.raises(ValueError, match="missing .*llama/blocks/2/norm1.* unexpected .."):
        checkpoint.load(folder)
    forge(folder, model=model | {"llama": model["llama"] | {"tied": True}})
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['llama/head'\]"):
        checkpoint.load(folder)


# Resuming from one.


@pytest.fixture
def begin(tiny, tmp_path, params, tokenizer):
    """(path, manifest, saving) -> the state that a run of this manifest goes on from."""

    def resume(path, manifest, saving=Saving()):
        return Run(tmp_path / "run", saving, manifest, tokenizer.model, Zero(llava.spec(tiny))).resume(path, params)

    return resume


def test_another_config_lists_each_field_with_both_values(saved, manifest, begin, tiny):
    now = replace(manifest, step=0, image_mode="pad", recipe={"optim": {"lr": 5e-4}, "loss": "token_mean"})
    now = replace(now, model=replace(tiny, llama=replace(tiny.llama, theta=5e5)))
    with pytest.raises(ValueError, match="000007 belongs to another config") as caught:
        begin(saved, now)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    model = "model.llama.theta: 10000.0 -> 500000.0"
    assert lines == [model, "image_mode: square -> pad", "recipe.optim.lr: 0.001 -> 0.0005"]


def test_another_tokenizer_is_another_config(saved, tmp_path, manifest, begin):
    folder = copy(saved, tmp_path)
    (folder / "tokenizer.model").write_bytes(b"other")
    (folder / "SHA256SUMS").write_text(checkpoint.sums(folder))
    with pytest.raises(ValueError, match="tokenizer: another sentencepiece model"):
        begin(folder, replace(manifest, step=0))


def test_resume_says_damaged_rather_than_another_config(saved, tmp_path, manifest, begin):
    folder = copy(saved, tmp_path)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("0.001", "0.002"))
    with pytest.raises(ValueError, match="000007 is damaged: .*manifest.json"):
        begin(folder, replace(manifest, step=0))


def test_resume_takes_step_parameters_and_moments_and_zeros_where_told(saved, manifest, begin, params, moments):
    now = replace(manifest, step=0)
    state = begin(saved, now)
    assert state.step == 7
    same(state.params, params)
    same(state.moments.second, moments[1])
    fresh = begin(saved, now, Saving(load_optim=False))
    same(fresh.moments.first, optim.init(params).first)


# Runs of checkpoints.


@pytest.fixture
def a_run(tmp_path, manifest, tokenizer):
    run = Run(tmp_path / "run", Saving(keep=2), manifest, tokenizer.model, Zero(llava.spec(manifest.model)))
    run.checkpoints.mkdir(parents=True)
    return run


def state(step, params, moments):
    return TrainState(step, params, optim.Moments(*moments))


@pytest.mark.parametrize("keep, stay", [(1, [5]), (2, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_the_newest_checkpoints_stay(a_run, params, moments, keep, stay):
    run = replace(a_run, saving=Saving(keep=keep))
    for step in range(1, 6):
        run.save(state(step, params, moments))
    assert checkpoint.steps(run.checkpoints) == stay
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"{s:06d}" for s in stay]
    assert checkpoint.load(checkpoint.at(run.checkpoints, 5)).manifest.step == 5


def test_source_picks_the_newest_the_named_or_none(a_run, saved, params, moments):
    folder = a_run.folder
    assert find_checkpoint(folder, "auto") is None and find_checkpoint(folder, "no") is None
    for step in (3, 12):
        a_run.save(state(step, params, moments))
    assert find_checkpoint(folder, "auto").name == "000012" and find_checkpoint(folder, "3").name == "000003"
    assert find_checkpoint(folder, str(saved)) == saved
    with pytest.raises(ValueError, match="run already holds a run; choose another run folder, or resume=auto"):
        find_checkpoint(folder, "no")
    with pytest.raises(ValueError, match=r"resume=4: there is no .*000004; .*has the steps \[3, 12\]"):
        find_checkpoint(folder, "4")


def test_source_tidies_up_after_a_kill(a_run, params, moments):
    a_run.save(state(3, params, moments))
    checkpoint.at(a_run.checkpoints, 3).rename(a_run.checkpoints / ".old-000003")
    (a_run.checkpoints / ".part-000004").mkdir()
    assert find_checkpoint(a_run.folder, "auto").name == "000003"
    assert [p.name for p in a_run.checkpoints.iterdir()] == ["000003"]


def test_going_back_drops_what_came_later(a_run, params, moments):
    a_run.leave_out(0, [("held", "why"), ("held", "why again")])  # it would be asked, and its loss taken
    for step in (1, 2, 3):
        report.append(a_run.folder / "metrics.jsonl", {"step": step, "loss": step / 2})
        a_run.leave_out(step, [("r", "why"), ("r", "why")])  # it is shown twice
    assert len((a_run.folder / "skipped.jsonl").read_text().splitlines()) == 7
    for step in (2, 3):
        a_run.save(state(step, params, moments))
    with (a_run.folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2, "los')  # a kill cut it short
    a_run.rewind(2)
    rows = [json.loads(line) for line in (a_run.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    skipped = [json.loads(line) for line in (a_run.folder / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["record"]) for row in skipped] == [(1, "r"), (1, "r"), (2, "r"), (2, "r")]
    assert checkpoint.steps(a_run.checkpoints) == [2]


# Full disks and interrupts. Kills: test_boxes.py, tests/runs and tests/campaigns.


@pytest.mark.parametrize("limit", ["params.safetensors", "optim.safetensors", 700])
def test_a_full_disk_is_an_error_that_leaves_the_old_checkpoint(saved, tmp_path, manifest, moments, tokenizer, limit):
    folder = copy(saved, tmp_path)
    limit = limit if isinstance(limit, int) else (saved / limit).stat().st_size - 1
    with largest_file(limit), pytest.raises(OSError, match=r"MiB free\): .*(large|27)") as caught:
        checkpoint.save(folder, manifest, moments[0], moments, tokenizer.model)
    assert str(caught.value).startswith(f"could not write {folder} (")
    assert [p.name for p in tmp_path.iterdir()] == ["000007"]
    assert checkpoint.fingerprint(folder) == checkpoint.fingerprint(saved)
    checkpoint.verify(folder)


def test_a_folder_that_cannot_be_made_is_an_error_with_its_name(tmp_path, manifest, params, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write .*file/000001"):
        checkpoint.save(tmp_path / "file" / "000001", manifest, params, None, tokenizer.model)


def test_an_interrupt_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(
    saved, tmp_path, monkeypatch, manifest, params, moments, tokenizer
):
    new = replace(manifest, recipe={"new": True})
    again = partial(checkpoint.save, manifest=new, params=params, moments=moments, tokenizer=tokenizer.model)
    copies = interrupted(saved, tmp_path, monkeypatch, again)
    outcomes = [checkpoint.load(folder, moments=True).manifest == new for folder in copies]
    assert len(outcomes) > 12 and outcomes == sorted(outcomes) and {*outcomes} == {False, True}


def test_a_checkpoint_half_removed_is_never_found(saved, tmp_path, monkeypatch):
    folder = copy(saved, tmp_path)

    def half(path, **_):
        next(iter(path.iterdir())).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.remove(folder)
    assert checkpoint.steps(tmp_path) == []
    checkpoint.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Bases.


@pytest.fixture
def based(saved, tmp_path, manifest, params, tokenizer):
    """(base with image tower and decoder, checkpoint of a projector trained on it)."""
    base, own = tmp_path / "base", tmp_path / "own"
    towers = params.exclude("projector")
    checkpoint.save(base, replace(manifest, parts=("vision", "llama")), towers, None, tokenizer.model)
    origin = Base(str(base), checkpoint.fingerprint(base))
    mine = replace(manifest, parts=("projector",), base=origin)
    checkpoint.save(own, mine, params.select("projector"), None, tokenizer.model)
    return base, own


def test_load_model_puts_base_and_projector_together(based, params):
    assert {path[0] for path in tree.paths(checkpoint.load(based[1]).params)} == {"projector"}
    merged = checkpoint.load_model(based[1]).params
    assert set(tree.paths(merged)) == set(tree.paths(params))
    assert all(torch.equal(merged[path], params[path]) for path in tree.paths(params))


def test_load_model_takes_the_trained_part_where_the_base_holds_it_too(based, tmp_path, manifest, params, tokenizer):
    again = spec.init(llava.spec(manifest.model), 5).exclude("vision")
    origin = Base(str(based[1]), checkpoint.fingerprint(based[1]))
    mine = replace(manifest, parts=("projector", "llama"), base=origin)
    checkpoint.save(tmp_path / "stage2", mine, again, None, tokenizer.model)
    merged = checkpoint.load_model(tmp_path / "stage2").params
    assert torch.equal(merged["projector", "w1"], again["projector", "w1"])
    assert torch.equal(merged["llama", "embed"], again["llama", "embed"])
    assert torch.equal(merged["vision", "cls"], params["vision", "cls"])


def test_a_base_that_is_gone_changed_or_damaged_is_refused(based, manifest, params, tokenizer):
    base, own = based
    (base / "params.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="base is damaged: .*params.safetensors"):
        checkpoint.load_model(own)
    checkpoint.save(base, replace(manifest, parts=("vision", "llama")), params.exclude("projector"), None, b"")
    with pytest.raises(ValueError, match="base .*base is not the one that was trained on"):
        checkpoint.load_model(own)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="base .*base is gone; put it back"):
        checkpoint.load_model(own)
    assert {path[0] for path in tree.paths(checkpoint.load(own).params)} == {"projector"}


def test_a_base_that_moved_together_with_the_run_is_found(based, params, tmp_path, capsys):
    base, own = based
    for name in ("copy/base", "copy/runs/decoy/base"):
        shutil.copytree(base, tmp_path / name)
    shutil.copytree(own, tmp_path / "copy/runs/decoy/run/checkpoints/000003")
    (tmp_path / "copy/runs/decoy/base" / checkpoint.SUMS).write_text("of another one\n")
    shutil.rmtree(base)
    moved = tmp_path / "copy/runs/decoy/run/checkpoints/000003"
    assert torch.equal(checkpoint.load_model(moved).params["vision", "cls"], params["vision", "cls"])
    assert f"is now {tmp_path / 'copy/base'}" in capsys.readouterr().err
    opened = checkpoint.open_checkpoint(moved).base
    assert opened is not None and opened.folder == tmp_path / "copy/base"
    with pytest.raises(ValueError, match="base .*base is gone; put it back"):
        checkpoint.load_model(own)  # which stands nowhere near


# What a run starts with.

CPU = torch.device("cpu")
HALF = Zero(dtype=torch.bfloat16, train=("projector",))


def test_start_takes_the_parts_of_the_base_and_random_ones_for_the_rest(based, params, tiny):
    origin = open_origin(None, None, based[0])
    zero = replace(HALF, spec=llava.spec(tiny))
    trainable, frozen = origin.parameters(zero, 3, CPU)
    assert origin.random == ("projector",) and origin.model == tiny and origin.record.path == str(based[0])
    assert {path[0] for path in tree.paths(trainable)} == {"projector"}
    assert trainable["projector", "w1"].dtype == torch.float32
    assert torch.equal(frozen["llama", "embed"], params["llama", "embed"].bfloat16())
    assert torch.equal(trainable["projector", "w1"], spec.init(llava.spec(tiny), 3)["projector", "w1"])


def test_start_has_the_order_of_the_model_whatever_the_base_brings(based, params, tiny):
    zero = Zero(llava.spec(tiny), dtype=torch.bfloat16)
    trainable, _ = open_origin(None, None, based[0]).parameters(zero, 3, CPU)
    assert tree.paths(trainable) == tree.paths(params)


def test_start_never_holds_more_than_is_kept_and_one_leaf(saved, monkeypatch, tiny):
    read, whole = [], boxes.Reader.read

    def seen(*args):
        assert not any(last() is not None for last in read), "an earlier leaf is still there whole"
        x = whole(*args)
        read.append(weakref.ref(x))
        return x

    monkeypatch.setattr(boxes.Reader, "read", seen)
    with trace.world(4, 1, 1) as mesh:
        zero = Zero(llava.spec(tiny), mesh, level=1)
        trainable, _ = open_origin(None, None, saved).parameters(zero, 3, CPU)
    assert len(read) == len(tree.paths(trainable)) > 30


def test_start_refuses_what_does_not_make_a_model(based, emojis, tiny):
    words = emojis / "tokenizer.model"
    for given in ((None, None, None), (tiny, None, None), (None, words, None)):
        with pytest.raises(ValueError, match="give a base, which brings model and tokenizer, or a model and a token"):
            open_origin(*given)
    with pytest.raises(ValueError, match="the tokenizer has 512 pieces, but llama.vocab is only 511"):
        open_origin(replace(tiny, llama=replace(tiny.llama, vocab=511)), words, None).tokenizer()
    zero = replace(HALF, spec=llava.spec(tiny))
    both = replace(zero, train=("projector", "llama"))
    with pytest.raises(ValueError, match="vision, llama is not trained, and no base brings it"):
        open_origin(tiny, words, None).parameters(zero, 0, CPU)
    with pytest.raises(ValueError, match="vision is not trained, and no base"):
        open_origin(tiny, words, None).parameters(both, 0, CPU)


def test_a_run_hashes_no_file_of_tensors_twice(based, monkeypatch, tiny):
    hashed = []

    def seen(path):
        hashed.append(path)
        return digest(path)

    digest = boxes.digest
    for module in (boxes, checkpoint):
        monkeypatch.setattr(module, "digest", seen)
    origin = open_origin(None, None, based[0])
    origin.parameters(replace(HALF, spec=llava.spec(tiny)), 3, CPU)
    origin.whole(based[1], CPU)
    assert sorted(p for p in hashed if p.suffix == ".safetensors") == [f / "params.safetensors" for f in based]
