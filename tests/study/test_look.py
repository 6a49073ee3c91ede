"""What words look at: against transformers' attentions, and the pictures and numbers that the recipe writes."""

import dataclasses

import numpy as np
import pytest
import torch
from oracles import CONFIGS, HF_IMAGE, hf_inputs, hf_llava, ours, sample
from PIL import Image
from rounding import same_but_rounded
from warm import recipe

from llava_fn import linear, llama
from llava_fn.errors import BadRecord
from llava_fn.generate import assistant, conversation, decode, options
from llava_fn.generate.conversation import Chat
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model, Prompt
from llava_fn.study.attention import attention_maps, look
from llava_fn.study.exchange import answer_ids, exchange, words

draw, infer = recipe("look"), recipe("infer")


@pytest.mark.parametrize("c", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("read", [1, 4])
def test_maps_and_hidden_states_equal_transformers(c, read):
    peer = hf_llava(c)
    peer.set_attn_implementation("eager")
    p, s = ours(peer, c), sample(c, 3, "p2ip3i4")
    with torch.no_grad():
        want = peer(**hf_inputs(c, [s]), output_attentions=True, output_hidden_states=True)
    m = Model(p, c)
    x = decode.embed(m, decode.prompts(m, [s]))
    hidden, maps = attention_maps(p["llama"], x, read, c.llama)
    same_but_rounded(maps, torch.stack(want.attentions)[:, 0, :, -read:], scale=1.0)
    same_but_rounded(hidden, want.hidden_states[-1][0, -read:])
    same_but_rounded(maps.sum(-1), torch.ones_like(maps[..., 0]))
    assert not maps[:, :, 0, len(x) - read + 1 :].any() and (HF_IMAGE in hf_inputs(c, [s])["input_ids"])


@pytest.mark.parametrize("read", [0, 9])
def test_more_positions_than_there_are_cannot_be_read(read, lively, tiny):
    with pytest.raises(ValueError, match=f"read={read}: must be from 1 to the 8 positions"):
        attention_maps(lively["llama"], lively["llama"]["embed"][:8], read, tiny.llama)


@pytest.fixture(scope="module")
def a(weights):
    return assistant.load(options.ChatOptions((weights / "vicuna_v1",), device="cpu"))


@pytest.fixture(scope="module")
def images(emojis):
    return sorted((emojis / "images").iterdir())[:2]


def test_a_word_looks_where_the_positions_look_that_choose_its_tokens(a, images):
    chat = conversation.ask(Chat(), "Is <image> like <image>?", [conversation.picture(path, a) for path in images])
    ids = answer_ids(a, chat, "kangaroo \u6f22 is\nit")
    spans = words(a.tokenizer, ids)
    assert [word for word, _, _ in spans] == ["kangaroo", "\u6f22", "is", "it"]
    assert max(end - start for _, start, end in spans) > 1 and spans[-1][2] == len(ids)
    seen = look(a.model, exchange(a, chat, ids))
    chat = dataclasses.replace(chat, feats=conversation.features(a, chat.pictures, {}))
    asked, keys = conversation.prompt(a, chat, Decoding(tokens=99))
    whole = Prompt((*asked.ids, *ids), asked.feats)
    x = decode.embed(a.model, [whole])
    _, every = attention_maps(a.model.params["llama"], x, len(x), a.config.llama)  # of all positions, one by one
    for row, (_, start, end) in zip(seen.maps, spans, strict=True):
        alone = every[:, :, len(asked.ids) - 1 + start : len(asked.ids) - 1 + end, :-1].mean(2)
        same_but_rounded(row, alone)
    same_but_rounded(seen.maps.sum(-1), torch.ones(seen.maps.shape[:3]))
    side = a.config.vision.image // a.config.vision.patch
    assert seen.patches.shape == (4, a.config.llama.blocks, a.config.llama.heads, 2, side, side)
    second = keys.index(chat.pictures[1].key)
    same_but_rounded(seen.patches[:, :, :, 1, -1, 0], seen.maps[..., second + side * (side - 1)])
    shares = seen.shares()
    same_but_rounded(shares["image"], seen.patches.sum((-3, -2, -1)))
    same_but_rounded(sum(shares.values()), torch.ones_like(shares["text"]))
    same_but_rounded(shares["first"], seen.maps[..., 0])


def test_the_model_that_is_looked_at_is_the_one_that_answers(a, images):
    chat = conversation.ask(Chat(), "What is it?", [conversation.picture(images[0], a)])
    int8 = dataclasses.replace(a.model, params=linear.quantise(a.model.params))
    for b in (a, dataclasses.replace(a, model=int8)):
        feats = conversation.features(b, chat.pictures, {})
        with_feats = dataclasses.replace(chat, feats=feats)
        ((found,),) = conversation.answers(b, [with_feats], Decoding(tokens=5))
        asked, _ = conversation.prompt(b, with_feats, Decoding(tokens=5))
        x = decode.embed(b.model, [Prompt((*asked.ids, *found.ids[:-1]), asked.feats)])
        hidden, _ = attention_maps(b.model.params["llama"], x, 5, b.config.llama)
        assert tuple(llama.logits(b.model.params["llama"], hidden, b.config.llama).argmax(-1).tolist()) == found.ids


def test_an_answer_in_training_form_is_read_back(a):
    chat = conversation.ask(Chat(), "Say it.")
    assert a.tokenizer.decode(answer_ids(a, chat, "red cat")).strip() == "red cat"


def config(weights, images, tmp_path, **more):
    model = options.ChatOptions((weights / "vicuna_v1",), device="cpu")
    return draw.Draw(model, tuple(images), tmp_path / "out/look.png", **{"prompt": "What?", "tokens": 6, **more})


def test_the_recipe_answers_as_infer_does_and_writes_a_picture_and_numbers(weights, images, tmp_path, capsys):
    c = config(weights, images, tmp_path)
    draw.main(c)
    answer = capsys.readouterr().out.split(f"\n{c.out}")[0]
    infer.main(infer.Infer(c.model, Decoding(tokens=6), prompt="What?", image=tuple(images)))
    assert capsys.readouterr().out.strip() == answer.strip() != ""
    numbers = np.load(c.out.with_suffix(".npz"))
    n = len(numbers["words"])
    assert numbers["patches"].shape == (n, 2, 2, 2, 2, 2) and numbers["patches"].max() > 0.1
    total = numbers["image"] + numbers["first"] + numbers["text"]
    np.testing.assert_allclose(total, np.ones((n, 2, 2)), rtol=1e-5)
    picture = Image.open(c.out)
    assert picture.width > 500 and len(picture.convert("RGB").getcolors(2**24)) > 50


def test_layers_heads_and_words_change_the_picture(weights, images, tmp_path):
    pictures = []
    for more in ({}, {"layers": (-1,)}, {"layers": (1,)}, {"heads": (0,)}, {"words": ("cat",)}):
        c = config(weights, images[:1], tmp_path, answer="red cat", **more)
        draw.main(c)
        pictures.append(np.asarray(Image.open(c.out).convert("RGB")).tobytes())
    assert len(set(pictures)) == 5  # of the two that show layer 1, because the title says how it was called


def test_words_beyond_those_drawn_are_said(weights, images, tmp_path, capsys):
    c = config(weights, images[:1], tmp_path, answer="a " * 30)
    draw.main(c)
    assert "23 words (the first 23 of 30; see --words)" in capsys.readouterr().out
    assert len(np.load(c.out.with_suffix(".npz"))["words"]) == 30


BAD = [
    ({"layers": (2,), "answer": "a"}, "--layers 2: the model has 2, from 0 to 1, or from the end -1 to -2"),
    ({"heads": (-3,), "answer": "a"}, "--heads -3: the model has 2"),
    ({"words": ("dog",), "answer": "red cat"}, "--words dog: the answer does not say it; its words are: red cat"),
    ({"out": "look.txt", "answer": "a"}, r"look.txt: name a .png"),
    ({"image": (), "answer": "a"}, "no image to look at"),
    ({"prompt": "<image><image>", "answer": "a"}, "2 <image> in the question but 1 images"),
    ({"answer": " "}, "is empty"),
]


@pytest.mark.parametrize("more, said", BAD, ids=range(len(BAD)))
def test_what_cannot_be_drawn_is_said(more, said, weights, images, tmp_path):
    more = more | ({"out": tmp_path / more["out"]} if "out" in more else {})
    c = dataclasses.replace(config(weights, images[:1], tmp_path), **more)
    with pytest.raises(ValueError, match=said):
        draw.main(c)
    assert not (tmp_path / "out").exists()


def test_an_answer_without_words_is_said(a, images):
    chat = conversation.ask(Chat(), "What?", [conversation.picture(images[0], a)])
    for ids in ((), tuple(a.tokenizer.encode("\n"))):
        with pytest.raises(BadRecord, match="the answer has no words"):
            exchange(a, chat, ids)


@pytest.mark.parametrize("what", ["gradient", "integrated", "smooth", "lens"])
def test_each_kind_is_drawn_and_its_numbers_are_written(what, weights, images, tmp_path, capsys):
    more = {} if what in ("gradient", "lens") else {"steps": 3}
    c = config(weights, images, tmp_path, answer="red cat", what=what, **more)
    draw.main(c)
    x = np.load(c.out.with_suffix(".npz"))
    assert list(x["words"]) == ["red", "cat"] and f"{c.out}: 2 words" in capsys.readouterr().out
    if what == "lens":
        (states, t, r), size = x["answer"].shape, x["top"].max()
        assert (states, t, r) == (3, len(x["ids"]), len(x["tokens"])) and size < 512
        last = x["answer"][-1, -1, -1]
        assert x["top"].shape == (3, t, 5) and 0 < last < 1
    else:
        assert x["pixels"].shape == (2, 2, 3, 16, 16) and x["pixels"].any() and (x["logprobs"] < 0).all()
    assert len(Image.open(c.out).convert("RGB").getcolors(2**24)) > 50


WRONG = [
    ({"what": "lens", "layers": (3,)}, "--layers 3: the model has 3, from 0 to 2"),
    ({"what": "lens", "heads": (0,)}, "--heads changes nothing for --what lens; it is for attention"),
    ({"steps": 3}, "--steps changes nothing for --what attention; it is for integrated and smooth"),
    ({"tp": 2}, "takes the whole decoder on one device"),
    ({"what": "smooth", "noise": -1.0}, "no negative noise"),
]


@pytest.mark.parametrize("more, said", WRONG, ids=range(len(WRONG)))
def test_an_option_of_another_kind_is_refused(more, said, weights, images, tmp_path):
    with pytest.raises(ValueError, match=said):
        draw.main(config(weights, images[:1], tmp_path, answer="red cat", **more))
