"""Answers of two processes (gloo) that share a decoder, against those of one: functions, and recipes/infer.py."""

import contextlib
import io
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm
from exchanges import exchange_of
from warm import ENV, ROOT, recipe, rendezvous

from llava_fn import config, linear, llama, llava, spec, tree
from llava_fn.batch import IMAGE, Sample
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.generate import assistant, conversation, decode, options
from llava_fn.generate.assistant import Placement
from llava_fn.generate.conversation import Chat, ask, picture
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model, Vocabulary
from llava_fn.launch import processes
from llava_fn.parallel.collectives import TP
from llava_fn.parallel.mesh import Axis, Mesh
from llava_fn.study.activations import activations
from llava_fn.study.exchange import inputs
from llava_fn.study.lens import lens
from llava_fn.study.patch import patch_heads, patch_states
from llava_fn.study.saliency import gradient, normalised, score

WORLD = 2
infer = recipe("infer")
C = config.Llava(
    config.Vision(image=8, patch=4, width=8, blocks=3, heads=2, ffn=12),
    config.Llama(vocab=24, width=16, blocks=3, heads=4, kv_heads=2, ffn=10, theta=30.0),
)
MODELS = {"grouped": C, "tied": replace(C, llama=replace(C.llama, kv_heads=4, blocks=2, tied=True))}
PROMPTS = {"images": ("i4", "1i2", "2i3i", "i"), "text": ("1", "8", "3")}
WAYS = {
    "greedy": Decoding(tokens=12, logprobs=True),
    "sampled": Decoding(tokens=12, temperature=0.9, top_p=0.95, repetition_penalty=1.2, samples=2, seed=4),
    "beams": Decoding(tokens=8, beams=3, samples=2),
}
SHARED = config.Llava(
    config.Vision(image=16, patch=8, width=16, blocks=2, heads=2, ffn=32),
    config.Llama(vocab=512, width=16, blocks=2, heads=4, kv_heads=2, ffn=32),
)


def random(c, scale=1.0):
    rng = torch.Generator().manual_seed(3)
    shapes = spec.init(llava.spec(c), 0)
    return tree.rebuild(shapes, [torch.randn(x.shape, generator=rng) * scale for x in tree.values(shapes)])


def samples(layouts):
    """layouts: "i" an image, a digit so many tokens."""
    rng, out = torch.Generator().manual_seed(1), []
    for layout in layouts:
        ids, shape = (1,), (layout.count("i"), 3, 8, 8)
        for kind in layout:
            text = () if kind == "i" else torch.randint(3, 24, (int(kind),), generator=rng).tolist()
            ids += (IMAGE,) * C.vision.patches if kind == "i" else tuple(text)
        pixels = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
        out.append(Sample(layout, ids, (False,) * len(ids), pixels))
    return out


def share(p, c, mesh):
    """This rank's blocks."""
    params = [param for _, param in spec.leaves(llava.spec(c))]
    return tree.rebuild(p, [x[spec.shard(s, mesh)].clone() for x, s in zip(tree.values(p), params, strict=True)])


def say(model, mesh, int8, layouts, d, seeds=None):
    c = MODELS[model]
    p = share(random(c), c, mesh)
    if int8:
        p = linear.quantise(p, axis=mesh.tp)
    m = Model(p, c, TP(mesh.tp, sequence=False))
    return decode.generate(m, decode.prompts(m, samples(layouts)), d, Vocabulary(c.llama.vocab, (5,), str), seeds)


def every(mesh):
    """(model, prompts, way, int8) -> answers."""
    return {
        (model, prompts, way, int8): say(model, mesh, int8, PROMPTS[prompts], WAYS[way])
        for model in MODELS for prompts in PROMPTS for way in WAYS for int8 in (False, True)
    }  # fmt: skip


def talk(weights, picture_path, mesh, int8=False):
    """Two turns on one cache."""
    source = assistant.open_weights([weights])
    to = Placement(torch.device("cpu"), torch.float32, mesh, int8)
    a = assistant.place(source, assistant.form_of(source), to)
    chat, said = ask(Chat(), "What is shown?", [picture(picture_path, a)]), []
    for question in ("And what else?", None):
        *_, last = conversation.reply(a, chat, Decoding(tokens=6))
        said.append(last.chat.turns[-1][1])
        chat = ask(last.chat, question) if question else chat
    shapes = {path: x.shape for path, x in zip(*map(list, read(a.model.params)), strict=True)}
    return said, last.chat.cache.k.shape, shapes


