"""recipes/evaluate.py on tiny TSVs of all four kinds: alone, on several processes, stopped and resumed, refused."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tsvs
import tyro
from warm import ENV, ROOT, recipe, until

from llava_fn.checkpoint import folder as checkpoint
from llava_fn.evaluate import folder, prompts, run, task, tsv
from llava_fn.evaluate.folder import Settings
from llava_fn.evaluate.options import Rules
from llava_fn.evaluate.records import Prediction
from llava_fn.generate import assistant, conversation, options
from llava_fn.generate.options import Decoding
from llava_fn.launch import cli

evaluate = recipe("evaluate")
FINAL = (".xlsx", "_acc.csv", "_summary.json")
NAMES = {"choice": "AI2D_TEST", "chartqa": "ChartQA_TEST", "docvqa": "DocVQA_VAL", "mmmu": "MMMU_DEV_VAL"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The four TSVs, seven rows each."""
    at = tmp_path_factory.mktemp("tsvs")
    return {kind: make(at) for kind, make in tsvs.ALL.items()}


@pytest.fixture
def config(weights, files, tmp_path):
    """All four files, batches of three."""
    model = options.ModelOptions((weights / "vicuna_v1",), device="cpu")
    return evaluate.Evaluate(model, tuple(files.values()), tmp_path / "out", "m", tokens=5, batch=3, workers=1)


def only(c, kind):
    return replace(c, data=tuple(p for p in c.data if p.stem == NAMES[kind]))


def final(c):
    """The files of results that must be the same whatever happened on the way."""
    return {p.name: p.read_bytes() for p in sorted(c.out.iterdir()) if p.name.endswith(FINAL)}


def timeless(c):
    """The reports without what they say of the time that answers took."""
    pages = {p.name: p.read_text() for p in sorted(c.out.glob("*.html"))}
    histogram = r'<section class="card histogram"[^>]*>\s*<h2[^>]*>Time of answers.*?</section>'
    times = re.compile(rf'"seconds":[^,}}]+|{histogram}', re.DOTALL)
    return {name: times.sub("", text) for name, text in pages.items()}


def lines(c, kind="choice"):
    """Every line of answers to a file."""
    paths = sorted((c.out / f"m_{NAMES[kind]}" / "predictions").iterdir())
    return [json.loads(line) for p in paths for line in p.read_text().splitlines()]


def arguments(c):
    """The command line of a config."""
    out = ["--weights", *c.model.weights, "--device", "cpu", "--data", *c.data, "--out", c.out, "--name", c.name]
    out += ["--tokens", c.tokens, "--batch", c.batch, "--workers", c.workers, "--template", c.template]
    return [str(x) for x in out + ["--fresh"] * c.fresh]


@pytest.fixture
def ranks(warm, tmp_path):
    """Starts the recipe on several processes, whose output goes to tmp_path/log."""

    def start(c, world):
        argv = [ROOT / "recipes/evaluate.py", *arguments(c)]
        return warm.start_ranks(world, lambda _: argv, tmp_path, ENV, lambda _: tmp_path / "log")

    return start


@pytest.fixture(scope="module")
def whole(weights, files, tmp_path_factory):
    """The results of one process, one question at a time, that nothing interrupts."""
    model = options.ModelOptions((weights / "vicuna_v1",), device="cpu")
    out = tmp_path_factory.mktemp("whole")
    c = evaluate.Evaluate(model, tuple(files.values()), out, "m", tokens=5, batch=1, workers=1)
    evaluate.main(c)
    return c


