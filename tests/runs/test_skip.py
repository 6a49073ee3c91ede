"""on_bad_record=skip: bad updates, resumes, several processes, held-out records, and nothing but bad records."""

import json
from dataclasses import replace

import pytest
from pretraining import figures, rows, run_of, write
from warm import recipe

from llava_fn import config, llava, spec
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.config import Parallel
from llava_fn.data.options import Data, Source
from llava_fn.runs import run as runs
from llava_fn.runs.options import Heldout, Saving
from llava_fn.runs.progress import Progress
from llava_fn.train import Metrics

MODEL = config.Llava(
    config.Vision(image=16, patch=8, width=16, blocks=3, heads=2, ffn=32),
    config.Llama(vocab=512, width=16, blocks=2, heads=4, kv_heads=2, ffn=32),
)
GONE = {"image": "images/gone.png"}  # only the process that decodes it sees that it is bad
MUTE = {"conversations": [{"from": "human", "value": "<image>\nWhat is this?"}]}  # every process sees it
SPOILT = (GONE, MUTE, {}, GONE, MUTE, MUTE, {}, GONE, {})


def spoil(path, target):
    """Write the records of a file to another one, of which three of nine stay usable."""
    records = json.loads(path.read_text())
    bad = [r | SPOILT[i % 9] | {"id": f"r{i}"} for i, r in enumerate(records)]
    target.write_text(json.dumps(bad))
    return target


@pytest.fixture(scope="module")
def small(emojis, tmp_path_factory):
    """Updates of one record, of which two of three are bad; of the three held-out records one is usable."""
    folder = tmp_path_factory.mktemp("spoilt")
    c = run_of(emojis, folder, MODEL, samples=1, epochs=1.0)
    train, heldout = (spoil(emojis / f"{x}.json", folder / f"{x}.json") for x in ("train", "heldout"))
    return replace(
        c, data=replace(c.data, sources=(Source(train, emojis),)), heldout=Source(heldout, emojis),
        saving=replace(c.saving, keep=0, save_interval=3), optim=replace(c.optim, eps=1e-3),
    )  # fmt: skip


def listed(folder):
    return [(row["step"], row["record"].rpartition(" ")[2]) for row in rows(folder, "skipped.jsonl")]


@pytest.fixture(scope="module")
def alone(launcher, small, tmp_path_factory):
    """Sizes of updates -> a run that nothing disturbed."""
    done = {}

    def get(**fields):
        key = str(fields)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("alone")
            status, log = launcher.run(done[key], "--config", write(done[key], sized(small, **fields)))
            assert status == 0, log
        return done[key]

    return get


def sized(c, **fields):
    return replace(c, data=replace(c.data, **fields))


@pytest.mark.parametrize("fields", [{"samples": 1}, {"samples": 3, "accumulate": 2}, {"tokens": 40, "epochs": 2.0}])
def test_updates_of_bad_records_are_left_out_and_listed_once_and_resuming_is_exact(launcher, small, alone, fields):
    folder = alone(**fields)
    before, skipped = figures(folder), listed(folder)
    assert [row["step"] for row in before] == list(range(1, len(before) + 1))
    assert {row["samples"] == 0 for row in before if "loss" not in row} <= {True}
    epochs = int(fields.get("epochs", 1))
    assert sum(row["samples"] for row in before) == epochs * 4
    assert sorted(name for step, name in skipped if step) == sorted(
        epochs * [f"r{i}" for i in (0, 1, 3, 4, 5, 7, 9, 10)]
    )
    assert [name for step, name in skipped if not step] == ["r0", "r1"]
    assert "1 held-out captions" in (folder / "log").read_text()
    steps = checkpoint.steps(folder / "run/checkpoints")
    last = folder / "run/checkpoints" / f"{steps[-1]:06d}"
    print_of = checkpoint.fingerprint(last)
    status, log = launcher.run(folder, "--config", folder / "my.json", "--saving.resume", str(steps[0]))
    assert status == 0 and "goes on from" in log, log
    assert (figures(folder), checkpoint.fingerprint(last)) == (before, print_of)
    assert sorted(listed(folder)) == sorted(skipped)


def test_an_update_of_one_bad_record_changes_no_weight(alone):
    folder = alone(samples=1)
    empty = {row["step"] for row in figures(folder) if "loss" not in row}
    assert empty == {step for step, _ in listed(folder) if step} and len(empty) == 8
    assert checkpoint.steps(folder / "run/checkpoints")[0] >= min(set(range(1, 13)) - empty)