def read(params):
    return ("/".join(path) for path in tree.paths(params)), tree.values(params)


def worker(rank, folder, weights, picture_path, variables):
    torch.set_num_threads(1)
    os.environ.update(variables[rank])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), processes.processes(WORLD, torch.device("cpu"), alone=True) as joined:
        mesh = joined.mesh
        print("an answer")
        out = everything(mesh, weights, picture_path)
        print("to show", file=sys.stderr)
    torch.save(out | {"shown": shown.getvalue(), "over": not dist.is_initialized()}, Path(folder) / f"{rank}.pt")


def everything(mesh, weights, picture_path):
    d = replace(WAYS["sampled"], samples=1)
    return {"every": {k: [[asdict(a) for a in row] for row in v] for k, v in every(mesh).items()},
            "other seeds": [r[0].ids for r in say("grouped", mesh, False, PROMPTS["images"], d, [mesh.tp.rank] * 4)],
            "opened": opened(mesh), "talk": talk(weights, picture_path, mesh), "int8": tree_of_int8(mesh)}  # fmt: skip


def opened(mesh):
    """What llava_fn/study finds in a shared decoder: patched runs, the logit lens, and gradients for pixels."""
    m = Model(share(random(C), C, mesh), C, TP(mesh.tp, sequence=False))
    e, other = (exchange_of(m, replace(samples(["1i5"])[0], pixels=samples(["2i", "i"])[j].pixels)) for j in (0, 1))
    clean, corrupted = (activations(m, inputs(m, x), x.answer) for x in (e, other))
    states = patch_states(m, clean, corrupted, torch.eye(len(e.prompt.ids)).bool(), e.answer)
    heads = patch_heads(m, clean, corrupted, torch.eye(C.llama.heads).bool(), e.answer, batch=3)
    seen, f, x = lens(m, inputs(m, e), e.answer), score(m, e), normalised(m, e)[None]
    return {"states": states, "heads": heads, "lens": seen.answer, "words": f(x).detach(), "pixels": gradient(f, x)}


def tree_of_int8(mesh):
    p = linear.quantise(share(random(C), C, mesh), axis=mesh.tp)["llama", "blocks", "0"]
    return {(n, part): p[n, part] for n in linear.COLUMN + linear.ROW for part in ("int8", "scale")}


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("weights") / "shared"
    manifest = checkpoint.Manifest(SHARED, ("vision", "projector", "llama"), "pad", "vicuna_v1", None, step=7)
    checkpoint.save(folder, manifest, random(SHARED, 0.7), None, tokenizer.model)
    return folder


@pytest.fixture(scope="module")
def image(emojis):
    return sorted((emojis / "images").iterdir())[0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, weights, image):
    folder = tmp_path_factory.mktemp("ranks")
    store, variables = rendezvous(WORLD)
    warm.ranks(worker, (str(folder), weights, image, variables), WORLD)
    del store  # which the ranks needed until now
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    return every(Mesh())


def test_what_is_found_in_a_shared_decoder_is_what_one_process_finds(ranks):
    want = opened(Mesh())
    for got in ranks:
        for name, x in want.items():
            torch.testing.assert_close(got["opened"][name], x, rtol=1e-4, atol=1e-4 * x.abs().max().item())
    assert (want["heads"][0] - want["heads"][0, 0]).abs().max() > 1e-3 and want["pixels"].abs().max() > 0


