"""recipes/attribute.py and recipes/score_data.py on a run: against slow computations, on two processes, wrong input."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretraining import run_of, write
from safetensors.torch import load_file
from warm import ENV, recipe

from llava_fn import llava, tree
from llava_fn.batch import collate
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.grad import value_and_grad
from llava_fn.parallel.mesh import Axis
from llava_fn.study import attribution, influence, signals
from llava_fn.study.gradients import Studied
from llava_fn.study.options import Gradients
from llava_fn.study.store import Store
from llava_fn.study.subject import open_run

PROMPT = ["--prompt", "What is this?", "--answer", "hand"]


@pytest.fixture(scope="module")
def folder(launcher, emojis, tiny, tmp_path_factory):
    """A folder with run/, 6 updates on 265 records, one of them bad, with three checkpoints, and the data."""
    folder = tmp_path_factory.mktemp("studied")
    shutil.copytree(emojis, folder / "data")
    few = json.loads((emojis / "train.json").read_text())
    (folder / "data/train.json").write_text(json.dumps([r | {"id": f"{r['id']}-{i}"} for i in range(22) for r in few]))
    c = run_of(folder / "data", folder, tiny, epochs=0.66, samples=32)
    c = replace(c, saving=replace(c.saving, keep=0), heldout=None)
    status, log = launcher.run(folder, "--config", write(folder, c))
    assert status == 0, log
    return folder


@pytest.fixture(scope="module")
def asked(warm, folder):
    """Arguments of recipes/attribute.py -> what it did."""
    image = next((folder / "data/images").iterdir())

    def call(*more):
        argv = ["python", "recipes/attribute.py", "--run", "run", "--image", image, "--out", "why.html", *PROMPT, *more]
        argv[1] = str(Path(__file__).parents[2] / argv[1])
        return warm.run([str(word) for word in argv], folder, ENV)

    return call


def test_a_small_step_against_a_record_moves_the_answer_as_tracin_says(folder, tmp_path, monkeypatch):
    """With a rate of its own for a part of what is trained."""
    monkeypatch.chdir(folder)
    subject = open_run(Path("run"), [4])
    subject = replace(subject, optim=replace(subject.optim, rates=(("projector/.2", 0.3 * subject.optim.lr),)))
    (model,), c = subject.models(torch.device("cpu")), Gradients(("projector",), rank=64)
    model = replace(model, params=tree.cast(model.params, torch.float64))
    samples, _ = subject.samples(range(5))
    numbers, _, g = attribution.gradients(model, samples, c)
    kept, (lr,) = Store(tmp_path / "store", {}, 5, chunk=2), subject.rates
    with kept.open(Axis("dp")):
        kept.fill(lambda chosen: {"gradients": g[chosen.start : chosen.stop]}, Axis("dp"), lambda n, text: None)
    (scores,) = attribution.influences([kept], [g[:1].double()], 1.0, attribution.rates(subject, model, c))
    mine, rest = tree.split(model.params, lambda path: path[0] == "projector")
    fn = lambda p, s: (llava.nll(tree.merge(p, rest), collate([s]), model.config).sum(), None)  # noqa: E731
    for number, score in zip(numbers, scores, strict=True):
        _, step = value_and_grad(fn)(mine, samples[number])
        for name, rate in (("1", lr), ("2", 0.3 * lr)):
            for kind in "wb":
                step["projector", kind + name].mul_(rate)
        moved = [
            float(fn(mine.apply(lambda p, d, e=e: p - e * d, step), samples[numbers[0]])[0]) for e in (-1e-3, 1e-3)
        ]
        assert (moved[0] - moved[1]) / 2e-3 == pytest.approx(float(score), rel=1e-4, abs=1e-9)
    odd = replace(subject, optim=replace(subject.optim, rates=(("projector/b1", 1.0),)))
    with pytest.raises(ValueError, match="gives projector/b1 another learning rate than projector/w1"):
        attribution.rates(odd, model, c)


def test_gauss_newton_solves_with_the_damped_mean_of_outer_products():
    rng = torch.Generator().manual_seed(0)
    g, q = torch.randn(9, 4, generator=rng).double(), torch.randn(2, 4, generator=rng).double()
    h = sum(torch.outer(x, x) for x in g) / 9
    want = torch.stack([torch.linalg.inv(h + 0.3 * h.trace() / 4 * torch.eye(4)) @ a for a in q]) @ g.T
    torch.testing.assert_close(influence.gauss_newton(lambda: g.split(4), q, 0.3).double(), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="8193 numbers are too long .* lower --rank"):
        influence.gauss_newton(lambda: [], torch.zeros(1, 8193), 1.0)


def test_two_processes_fill_the_stores_of_one_and_a_stopped_one_goes_on(folder, asked, warm, monkeypatch):
    done = asked("--store", "one")
    assert done.returncode == 0, done.stderr
    page = (folder / "why.html").read_text()
    assert "Raised its probability" in page and page.count("data:image/jpeg") > 10
    image = next((folder / "data/images").iterdir())
    argv = ["recipes/attribute.py", "--run", "run", "--image", image, "--out", "two.html", *PROMPT, "--store", "two"]
    argv[0] = Path(__file__).parents[2] / argv[0]
    assert warm.statuses(warm.start_ranks(2, lambda _: argv, folder, ENV, lambda r: folder / f"log{r}")) == [0, 0]
    files = sorted(path.relative_to(folder / "one") for path in (folder / "one").rglob("*.safetensors"))
    assert [str(f) for f in files] == [f"00000{step}/00000{i}.safetensors" for step in (2, 4, 6) for i in (0, 1)]
    for file in files:
        one, two = (load_file(folder / store / file) for store in ("one", "two"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (folder / "two.html").read_text() == page
    monkeypatch.chdir(folder)
    (model,) = (subject := open_run(Path("run"), [6])).models(torch.device("cpu"))
    for number in (0, 7):
        _, _, (alone,) = attribution.gradients(model, subject.samples([number])[0], Gradients())
        row = load_file(folder / "one/000006/000000.safetensors")["gradients"][number]
        torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-5)
    (folder / "one" / files[1]).unlink()
    first = (folder / "one" / files[0]).stat().st_mtime_ns
    assert asked("--store", "one").returncode == 0 and (folder / "why.html").read_text() == page
    assert (folder / "one" / files[0]).stat().st_mtime_ns == first


def test_what_a_page_or_a_store_is_not_of_is_refused(folder, asked, monkeypatch):
    def refused(*more):
        done = asked(*more)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert "no checkpoint of step 5; it has 2, 4, 6" in refused("--steps", 5)
    assert "vision/patch: no part of the model" in refused("--gradients.parts", "vision/patch")
    assert asked("--store", "own", "--steps", 6).returncode == 0
    assert "rank: 16 -> 8" in refused("--store", "own", "--steps", 6, "--gradients.rank", 8)
    (folder / "own/000006/000001.safetensors").write_bytes(b"\xff" * 9)
    assert "000001.safetensors" in refused("--store", "own", "--steps", 6)
    shutil.copytree(folder, folder.parent / "moved")
    monkeypatch.chdir(folder.parent / "moved")
    for picture in Path("data/images").iterdir():
        picture.write_bytes(next((folder / "data/images").iterdir()).read_bytes())
    values = json.loads(Path("run/config.json").read_text().replace(str(folder), str(Path.cwd())))
    Path("run/config.json").write_text(json.dumps(values))
    main = recipe("attribute")
    image = next(Path("data/images").iterdir())
    how = {"image": (image,), "prompt": "What?", "answer": "hand", "steps": (6,), "store": Path("two"), "device": "cpu"}
    c = main.Attribute(Path("run"), Path("x.html"), **how)
    with pytest.raises(ValueError, match="has changed since its gradient was taken; delete two/000006"):
        main.main(c)
    records = Path(values["data"]["sources"][0]["records"])
    records.write_text(records.read_text().replace("skin", "sky"))
    with pytest.raises(ValueError, match="some.json: changed since run was trained"):
        open_run(Path("run"))
    records.unlink()
    with pytest.raises(ValueError, match="some.json: no such file"):
        open_run(Path("run"))
    shutil.rmtree("run/checkpoints")
    with pytest.raises(ValueError, match="no run that was trained here"):
        open_run(Path("run"))


def test_scores_are_those_of_each_record_alone(folder, monkeypatch):
    monkeypatch.chdir(folder)
    main = recipe("score_data")
    main.main(main.ScoreData(Path("run"), Path("scores"), parts=("projector", "llama"), device="cpu"))
    rows = list(csv.DictReader(Path("scores.tsv").open(), delimiter="\t"))
    subject = open_run(Path("run"))
    whole = [checkpoint.load_model(Path(f"run/checkpoints/00000{step}")) for step in (2, 4, 6)]
    models, (samples, bad) = [Studied(m.params, m.manifest.model, None) for m in whole], subject.samples(range(265))
    assert len(rows) == 264 and len(bad) == 1 and "Suspicious" in Path("scores.html").read_text()
    tokens = [[llava.nll(m.params, collate([s]), m.config) for m in models] for s in samples[:12]]  # then copies
    top = torch.tensor([[float(x.max()) for x in each] for each in tokens])
    for row in rows[:3] + rows[-3:]:
        losses = tokens[int(row["number"]) % 12]
        assert float(row["loss"]) == pytest.approx(float(losses[-1].mean()), rel=1e-4)
        assert float(row["mean_loss"]) == pytest.approx(sum(float(x.mean()) for x in losses) / 3, rel=1e-4)
        worst = [float(x.max() / m) for x, m in zip(losses, top.median(0).values, strict=True)]
        assert float(row["worst_token"]) == pytest.approx(sum(worst) / 3, rel=1e-4)
    assert [float(row["worst_token"]) for row in rows] == sorted((float(r["worst_token"]) for r in rows), reverse=True)
    (s,) = subject.samples([int(rows[0]["number"])])[0]
    fn = lambda p, b: (llava.nll(p, b, models[-1].config).mean(), None)  # noqa: E731
    _, grads = value_and_grad(fn)(models[-1].params, collate([s]))
    taken, _ = tree.split(grads, lambda path: path[0] in ("projector", "llama"))
    assert float(rows[0]["gradient_norm"]) == pytest.approx(float(tree.global_norm(taken)), rel=1e-4)


def test_forgetting_counts_from_right_to_wrong(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    right = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]]).float()
    kept = Store(tmp_path / "store", {}, 4)
    said = torch.stack([torch.ones(4, 4), torch.ones(4, 4), right], 2)
    with kept.open(Axis("dp")):
        kept.fill(lambda _: {"told": said, "norm": torch.ones(4)}, Axis("dp"), lambda n, text: None)
    rows = signals.signals(open_run(Path("run"), [6]), kept, "forgotten")
    assert [(row.number, row.forgotten, row.learned) for row in rows] == [
        (2, 2, True), (3, 1, True), (0, 0, False), (1, 0, True),
    ]  # fmt: skip
