"""Several adapters on one base in one batch: each answers with the tokens that it gives alone."""

import base64
import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from serving import alone, serving

from llava_fn import llava, lora, spec, tree
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.config import Lora
from llava_fn.generate import assistant, family
from llava_fn.generate.conversation import Chat, ask, picture
from llava_fn.generate.options import ChatOptions, Decoding
from llava_fn.weights import export, model
from llava_fn.weights.source import open_source

KINDS = {  # name -> (adapters, the other parts that were trained)
    "small": (Lora(rank=2, alpha=8.0), ()),
    "some": (Lora(rank=3, alpha=9.0, targets=(r"llama/blocks/1/.*",)), ("projector",)),
    "everywhere": (Lora(rank=2, alpha=8.0, targets=(".*",)), ("projector",)),
}


@pytest.fixture(scope="module")
def folders(weights, tokenizer, tmp_path_factory):
    """Runs that trained adapters of one base, and one of them as PEFT's folder."""
    root, base = tmp_path_factory.mktemp("adapters"), weights / "vicuna_v1"
    opened = checkpoint.open_checkpoint(base)
    record = checkpoint.Base(str(base), opened.fingerprint)
    for seed, (name, (c, others)) in enumerate(KINDS.items()):
        whole = lora.extended(llava.spec(opened.manifest.model), c)
        parts = (*others, "lora")
        fresh = spec.init(spec.only(whole, parts), seed)
        rng = torch.Generator().manual_seed(seed)
        params = tree.rebuild(fresh, [x + 0.2 * torch.randn(x.shape, generator=rng) for x in tree.values(fresh)])
        manifest = dataclasses.replace(opened.manifest, parts=parts, base=record, lora=c, template="hf")
        checkpoint.save(root / name, manifest, params, None, opened.tokenizer)
    export.export(open_source(root / "some"), root / "peft", "peft")
    return root


@pytest.fixture(scope="module")
def f(weights, folders):
    options = ChatOptions((weights / "vicuna_v1",), device="cpu", context=256)
    return family.load(options, {name: folders / name for name in (*KINDS, "peft")})


QUESTIONS = ("What is it?", "Say a word.", "Is it a man, a woman or a person?")


def test_requests_of_several_adapters_are_answered_together_as_each_alone(f, emojis):
    path = sorted((emojis / "images").iterdir())[0]
    wanted, seen = {}, set()
    for name in ("tiny", *f.adapters):
        a = f.member("" if name == "tiny" else name)
        for question in QUESTIONS:
            wanted[name, question] = alone(a, ask(Chat(), question, [picture(path, a)]), Decoding(tokens=8))
            seen.add((question, wanted[name, question]))
    assert len(seen) > 2 * len(QUESTIONS)  # they do answer differently
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

    def request(name, question):
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        got = server.client().chat.completions.create(
            model=name, messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0
        )
        return got.model, got.choices[0].message.content

    with serving(f) as server, ThreadPoolExecutor(len(wanted)) as pool:
        assert [m.id for m in server.client().models.list()] == ["tiny", *f.adapters]
        for _ in range(2):  # the second time from the cache of the first
            answers = dict(zip(wanted, pool.map(lambda key: request(*key), wanted), strict=True))
            assert {key: text for key, (_, text) in answers.items()} == wanted
            assert all(name == model for (name, _), (model, _) in answers.items())
        with pytest.raises(openai.NotFoundError, match="no model 'other'; this server has 'tiny', 'small', 'some'"):
            request("other", "What?")


def test_an_adapter_brings_its_own_template_and_projector(f, folders):
    assert f.base.form.template == "vicuna_v1" and f.member("small").form.template == "hf"
    assert f.member("peft").form.template == "vicuna_v1"  # PEFT's folder names none
    shared = [x.data_ptr() for x in tree.values(f.base.model.params)]
    own = [x.data_ptr() for x in tree.values(f.member("small").model.params)]
    assert set(shared) < set(own)  # no weight of the base is there twice
    base = f.base.model.params
    assert torch.equal(f.member("small").model.params["projector", "w1"], base["projector", "w1"])
    assert not torch.equal(f.member("peft").model.params["projector", "w1"], base["projector", "w1"])


def test_an_adapter_of_llavas_code_brings_its_own_image_mode(weights, folders, tmp_path):
    shutil.copytree(folders / "peft", tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps({"image_aspect_ratio": "square"}))
    options = ChatOptions((weights / "vicuna_v1",), device="cpu", context=256)
    f = family.load(options, {"other": tmp_path / "other"})
    assert (f.base.form.image_mode, f.member("other").form.image_mode) == ("pad", "square")
    assert f.member("other").form.template == "vicuna_v1"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_base_and_a_run_of_adapters_are_given_together(weights, folders, order):
    paths = [weights / "vicuna_v1", folders / "some"]
    both = assistant.load(ChatOptions(tuple(paths[i] for i in order), device="cpu"))
    run = assistant.load(ChatOptions((folders / "some",), device="cpu"))
    for x, y in zip(tree.values(both.model.params), tree.values(run.model.params), strict=True):
        assert torch.equal(x, y)


def test_a_base_that_has_moved_is_given_beside_the_run(weights, folders, tmp_path, tokenizer):
    """A run that trained a part of the decoder and no adapters, and a copy of its base elsewhere."""
    base = shutil.copytree(weights / "vicuna_v1", tmp_path / "base")
    opened = checkpoint.open_checkpoint(base)
    parts = ("projector", "llama/blocks/1")
    params = spec.init(spec.only(llava.spec(opened.manifest.model), parts), 5)
    record = checkpoint.Base(str(base), opened.fingerprint)
    checkpoint.save(
        tmp_path / "run", dataclasses.replace(opened.manifest, parts=parts, base=record), params, None, opened.tokenizer
    )
    before = assistant.load(ChatOptions((tmp_path / "run",), device="cpu"))
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="base is gone; put it back, or name it where it is now, before the run"):
        assistant.load(ChatOptions((tmp_path / "run",), device="cpu"))
    after = assistant.load(ChatOptions((tmp_path / "moved", tmp_path / "run"), device="cpu"))
    for x, y in zip(tree.values(before.model.params), tree.values(after.model.params), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match="run was trained on .*base, and .*plain is another base"):
        assistant.load(ChatOptions((weights / "plain", tmp_path / "run"), device="cpu"))


def test_adapters_of_another_base_or_none_are_refused(weights, folders):
    def load(base, adapter):
        return family.load(ChatOptions((base,), device="cpu"), {"x": adapter})

    with pytest.raises(ValueError, match="small was trained on .*vicuna_v1, and .*plain is another base"):
        load(weights / "plain", folders / "small")
    with pytest.raises(ValueError, match="plain holds no adapters; name a PEFT folder, or a run that trained some"):
        load(weights / "vicuna_v1", weights / "plain")
    with pytest.raises(ValueError, match="small holds adapters itself; give its base as weights"):
        load(folders / "small", folders / "small")
    with pytest.raises(ValueError, match="no-such"):
        load(weights / "vicuna_v1", folders / "no-such")


def test_merged_weights_answer_as_the_adapter_does(f, folders, emojis):
    shot = picture(sorted((emojis / "images").iterdir())[0], f.base)
    source = model.merge_lora(assistant.open_weights([folders / "everywhere"]))
    to = assistant.Placement(torch.device("cpu"), torch.float32)
    merged = assistant.place(source, f.member("everywhere").form, to)
    chat = ask(Chat(), "What is it?", [shot])
    assert alone(merged, chat, Decoding(tokens=6)) == alone(f.member("everywhere"), chat, Decoding(tokens=6))