@pytest.mark.parametrize("int8", [False, True], ids=["whole", "int8"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("model", MODELS)
def test_each_rank_says_what_one_process_says(ranks, alone, model, prompts, way, int8):
    want = alone[model, prompts, way, int8]
    assert len({a.ids for row in want for a in row}) >= len(want) - 1
    for got in ranks:
        for mine, row in zip(got["every"][model, prompts, way, int8], want, strict=True):
            assert [a["ids"] for a in mine] == [a.ids for a in row]
            assert [a["logprobs"] for a in mine] == [pytest.approx(a.logprobs, abs=1e-4) for a in row]


def test_ranks_that_would_draw_differently_say_what_the_first_draws(ranks):
    d = replace(WAYS["sampled"], samples=1)
    zero, one = ([r[0].ids for r in say("grouped", Mesh(), False, PROMPTS["images"], d, [n] * 4)] for n in (0, 1))
    assert zero != one and [got["other seeds"] for got in ranks] == [zero, zero]


def test_each_rank_quantises_to_its_share_of_the_quantised_whole(ranks):
    block = llama.spec(C.llama)["blocks"]["0"]
    for (name, part), whole in tree_of_int8(Mesh()).items():
        for rank, got in enumerate(ranks):
            rows, columns = spec.shard(block[name], Mesh(tp=Axis("tp", WORLD, rank)))
            torch.testing.assert_close(got["int8"][name, part], whole[rows, columns if part == "int8" else slice(None)])


def test_a_conversation_is_shared_and_each_rank_holds_its_part_of_weights_and_cache(ranks, weights, image):
    said, cache, shapes = talk(weights, image, Mesh())
    split = {path for path, param in spec.leaves(llava.spec(SHARED)) if set(param.axes) - {None}}
    assert len(said[0]) > 3 and said[0] != said[1]
    for got, rank_cache, rank_shapes in (r["talk"] for r in ranks):
        assert got == said
        assert rank_cache == (*cache[:3], cache[3] // WORLD, cache[4])
        for path, shape in shapes.items():
            ratio = shape.numel() / rank_shapes[path].numel()
            assert ratio == (WORLD if tuple(path.split("/")) in split else 1), path


def test_only_the_first_rank_shows_anything_and_the_group_ends(ranks):
    assert [got["shown"] for got in ranks] == ["an answer\n", ""] and all(got["over"] for got in ranks)


@pytest.fixture
def lines(tmp_path, image):
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": "What is it?", "image": str(image)}, {"prompt": "Say a word."}, {"prompt": 3},
            {"prompt": "Is <image> like <image>?", "image": [str(image)] * 2}]  # fmt: skip
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    return path


def test_the_recipe_goes_on_on_two_processes_where_one_stopped_and_prints_once(weights, lines, warm, tmp_path):
    out = tmp_path / "answers.jsonl"
    one = infer.Infer(options.ChatOptions((weights,), device="cpu"), Decoding(tokens=6), json=lines, out=out, batch=2)
    with pytest.raises(ValueError, match="1 of 4 lines"):
        infer.main(one)
    want = out.read_text()
    out.write_text(want[: want.index("\n") + 30])  # a kill cut the second answer short
    argv = [ROOT / "recipes/infer.py", "--tp", 2, "--weights", weights, "--device", "cpu", "--json", lines,
            "--out", out, "--tokens", 6, "--batch", 2]  # fmt: skip
    pids = warm.start_ranks(2, lambda _: argv, tmp_path, ENV, lambda rank: tmp_path / f"log{rank}")
    statuses, said = warm.statuses(pids), [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert statuses == [1, 1] and out.read_text() == want, said
    assert said[0].count("line 3: 'prompt' is 3") == 1 and said[1] == "error (rank 1): " + said[0].partition("): ")[2]
    assert "1 of 3 lines" in said[1]


def test_sizes_that_do_not_divide_are_named_with_those_that_fit(weights):
    with pytest.raises(ValueError, match=r"tp=4 does not divide the decoder's kv_heads=2; tp can be one of 1, 2$"):
        llama.check_tp(SHARED.llama, 4)
    source = assistant.open_weights([weights])
    to = Placement(torch.device("cpu"), torch.float32, Mesh(tp=Axis("tp", 3)))
    with pytest.raises(ValueError, match="tp=3 .* heads=4 and kv_heads=2 and ffn=32 and vocab=512; .* 1, 2"):
        assistant.place(source, assistant.form_of(source), to)
    llama.check_tp(config.LLAVA_7B.llama, 8)


def test_as_many_processes_as_tp(weights, monkeypatch):
    started = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0")
    processes.check_processes(1, {}, alone=True)
    processes.check_processes(2, started | {"WORLD_SIZE": "2"}, alone=True)
    with pytest.raises(ValueError, match="tp=2 but WORLD_SIZE=1: .* torchrun --nproc-per-node 2 RECIPE ... --tp 2"):
        infer.main(infer.Infer(options.ChatOptions((weights,), device="cpu"), prompt="x", tp=2))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="tp=1 but WORLD_SIZE=4: .* without torchrun, or with --tp 4"):
        infer.main(infer.Infer(options.ChatOptions((weights,), device="cpu"), prompt="x"))


@pytest.mark.parametrize("bad, match", [({"tp": 0}, "tp=0: must be"), ({"tp": 2, "json": Path("-")}, "into a file")])
def test_options_that_cannot_be(bad, match):
    with pytest.raises(ValueError, match=match):
        infer.Infer(options.ChatOptions((Path("x"),)), **bad)
