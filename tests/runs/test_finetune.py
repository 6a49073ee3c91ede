"""recipes/finetune.py as a person runs it: what it leaves behind, kills and resumes, bases, and every wrong input."""

import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretraining import ROOT, figures, rows, same
from warm import Strike, recipe

from llava_fn import config, llava, lora, spec, tree
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.config import Lora
from llava_fn.data import records as data
from llava_fn.data.tokenizer import open_tokenizer
from llava_fn.generate import assistant
from llava_fn.generate.options import ChatOptions
from llava_fn.launch.processes import World
from llava_fn.runs import validation
from llava_fn.runs.options import Heldout, Saving
from llava_fn.weights import model

SCRIPT = ROOT / "recipes" / "finetune.py"
finetune = recipe("finetune")


def talk(name, images, *turns):
    values = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    image = {} if not images else {"image": images[0] if len(images) == 1 else images}
    return {"id": name, **image, "conversations": values}


@pytest.fixture(scope="module")
def based(tiny, tokenizer, emojis, tmp_path_factory):
    """A folder with a base, and records of every kind: some to train on, some held out."""
    folder = tmp_path_factory.mktemp("based")
    params = spec.init(llava.spec(tiny), 9)
    params = tree.rebuild(params, [x + 0.02 for x in tree.values(params)])  # norms and biases away from 1 and 0
    manifest = checkpoint.Manifest(tiny, ("vision", "projector", "llama"), "square", "plain", None)
    checkpoint.save(folder / "base", manifest, params, None, tokenizer.model)
    pictures = [r["image"] for r in json.loads((emojis / "train.json").read_text())]
    kinds = [
        ([pictures[0]], "<image>\nWhat is this?", "hand"),
        ([pictures[1]], "<image>\nWho?", "nose", "And the tone?", "light", "Sure?", "yes"),
        ([], "Which tone is darker?", "dark"),
        ([pictures[2], pictures[3]], "<image> and <image>: same?", "no", "Why?", "ear"),
    ]
    train = [talk(f"t{i}", images, f"{turns[0]} {i}", *turns[1:]) for i in range(3) for images, *turns in kinds]
    heldout = [talk(f"h{i}", images, *turns) for i, (images, *turns) in enumerate(kinds)]
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "heldout.json").write_text(json.dumps(heldout))
    return folder


@pytest.fixture(scope="module")
def small(based, emojis):
    """12 updates of adapters with dropout and of the projector."""
    return finetune.Finetune(
        run_dir=Path("run"),
        base=(based / "base",),
        data=data.Data(
            (data.Source(based / "train.json", emojis),), template="hf", samples=4, epochs=4.0, workers=0, max_tokens=96
        ),
        optim=config.Optim(lr=1e-2, rates=((r"lora/.*/b", 2e-2), ("projector", 1e-3))),
        train=("projector",),
        lora=Lora(rank=2, alpha=4.0, dropout=0.2),
        heldout=Heldout(based / "heldout.json", emojis, interval=3),
        saving=Saving(save_interval=4),
    )


def write(folder: Path, c) -> Path:
    (folder / "my.json").write_text(json.dumps(config.plain(c)))
    return folder / "my.json"


def start(warm, folder: Path, *args: object, strike: Strike | None = None) -> int:
    return warm.start([SCRIPT, *args], folder, dict(os.environ), folder / "log", strike=strike)


def run(warm, folder: Path, *args: object) -> tuple[int, str]:
    status = warm.wait(start(warm, folder, *args))
    return status, (folder / "log").read_text()