def test_answers_are_those_of_each_question_alone(whole, weights, files):
    a = assistant.load(options.ChatOptions(whole.model.weights, device="cpu", template="llava_v1", image_mode="pad"))
    different = set()
    for kind, path in files.items():
        table = tsv.open_table(path)
        for q, line in zip(table.questions, sorted(lines(whole, kind), key=lambda x: int(x["i"])), strict=True):
            s = prompts.style("vlmevalkit", a.form)
            cut = prompts.parts(s, prompts.question_text(q, kind), len(table.pictures[q.index]))
            ids = run.text.pieces(cut, a.tokenizer)
            pictures = [conversation.picture(x, a) for x in table.images(q)]
            d = Decoding(5)
            asked = conversation.prompt_of(a, ids, pictures, conversation.features(a, pictures, {}), d)[0]
            ((want,),) = conversation.answers_to(a, [asked], d)
            assert (line["i"], line["p"], line["n"]) == (q.index, want.text.strip(), len(want.ids))
            assert line["st"] == "ok" and line["err"] == "" and line["t"] > 0
            different.add(line["p"])
    assert len(different) > 10


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_ends_with_the_same_files(world, config, whole, ranks, warm, tmp_path):
    statuses, said = warm.statuses(ranks(config, world)), (tmp_path / "log").read_text()
    assert statuses == [0] * world, said
    assert final(config) == final(whole) and len(final(config)) == 12
    assert said.count("MMMU_DEV_VAL: ") == 1 and said.count("is not the file that VLMEvalKit publishes") == 4
    for kind in NAMES:
        said = lines(config, kind)
        assert len(said) == tsvs.ROWS == len({x["i"] for x in said})
        counts = [p.read_text().count("\n") for p in (config.out / f"m_{NAMES[kind]}/predictions").iterdir()]
        assert max(counts) <= -(-tsvs.ROWS // world)


def kill(pids, warm, c, after):
    """Kill every process of a run once there are some answers."""
    at = c.out / f"m_{NAMES['choice']}"
    assert until(lambda: folder.count(at) >= after, *pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert -signal.SIGKILL in warm.statuses(pids)


def test_a_killed_run_goes_on_with_other_processes_and_ends_with_the_same_files(config, ranks, warm, tmp_path):
    long = replace(config, data=(tsvs.ai2d(tmp_path, 13),), tokens=15, batch=1)
    other = replace(long, out=tmp_path / "whole")
    evaluate.main(other)
    at = long.out / f"m_{NAMES['choice']}"
    kill(ranks(long, 3), warm, long, 2)
    first = {x["i"]: x for x in lines(long) if x["st"] == "ok"}
    assert 2 <= len(first) < 13 and not final(long)
    torn = next(p for p in sorted((at / "predictions").iterdir()) if p.stat().st_size)
    torn.write_bytes(torn.read_bytes() + b'{"i": "0", "h": "x')
    kill(ranks(long, 1), warm, long, len(first) + 2)
    had = folder.count(at)
    assert len(first) + 2 <= had < 13
    assert warm.statuses(ranks(long, 3)) == [0, 0, 0], (tmp_path / "log").read_text()
    assert final(long) == final(other) and len(final(long)) == 3
    assert timeless(long) == timeless(other) and len(timeless(long)) == 1
    assert folder.count(at) == 13  # nothing was answered twice
    assert torn.read_bytes().endswith(b'{"i": "0", "h": "x')


def test_nothing_is_asked_twice_and_a_changed_row_is_asked_again(config, monkeypatch, capsys):
    c = replace(config, data=(tsvs.chartqa(config.out.parent),))
    asked, made = [], []
    answers, text = conversation.answers_to, prompts.question_text
    monkeypatch.setattr(prompts, "question_text", lambda q, kind: made.append(q.index) or text(q, kind))
    monkeypatch.setattr(conversation, "answers_to", lambda a, p, d: asked.append(len(p)) or answers(a, p, d))
    evaluate.main(c)
    before = final(c)
    evaluate.main(c)
    assert asked == [3, 3, 1] and final(c) == before
    assert sorted(made) == sorted(2 * [str(j) for j in range(7)])  # each prompt once a run
    path = c.data[0]
    path.write_bytes(path.read_bytes().replace(b"How many in 2003?", b"How many in 3003?"))
    evaluate.main(c)
    assert asked == [3, 3, 1, 1] and "rows that are not as they were are asked again" in capsys.readouterr().err
    assert [x["i"] for x in lines(c, "chartqa")][-1] == "3" and final(c).keys() == before.keys()
    fresh = replace(c, out=c.out.with_name("fresh"))
    evaluate.main(fresh)
    assert final(fresh) == final(c)


@pytest.mark.parametrize("change, said", [
    ({"tokens": 6}, "decoding.tokens: 5 -> 6"),
    ({"template": "llava"}, "style.name: vlmevalkit -> llava"),
    ({"context": 2048}, "context: 4096 -> 2048"),
    ({"dtype": "float16"}, "dtype: float32 -> float16"),
    ({"weights": "plain"}, "weights: [0-9a-f]{64} -> [0-9a-f]{64}"),
    ({"template": "own"}, "style.form.template: llava_v1 -> vicuna_v1"),
])  # fmt: skip
def test_answers_with_other_settings_are_refused_and_named(change, said, config, weights):
    c = only(config, "docvqa")
    c.out.mkdir()
    task.begin(c, task.read_tables(c), settings(c))
    model = {k: v for k, v in change.items() if k in ("context", "dtype")}
    if "weights" in change:
        model = {"weights": (weights / change["weights"],)}
    other = replace(c, model=replace(c.model, **model), **{k: v for k, v in change.items() if k not in model})
    with pytest.raises(ValueError, match=f"holds answers with other settings .*{said}.*--fresh moves them aside"):
        evaluate.main(other)


def settings(c):
    source = assistant.open_weights(c.model.weights)
    return task.settings(c, source, folder.fingerprint(c.model.weights))


def test_fresh_moves_an_earlier_run_and_its_results_aside(config, capsys):
    c = only(config, "choice")
    evaluate.main(c)
    evaluate.main(replace(c, compare="m"))  # with itself
    before, said = final(c), lines(c)
    before |= {p.name: p.read_bytes() for p in c.out.glob("*.html")}
    assert len(before) == 5
    other = replace(c, tokens=2, fresh=True)
    for n in (1, 2):
        evaluate.main(other)
        assert f"the earlier run is now {c.out / f'm_AI2D_TEST.{n}'}" in capsys.readouterr().err
    aside = c.out / "m_AI2D_TEST.1"
    assert {p.name: p.read_bytes() for p in aside.iterdir() if p.name in before} == before
    assert [json.loads(x) for p in (aside / "predictions").iterdir() for x in p.read_text().splitlines()] == said
    assert len(lines(other)) == tsvs.ROWS and lines(other) != said
    assert sorted(p.name for p in c.out.iterdir() if p.is_dir()) == ["m_AI2D_TEST", "m_AI2D_TEST.1", "m_AI2D_TEST.2"]
    shutil.rmtree(c.out / "m_AI2D_TEST")
    before = final(other)
    evaluate.main(other)  # the results that are left without their folder
    assert {p.name: p.read_bytes() for p in (c.out / "m_AI2D_TEST.3").iterdir() if p.name in before} == before


def test_a_run_that_goes_on_tells_what_has_changed_and_keeps_what_began_it(whole, tmp_path):
    first = folder.Provenance(settings(whole), {"sha256": "a"}, {"torch": "1"})
    assert folder.begin(tmp_path / "run", first) == folder.begin(tmp_path / "run", first) == []
    now = replace(first, data={"sha256": "b"}, versions={"torch": "2"})
    data, versions = folder.begin(tmp_path / "run", now)
    assert "the TSV has changed since" in data and "other versions (torch: 1 -> 2)" in versions
    assert folder.read_provenance(tmp_path / "run") == replace(now, versions={"torch": "1"})


def test_a_folder_that_is_no_run_is_refused(config):
    c = only(config, "choice")
    (c.out / "m_AI2D_TEST").mkdir(parents=True)
    (c.out / "m_AI2D_TEST/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="m_AI2D_TEST is not empty and holds no run.json; --fresh moves it aside"):
        evaluate.main(c)


def test_an_error_lists_the_first_rows_that_fail_and_counts_the_others(config, tmp_path):
    path = tsvs.chartqa(tmp_path, 23)
    c = replace(config, data=(path,), model=replace(config.model, context=9), batch=50)
    with pytest.raises(ValueError, match="23 rows have no answer and count as wrong:\n  ChartQA_TEST index 0: ") as e:
        evaluate.main(c)
    said = str(e.value).splitlines()
    assert len(said) == 22 and "index 19: " in said[-2] and said[-1] == "  and 3 more; the spreadsheets name them all"


def test_the_exit_status_says_whether_all_rows_have_an_answer(config, tmp_path, capsys, monkeypatch):
    def status(c):
        try:
            cli.run(evaluate.interruptible, c)
        except SystemExit as end:
            return end.code
        return 0

    good, bad = only(config, "docvqa"), replace(only(config, "chartqa"), model=replace(config.model, context=9))
    assert status(good) == 0 and status(replace(good, score_only=True, compare="m")) == 0
    (path,) = (good.out / "m_DocVQA_VAL/predictions").iterdir()
    path.write_text("".join(json.dumps(x | {"p": ""}) + "\n" for x in lines(good, "docvqa")))
    assert status(replace(good, score_only=True)) == 0  # to say nothing is an answer
    assert status(bad).startswith("error: 7 rows have no answer") and (bad.out / "m_ChartQA_TEST_acc.csv").exists()
    assert status(replace(bad, score_only=True)).startswith("error: 7 rows have no answer")
    both = replace(bad, out=tmp_path / "both", data=bad.data + good.data)  # the second file is written all the same
    assert status(both).startswith("error: 14 rows have no answer") and len(final(both)) == 6

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "answer", interrupted)
    assert status(replace(good, out=tmp_path / "other")) == 130
    assert "keeps every answer, and the same command goes on" in capsys.readouterr().err


def spoilt(path):
    """A copy of the AI2D file in which the images of rows 2 and 3 are none."""
    text = path.read_text()
    bad = tsvs.base64.b64encode(b"not an image at all" * 5).decode()
    return text.replace(tsvs.b64(1), bad)


def test_a_row_that_fails_is_recorded_and_tried_again(config, files, tmp_path):
    path = tmp_path / "AI2D_TEST.tsv"
    path.write_text(spoilt(files["choice"]))
    c = replace(config, data=(path,))
    said = "2 rows have no answer and count as wrong:\n  AI2D_TEST index 100: image 1: not one of JPEG"
    for n in (1, 2):
        with pytest.raises(ValueError, match=said):
            evaluate.main(c)
        errors = [x for x in lines(c) if x["st"] == "error"]
        assert sorted(x["i"] for x in errors) == sorted(["100", "101"] * n) and errors[0]["p"] == "" and final(c)
        assert len(lines(c)) == 7 + 2 * (n - 1)
    with pytest.raises(ValueError, match=said):
        evaluate.main(replace(c, score_only=True))
    path.write_bytes(files["choice"].read_bytes())
    evaluate.main(c)
    assert len(lines(c)) == 11


def test_a_prompt_over_the_context_fails_with_its_numbers_and_is_never_cut(config, tmp_path, monkeypatch):
    rows = [
        {"index": j, "question": "Which?", "A": "x", "B": "y", "answer": "A", "l2-category": "s", "category": "c",
         "split": "dev", "image": str([tsvs.b64(k) for k in range(n)])}
        for j, n in enumerate((1, 7, 2, 5))
    ]  # fmt: skip
    c = replace(config, data=(tsvs.write(tmp_path / "MMMU_DEV_VAL.tsv", rows),), tokens=20)
    table = tsv.open_table(c.data[0])
    a = assistant.load(options.ChatOptions(c.model.weights, device="cpu"))
    sizes = [x.size for x in run.queries(table, settings(c), run.parts(table, settings(c)), a.tokenizer, 4)]
    assert sizes == sorted(sizes)[:1] + sizes[1:] and sizes[1] == sizes[0] + 6 * (4 + (sizes[2] - sizes[0] - 4))
    evaluate.main(replace(c, out=tmp_path / "roomy"))
    roomy = {x["i"]: x["p"] for x in lines(replace(c, out=tmp_path / "roomy"), "mmmu")}
    c = replace(c, model=replace(c.model, context=sizes[1]))
    with pytest.raises(ValueError, match=f"index 1: the prompt has {sizes[1]} tokens, 28 of them for 7 images, "
                       f"which leaves no room for an answer in the context of {sizes[1]}"):  # fmt: skip
        evaluate.main(c)
    said = {x["i"]: x for x in lines(c, "mmmu")}
    left = sizes[1] - sizes[3]
    assert 0 < left < 20 and sizes[0] < sizes[2] <= sizes[1] - 20
    for i in "023":
        if said[i]["st"] == "ok":
            assert said[i]["p"] == roomy[i]
        else:
            assert "has not ended in the" in said[i]["err"] and said[i]["p"] == ""
    answers = conversation.answers_to
    ended = lambda *x: [[replace(t, ended=True) for t in row] for row in answers(*x)]  # noqa: E731
    monkeypatch.setattr(conversation, "answers_to", ended)
    with pytest.raises(ValueError, match="^1 rows have no answer"):  # those that end in the room that is left are kept
        evaluate.main(replace(c, out=tmp_path / "ended"))


def test_batches_hold_what_is_alike_and_everything_once(whole):
    table = tsv.open_table(whole.data[0])
    a = assistant.load(options.ChatOptions(whole.model.weights, device="cpu"))
    s = settings(whole)
    asked = run.queries(table, s, run.parts(table, s), a.tokenizer, 4)
    for world in (1, 2, 3, 4, 9):
        for batch in (1, 2, 3, 50):
            cut = run.batches(asked, s, batch, world)
            assert sorted(x.question.row for b in cut for x in b) == list(range(7))
            shares = [sum(map(len, cut[r::world])) for r in range(world)]
            assert max(shares) - min(shares) <= -(-7 // world) and max(map(len, cut)) <= batch
            assert len(cut) <= max(min(world, 7), -(-7 // batch))
            images = [x.question.images for b in cut for x in b]
            assert sum(x != y for x, y in zip(images, images[1:], strict=False)) == len(set(images)) - 1
    names = ("b9", "a1", "c5", "a6", "d7", "e2", "a3")  # images and tokens
    both = zip(asked, names, strict=True)
    varied = [replace(x, question=replace(x.question, images=n[0]), size=int(n[1])) for x, n in both]
    cut = run.batches(varied, s, 2, 1)
    order = [f"{x.question.images}{x.size}" for b in cut for x in b]
    assert order == ["e2", "c5", "a1", "a3", "a6", "d7", "b9"]  # by length, with what shares an image
    tight = replace(s, context=sorted(x.size for x in asked)[3] + 5)
    cut, n = run.batches(asked, tight, 3, 1), sum(x.size + 5 > tight.context for x in asked)
    assert 2 <= n <= 3 and all(len(b) == 1 and b[0].size + 5 > tight.context for b in cut[-n:])
    assert sum(map(len, cut[:-n])) == 7 - n and all(x.size + 5 <= tight.context for b in cut[:-n] for x in b)


def test_an_image_is_seen_once_by_the_tower(config, monkeypatch):
    c, seen = only(config, "docvqa"), []
    features = run.conversation.decode.features
    monkeypatch.setattr(run.conversation.decode, "features", lambda m, x: seen.append(len(x)) or features(m, x))
    picture, opened = conversation.picture, []
    monkeypatch.setattr(conversation, "picture", lambda *x: opened.append(x[2]) or picture(*x))
    evaluate.main(replace(c, batch=2))
    assert sum(seen) == 3 and len(opened) == 5  # opened once a batch, of four


def test_no_more_is_made_ready_than_is_soon_wanted(whole):
    table = tsv.open_table(whole.data[0])
    a = assistant.load(options.ChatOptions(whole.model.weights, device="cpu"))
    asked = run.queries(table, settings(whole), run.parts(table, settings(whole)), a.tokenizer, 4)
    taken = []
    ready = run.ahead(table, a, (taken.append(x) or [x] for x in asked), 1)
    assert next(ready).queries == (asked[0],) and taken == asked[:3]
    assert [x.queries[0] for x in ready] == asked[1:] == taken[1:]


def test_limits_and_indices_make_partial_results_and_a_whole_run_goes_on_from_them(config, whole, capsys):
    c = only(config, "choice")
    evaluate.main(replace(c, limit=2))
    assert sorted(x["i"] for x in lines(c)) == ["0", "1"]
    evaluate.main(replace(c, indices=("300", "1")))
    assert sorted(x["i"] for x in lines(c)) == ["0", "1", "300"] and len(final(c)) == 2
    assert not final(c).items() & final(whole).items()
    capsys.readouterr()
    evaluate.main(c)
    assert len(lines(c)) == 7 and final(c).items() <= final(whole).items() and len(final(c)) == 3
    assert "step 6/7 AI2D_TEST" in (said := capsys.readouterr().err) and "step 7/7 AI2D_TEST" in said
    evaluate.main(replace(c, limit=7))  # which is all
    assert final(c).items() <= final(whole).items() and len(final(c)) == 3
    with pytest.raises(ValueError, match="has no index nope"):
        evaluate.main(replace(c, indices=("nope",)))


def test_scores_alone_need_no_weights_and_every_answer(config, whole, monkeypatch):
    c = only(config, "choice")
    evaluate.main(replace(c, limit=3))
    monkeypatch.setattr(assistant, "open_weights", None)
    alone = replace(c, score_only=True, model=options.ModelOptions((Path("gone/away"),), device="cpu"))
    with pytest.raises(ValueError, match=r"4 of 7 rows of the TSV have no answer yet \(index 101, 200, 201, 300\)"):
        evaluate.main(alone)
    evaluate.main(replace(alone, allow_partial=True))
    assert not final(c).items() & final(whole).items()
    monkeypatch.undo()
    evaluate.main(c)
    for path in c.out.glob("m_*.*"):
        path.unlink()
    evaluate.main(alone)
    assert final(c).items() <= final(whole).items() and len(final(c)) == 3
    with pytest.raises(ValueError, match="run.json: no such file"):
        evaluate.main(replace(alone, name="other"))


def test_dry_run_shows_prompts_and_tokens_and_writes_nothing(config, capsys):
    evaluate.main(replace(config, dry_run=True, limit=2))
    said = capsys.readouterr().out
    assert 'USER:  <image> What is "A"?\nA. None' in said and "ASSISTANT: |" in said
    assert said.count("--- index") == 8 and "2 images of 4" in said and "over the context of 4096: none" in said
    evaluate.main(replace(only(config, "choice"), dry_run=True, limit=2, model=replace(config.model, context=198)))
    assert "over the context of 198: 0\n" in capsys.readouterr().out  # which has 198 tokens, and the other fewer
    assert not config.out.exists()


@pytest.mark.parametrize("change, said", [
    ({"batch": 0}, "batch=0: must be at least 1"), ({"workers": 0}, "workers=0"), ({"tokens": 0}, "tokens=0"),
    ({"limit": 0}, "limit=0"), ({"data": ()}, "give --weights and --data"), ({"name": "a/b"}, "name='a/b'"),
    ({"fresh": True, "score_only": True}, "--fresh would move"),
    ({"rules": {"choice": "best"}}, "rules='best': questions of kind choice are scored by one of"),
])  # fmt: skip
def test_wrong_options_are_refused(change, said, config):
    with pytest.raises(ValueError, match=said):
        if "rules" in change:
            change = {"rules": Rules(**change["rules"])}
        replace(config, **change)


def test_two_files_of_one_name_are_refused(config, tmp_path):
    (tmp_path / "b").mkdir()
    lower = tsvs.ai2d(tmp_path / "b").rename(tmp_path / "b/ai2d_test.tsv")
    with pytest.raises(ValueError, match="two files are called AI2D_TEST"):
        evaluate.main(replace(config, data=(*config.data, lower)))


def test_a_name_comes_from_the_folder_of_the_weights(config, weights):
    assert replace(config, name="").label == "vicuna_v1" and config.label == "m"
    c = tyro.cli(evaluate.Evaluate, args=arguments(config))
    assert c == config


def test_a_line_that_is_no_answer_is_named(config):
    c = only(config, "chartqa")
    evaluate.main(c)
    (path,) = (c.out / "m_ChartQA_TEST/predictions").iterdir()
    content = path.read_bytes()
    for spoilt in (b"[]", b"\0\0", b'{"i": "1"}'):
        path.write_bytes(content.replace(b"\n", b"\n" + spoilt + b"\n", 1))
        with pytest.raises(ValueError, match=r"000-0-of-1.jsonl, line 2 is no answer .*; remove the line"):
            evaluate.main(c)


def test_an_answer_stands_before_an_error_and_else_the_last_line_counts(tmp_path):
    (tmp_path / "predictions").mkdir()
    row = {"i": "1", "h": "k", "p": "", "n": 0, "t": 5.0, "st": "error", "err": "bad"}

    def written(*rows):
        text = "".join(json.dumps(row | r) + "\n" for r in rows)
        (tmp_path / "predictions/0.jsonl").write_text(text)
        return folder.read(tmp_path, {"1": "k", "2": "other"})

    good = {"p": "A", "st": "ok", "err": ""}
    assert written({}, good)["1"].text == written(good, {})["1"].text == "A"
    assert written({}, {"err": "worse"})["1"].error == "worse" and written({})["1"].seconds == 0.005
    assert written(good, good | {"p": "B"})["1"].text == "B"
    assert written(good | {"i": "2"}, good | {"h": "stale"}) == {}
    written(good)
    with (tmp_path / "predictions/0.jsonl").open("a") as f:
        for torn in ('{"i": "1", ', json.dumps(row | good | {"p": "B"})[11:]):  # and without its line end
            f.write(torn)
            f.flush()
            assert folder.read(tmp_path, {"1": "k"})["1"].text == "A" and folder.count(tmp_path) == 1


def test_each_start_has_a_file_of_its_own_and_answers_are_on_the_disk_at_once(tmp_path, monkeypatch):
    (tmp_path / "predictions").mkdir()
    with folder.create(tmp_path, 0, 1) as file:
        file.write('{"i": "1", ')  # and here it is killed
    there = []
    monkeypatch.setattr(os, "fsync", lambda _: there.append(folder.read(tmp_path, {"1": "k", "2": "k"}).keys()))
    with folder.create(tmp_path, 0, 1) as file:
        for i in "12":
            folder.write(file, [Prediction(i, "A", 1, 0.5)], {i: "k"})
    assert [sorted(x) for x in there] == [["1"], ["1", "2"]]
    folder.create(tmp_path, 1, 3).close()
    assert [p.name for p in folder.files(tmp_path)] == ["000-0-of-1.jsonl", "000-1-of-3.jsonl", "001-0-of-1.jsonl"]


def test_keys_change_with_prompt_images_and_settings(whole):
    s = settings(whole)
    style = prompts.style("llava", s.style.form)
    changes = ({"dtype": "bfloat16"}, {"weights": "x"}, {"context": 1}, {"quantise": "int8"}, {"style": style})
    other = [replace(s, decoding=Decoding(6)), *(replace(s, **change) for change in changes)]
    keys = {folder.key(s, "p", "i"), folder.key(s, "q", "i"), folder.key(s, "p", "j")}
    assert len(keys | {folder.key(o, "p", "i") for o in other}) == 3 + len(other)
    assert folder.structure(Settings, json.loads(json.dumps(folder.plain(s)))) == s


def test_fingerprint_is_the_checkpoints_own_or_of_every_byte(weights, tmp_path, tokenizer):
    import layouts

    at = weights / "vicuna_v1"
    assert folder.fingerprint((at,)) == checkpoint.fingerprint(at) != folder.fingerprint((weights / "plain",))
    newest = checkpoint.at(tmp_path / "run/checkpoints", 7)
    shutil.copytree(at, newest)
    with (newest / checkpoint.SUMS).open("a") as f:
        f.write(f"{64 * '0'}  moments.safetensors\n")  # no part of the model, but of the checkpoint
    assert folder.fingerprint((tmp_path / "run",)) == checkpoint.fingerprint(newest) != checkpoint.fingerprint(at)
    layouts.write_llava_hf(tmp_path / "hf", layouts.hub(layouts.hf_model()), "hub", tokenizer.model)
    first = folder.fingerprint((tmp_path / "hf",))
    assert first == folder.fingerprint((tmp_path / "hf",)) != folder.fingerprint((tmp_path / "hf", at))
    (tmp_path / "hf/README.md").write_text("no part of the model")
    assert folder.fingerprint((tmp_path / "hf",)) == first
    files = [p for p in sorted((tmp_path / "hf").iterdir()) if p.suffix in (".safetensors", ".model", ".json")]
    assert len({p.suffix for p in files}) == 3
    for path in files:
        name, content = path.name, path.read_bytes()
        more = {".json": b"\n", ".model": b"\xfa\x01\x00"}  # the latter: an empty field of protobuf that nobody reads
        more[".safetensors"], cut = bytes([content[-1] ^ 1]), len(content) - (path.suffix == ".safetensors")
        path.write_bytes(content[:cut] + more[path.suffix])
        assert folder.fingerprint((tmp_path / "hf",)) != first, name
        path.write_bytes(content)
    assert folder.fingerprint((tmp_path / "hf",)) == first


def test_two_runs_are_compared(config, capsys, monkeypatch):
    c = only(config, "choice")
    evaluate.main(c)
    second = replace(c, template="llava", name="second", compare="m")
    evaluate.main(second)
    said = capsys.readouterr().out
    assert "second less m is" in said and (c.out / "second_AI2D_TEST_vs_m.html").exists()
    monkeypatch.chdir(c.out.parent)
    for at in (c.out / "m", Path("out/m")):
        evaluate.main(replace(second, out=c.out, compare=str(at), score_only=True))
        assert "second less m is" in capsys.readouterr().out
    with pytest.raises(ValueError, match="third_AI2D_TEST/run.json: no such file"):
        evaluate.main(replace(c, out=c.out / "new", compare="third"))
    assert not (c.out / "new").exists()  # it is told before the work
    evaluate.main(replace(c, name="third", limit=2))
    evaluate.main(replace(c, compare="third", score_only=True))
    said = [(c.out / f"{name}.html").read_text() for name in ("m_AI2D_TEST_vs_third", "second_AI2D_TEST_vs_m")]
    assert ["<strong>partial</strong>" in html for html in said] == [True, False]