@pytest.mark.parametrize(
    "samples, parallel",
    [(2, Parallel(zero=1)), (1, Parallel(tp=2, zero=0, check_interval=2)), (2, Parallel(zero=3))],
    ids=["dp2 zero1", "tp2", "dp2 zero3"],
)
def test_two_processes_leave_out_and_list_what_one_does(launcher, small, alone, tmp_path, samples, parallel):
    one = alone(samples=samples)
    c = replace(sized(small, samples=samples), parallel=parallel)
    children = launcher.start_ranks(tmp_path, 2, "--config", write(tmp_path, c))
    assert [launcher.wait(child) for child in children] == [0, 0], (tmp_path / "log0").read_text()
    assert sorted(listed(tmp_path)) == sorted(listed(one))
    assert any("loss" not in row for row in figures(one))
    for a, b in zip(figures(tmp_path), figures(one), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_a_data_set_of_bad_records_alone_ends_with_an_error_and_a_list(launcher, small, tmp_path, world):
    source = replace(small.data.sources[0], images=tmp_path)
    c = sized(replace(small, heldout=None), sources=(source,), samples=2, epochs=0.7)
    children = launcher.start_ranks(tmp_path, world, "--config", write(tmp_path, c))
    assert [launcher.wait(child) for child in children] == [1] * world
    assert len(listed(tmp_path)) == 10 and not checkpoint.steps(tmp_path / "run/checkpoints")
    for rank in range(world):
        log = (tmp_path / f"log{rank}").read_text()
        assert "update 5: none of the last 10 records could be used; run/skipped.jsonl lists them. Mend" in log
        assert "Traceback" not in log


def test_a_run_ends_after_so_many_bad_records_in_a_row(tmp_path):
    loop = runs.Loop(Fake(tmp_path), Progress(0, 10**6), 1, 0, None)
    none, some = Metrics(float("nan"), float("nan"), 0.1, 0, 0, 0), Metrics(1.0, 1.0, 0.1, 9, 5, 1)
    bad = [("r", "r: why")] * (runs.HOPELESS // 2)
    for metrics in (none, some, none):
        loop._judge(metrics, bad)
    with pytest.raises(ValueError, match=f"none of the last {runs.HOPELESS} records could be used(.|\n)*r: why"):
        loop._judge(none, bad)
    assert loop._figures(none, 1.0, 2.0, 0.5).startswith("left out, no usable record 0 tokens/s")


class Fake:
    def __init__(self, folder):
        self.folder = folder


@pytest.fixture(scope="module")
def tuned(emojis, small, tokenizer, tmp_path_factory):
    """A run of the second stage, whose held-out records are spoilt in the same way."""
    folder = tmp_path_factory.mktemp("based")
    manifest = checkpoint.Manifest(MODEL, ("vision", "projector", "llama"), "square", "plain", None)
    checkpoint.save(folder / "base", manifest, spec.init(llava.spec(MODEL), 9), None, tokenizer.model)
    heldout = spoil(emojis / "train.json", folder / "heldout.json")
    heldout.write_text(heldout.read_text().replace("What is this?", "Who is it?"))
    return recipe("finetune").Finetune(
        run_dir=small.run_dir, base=(folder / "base",), optim=small.optim, train=("projector",),
        data=Data(small.data.sources, template="hf", samples=4, workers=0, max_tokens=96, on_bad_record="skip"),
        heldout=Heldout(heldout, emojis, interval=2, most=4, answers=7), saving=Saving(save_interval=2),
    )  # fmt: skip


@pytest.mark.parametrize("world", [1, 2])
def test_held_out_records_are_left_out_of_loss_and_answers_and_listed_once(warm, tuned, tmp_path, world):
    script = recipe("finetune").__file__
    argv = [script, "--config", write(tmp_path, tuned)]
    assert (
        warm.statuses(warm.start_ranks(world, lambda rank: argv, tmp_path, {}, lambda r: tmp_path / f"log{r}"))
        == [0] * world
    ), (tmp_path / "log0").read_text()
    held = [name for step, name in listed(tmp_path) if not step]
    assert sorted(held) == sorted(set(held)) and len(held) > 2