@pytest.fixture(scope="module")
def finished(warm, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    status, log = run(warm, folder, "--config", write(folder, small))
    assert status == 0, log
    return folder, log


# What a run leaves behind.


def test_the_log_says_what_is_trained_at_which_rates(finished):
    log = finished[1]
    assert re.search(r"12 records, 12 updates; 0.0 M parameters trained, .* random at the start: none; starts", log)
    assert re.search(
        r"trained:\n  projector +\d+  lr 0.001  weight decay 0\n  lora +\d+  lr 0.01 .*\n  lora .* lr 0.02", log
    )
    assert re.search(r"step 12/12 loss [\d.]+ held-out [\d.]+ ", log)


def test_the_held_out_loss_is_taken_every_interval_and_with_each_checkpoint(finished, small):
    losses = {row["step"]: row["heldout_loss"] for row in rows(finished[0]) if "heldout_loss" in row}
    assert list(losses) == [3, 4, 6, 8, 9, 12] and losses[12] < losses[3]
    state, origin = checkpoint.load_model(finished[0] / "run/checkpoints/000012"), small
    how = data.preparation(open_tokenizer(state.tokenizer), 16, 4, origin.data)
    heldout = data.read(data.Source(small.heldout.records, small.heldout.images))
    held, bad = validation.batches(heldout, how, small.heldout, "error", World())
    assert not bad
    p = lora.attach(state.params, small.lora)
    nll = torch.cat([llava.nll(p, batch, state.manifest.model) for batch in held])
    assert losses[12] == pytest.approx(nll.mean().item(), rel=1e-5)


def test_a_checkpoint_holds_what_is_trained_and_names_its_base(finished, based, tiny):
    own = checkpoint.open_checkpoint(finished[0] / "run/checkpoints/000012")
    assert own.manifest.parts == ("projector", "lora") and own.manifest.base.path == str((based / "base").resolve())
    assert {name.split("/")[0] for name in own.tensors.index["params"]} == {"projector", "lora"}
    adapters = [name for name in own.tensors.index["params"] if name.startswith("lora/")]
    assert len(adapters) == 2 * 7 * tiny.llama.blocks


def test_the_best_checkpoint_stays_beside_the_newest(warm, small, tmp_path):
    (tmp_path / "other.json").write_text(
        json.dumps([talk("other", [], "Which tone is darker?", "what no record says")])
    )
    heldout = replace(small.heldout, records=tmp_path / "other.json")  # the more is learnt, the worse it becomes
    worse = replace(small, saving=Saving(save_interval=1, keep=1), heldout=heldout, optim=config.Optim(lr=0.1))
    status, log = run(warm, tmp_path, "--config", write(tmp_path, worse))
    assert status == 0, log
    losses = {row["step"]: row["heldout_loss"] for row in rows(tmp_path)}
    best = min(losses, key=losses.get)
    assert best != 12 and len(losses) == 12
    kept = sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [best, 12]


def test_every_answer_of_every_kind_of_record_is_on_the_page(finished):
    page = (finished[0] / "run" / "samples.html").read_text()
    for truth in ("hand", "nose", "light", "yes", "dark", "no", "ear"):
        assert f"<td>{truth}<td" in page
    assert "Which tone is darker?" in page and page.count("data:image/png;base64,") == 6  # all but the text alone
    assert re.search(r"of 7 held-out answers are right to the letter; [\d.]+ nats .* [\d.]+ with another", finished[1])


# Kills, processes, kinds of weights.


def same_run(a: Path, b: Path) -> None:
    assert figures(a) == figures(b)
    one, two = (checkpoint.load(checkpoint.at(f / "run" / "checkpoints", 12), moments=True) for f in (a, b))
    same(one.params, two.params)
    same(one.moments[0], two.moments[0])
    same(one.moments[1], two.moments[1])


def test_a_killed_run_with_adapters_and_dropout_goes_on_to_the_bit(warm, finished, small, tmp_path):
    path = write(tmp_path, small)
    for step in (2, 6, 9):
        child = start(warm, tmp_path, "--config", path, strike=(signal.SIGKILL, "run/metrics.jsonl", step))
        assert warm.wait(child) == -signal.SIGKILL
    status, log = run(warm, tmp_path, "--config", path)
    assert status == 0 and "goes on from run/checkpoints/000008" in log, log
    same_run(finished[0], tmp_path)


@pytest.mark.parametrize("how", [(), ("--parallel.zero", 3)], ids=["zero1", "zero3"])
def test_two_processes_train_as_one(warm, finished, small, tmp_path, how):
    argv = [SCRIPT, "--config", write(tmp_path, small), *how]
    ranks = warm.start_ranks(2, lambda rank: argv, tmp_path, dict(os.environ), lambda rank: tmp_path / f"log{rank}")
    assert [warm.wait(rank) for rank in ranks] == [0, 0], (tmp_path / "log0").read_text()
    for a, b in zip(rows(tmp_path), rows(finished[0]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
        assert a.get("heldout_loss", 0) == pytest.approx(b.get("heldout_loss", 0), rel=1e-4)


def test_a_run_answers_unmerged_as_it_does_merged(warm, finished, tmp_path):
    out = tmp_path / "merged"
    argv = [ROOT / "recipes/convert.py", finished[0] / "run", out, "--merge-lora"]
    assert warm.wait(warm.start(argv, tmp_path, dict(os.environ), tmp_path / "log")) == 0, (
        tmp_path / "log"
    ).read_text()
    one, two = (assistant.load(ChatOptions((path,))) for path in (finished[0] / "run", out))
    assert "lora" in one.model.params["llama", "blocks", "0", "wq"].keys()
    ids = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    stream = llava.Batch(("r",), llava.llama.Stream.of([12]), ids[0], torch.zeros(0, 3, 16, 16, dtype=torch.uint8),
                         torch.zeros(0, dtype=torch.int64), torch.arange(1), ids[0, :1], 12)  # fmt: skip
    torch.testing.assert_close(*(llava.forward(a.model.params, stream, a.config) for a in (one, two)))
    assert one.form == two.form and one.form.template == "hf"


@pytest.mark.parametrize("kind", ["int8"])
def test_a_quantised_base_trains_adapters(warm, small, finished, tmp_path, kind):
    status, log = run(warm, tmp_path, "--config", write(tmp_path, replace(small, quantise=kind)))
    assert status == 0, log
    assert rows(tmp_path)[-1]["loss"] == pytest.approx(rows(finished[0])[-1]["loss"], rel=0.1)
    assert rows(tmp_path)[-1]["loss"] != rows(finished[0])[-1]["loss"]


def test_blocks_of_the_tower_are_trained_by_path(warm, small, tmp_path):
    c = replace(small, train=("projector", "vision/blocks/0", "llama/norm"), lora=None, optim=config.Optim(lr=1e-2))
    status, log = run(warm, tmp_path, "--config", write(tmp_path, c))
    assert status == 0, log
    own = checkpoint.load(tmp_path / "run/checkpoints/000012")
    assert {"/".join(path[:3]) for path in tree.paths(own.params) if path[0] != "projector"} == {
        "vision/blocks/0",
        "llama/norm",
    }
    whole = checkpoint.load_model(tmp_path / "run/checkpoints/000012").params
    base = checkpoint.load(small.base[0]).params
    assert torch.equal(whole["vision", "patch"], base["vision", "patch"])
    assert not torch.equal(whole["vision", "blocks", "0", "wq"], base["vision", "blocks", "0", "wq"])


def test_a_share_is_held_out_and_never_trained_on(based, emojis):
    records = data.read(data.Source(based / "train.json", emojis))
    train, heldout = validation.divided([records, records[:4]], Heldout(share=0.25), 7)
    names = [{r.name for r in part} for part in train]
    assert [len(part) for part in train] == [9, 3] and len(heldout) == 4
    assert not names[0] & {r.name for r in heldout[:3]} and not names[1] & {r.name for r in heldout[3:]}
    again = validation.divided([records, records[:4]], Heldout(share=0.25), 7)
    assert [r.name for r in again[1]] == [r.name for r in heldout]


# Bases.


def test_weights_of_a_public_layout_are_converted_once(warm, small, tiny, tokenizer, based, tmp_path):
    hf = model.load(assistant.open_weights([based / "base"]))
    argv = [ROOT / "recipes/convert.py", based / "base", tmp_path / "hf", "--to", "llava-hf"]
    assert warm.wait(warm.start(argv, tmp_path, dict(os.environ), tmp_path / "log")) == 0
    sums = subprocess.run("sha256sum *.safetensors > SHA256SUMS", shell=True, cwd=tmp_path / "hf")  # as some publish it
    assert sums.returncode == 0
    args = ("--config", write(tmp_path, small), "--base", "hf")
    status, log = run(warm, tmp_path, *args, "--data.epochs", "1")
    assert status == 0 and "hf: converted once, to run/base-" in log, log
    (folder,) = (tmp_path / "run").glob("base-*")
    same(checkpoint.load(folder).params, hf)
    status, log = run(warm, tmp_path, *args, "--data.epochs", "1")
    assert status == 0 and "converted" not in log, log


def test_data_of_captions_and_a_missing_projector_are_warned_of(based, emojis, tmp_path):
    caption = [talk(f"c{i}", ["x.png"], "<image>\nWhat is this?", f"name {i}") for i in range(60)]
    (tmp_path / "c.json").write_text(json.dumps(caption))
    captions, talks = (data.read(data.Source(p, emojis)) for p in (tmp_path / "c.json", based / "train.json"))
    assert "60 records ask 1 different questions, once each, as captions do" in validation.doubts([captions], ())
    assert validation.doubts([talks, captions], ()) == ""
    assert "warning: the base brings no projector; it begins with random" in validation.doubts([talks], ("projector",))


# Wrong input: one message, no traceback, exit status not 0.

WRONG = [
    (["--quantise", "int8", "--train", "llama"], "quantise=int8 is of frozen weights, and train names"),
    (
        ["--train", "projektor"],
        "error: train names projektor, which the model lacks; it has vision, projector, llama, lora",
    ),
    (["--lora.rank", "0"], "lora.rank=0; it must be at least 1"),
    (["--lora.alpha", "-1"], "lora.alpha=-1.0; it must be above 0"),
    (
        ["--lora.dropout", "0", "--lora.targets", "llama/heads"],
        "'llama/heads' matches no linear layer; they are vision/blo",
    ),
    (["--optim.rates", "projektor", "1e-3"], "error: optim.rates: 'projektor' matches nothing that is trained"),
    (["--quantise", "nf4"], "blocks of 64 do not divide; use int8"),
    (["--base", "none"], "error: none: no such file or folder"),
    (["--heldout.share", "0.5"], "heldout.records and heldout.share are two ways to"),
    (["--source", "only-one"], "--source takes FILE IMAGES .WEIGHT."),
    (["--source", "a.json", ".", "often"], "could not convert string to float: 'often'"),
    (["--config", "emoji"], "error: there is no runs/emoji to go on from; `python recipes/pretrain.py` makes it"),
]


@pytest.mark.parametrize("args, said", WRONG, ids=lambda x: str(x)[:40])
def test_wrong_input_ends_with_a_message_and_without_a_traceback(warm, small, tmp_path, args, said):
    first = [] if "--config" in args else ["--config", write(tmp_path, small)]
    status, log = run(warm, tmp_path, *first, *args)
    assert status not in (0, -signal.SIGKILL) and "Traceback" not in log, log
    assert re.search(said, log), log


def test_a_held_out_record_that_is_trained_on_is_named(warm, small, based, emojis, tmp_path):
    both = [*json.loads((based / "heldout.json").read_text()), json.loads((based / "train.json").read_text())[2]]
    (tmp_path / "held.json").write_text(json.dumps(both))
    c = replace(small, heldout=Heldout(tmp_path / "held.json", emojis))
    status, log = run(warm, tmp_path, "--config", write(tmp_path, c))
    assert status == 1 and "1 records are trained on and held out" in log
    assert "train.json[2] id t0 is held.json[4] id t0" in log


def test_a_run_goes_on_from_no_adapters(warm, small, finished, tmp_path):
    c = replace(small, base=(finished[0] / "run",))
    status, log = run(warm, tmp_path, "--config", write(tmp_path, c))
    assert status == 1 and re.search(
        r"error: .*000012 holds adapters; `recipes/convert.py .* OUT --merge-lora` makes", log
    )


def test_the_sources_of_a_command_line_take_the_place_of_the_config(warm, small, based, emojis, tmp_path):
    other = tmp_path / "other.json"
    other.write_text((based / "train.json").read_text().replace('"t', '"u'))
    args = ["--source", based / "train.json", emojis, "0.5", "--source", other, emojis, "--data.epochs", "1"]
    status, log = run(warm, tmp_path, "--config", write(tmp_path, small), *args)
    assert status == 0 and "24 records, 5 updates" in log, log
    saved = json.loads((tmp_path / "run/config.json").read_text())["data"]["sources"]
    assert [(Path(s["records"]).name, s["weight"]) for s in saved] == [("train.json", 0.5), ("other.json", 1.0)]
