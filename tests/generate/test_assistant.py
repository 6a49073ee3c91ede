"""Conversations: templates, pictures, turns on one cache, and text as it comes."""

import base64
import dataclasses
import io
from itertools import takewhile
from pathlib import Path

import layouts
import pytest
import sentencepiece
import torch
from PIL import Image
from rounding import same_but_rounded
from transformers import LlamaTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_fn import llama
from llava_fn.batch import IMAGE
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.errors import BadRecord
from llava_fn.generate import assistant, conversation, decode, options
from llava_fn.generate.conversation import Chat, ask, picture, reply, undo
from llava_fn.generate.options import ChatOptions, Decoding, Form
from llava_fn.weights import export, model
from llava_fn.weights.source import open_source

D = Decoding(tokens=12)


@pytest.fixture(scope="module")
def a(weights):
    return assistant.load(ChatOptions((weights / "vicuna_v1",), device="cpu"))


@pytest.fixture(scope="module")
def captioner(weights):
    return assistant.load(ChatOptions((weights / "plain",), device="cpu"))


@pytest.fixture(scope="module")
def pictures(a, emojis):
    return [picture(path, a) for path in sorted((emojis / "images").iterdir())[:5]]


def last(pieces):
    *_, said = pieces
    assert said.ended
    return said.chat


def count_tokens(monkeypatch):
    """Rows that each later prefill computes."""
    rows, prefill = [], llama.prefill
    monkeypatch.setattr(llama, "prefill", lambda p, x, *rest: rows.append(len(x)) or prefill(p, x, *rest))
    return rows


def test_template_image_mode_and_tokenizer_are_those_of_the_checkpoint(a, captioner, tokenizer):
    assert a.form == Form("vicuna_v1", "pad") and captioner.form == Form("plain", "square")
    assert a.tokenizer == tokenizer and a.trained == "vicuna_v1"


def test_images_are_read_as_in_training(tiny, lively, tokenizer, tmp_path):
    manifest = checkpoint.Manifest(tiny, ("vision", "projector", "llama"), "pad", "hf", None, image_reading="shown")
    checkpoint.save(tmp_path / "own", manifest, lively, None, tokenizer.model)
    export.export(model.merge([open_source(tmp_path / "own")]), tmp_path / "again", export.OURS)
    clear = io.BytesIO()
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(clear, "PNG")
    url = "data:image/png;base64," + base64.b64encode(clear.getvalue()).decode()
    for folder in (tmp_path / "own", tmp_path / "again"):
        a = assistant.load(ChatOptions((folder,), device="cpu"))
        assert a.form == Form("hf", "pad", None, "shown")
        for source in (clear.getvalue(), url, Image.open(clear)):
            assert picture(source, a).pixels.min() == 255
    own = assistant.load(ChatOptions((tmp_path / "own",), device="cpu", preset="original"))
    assert picture(clear.getvalue(), own).pixels.max() == 9


def test_presets_and_single_choices_overrule_the_checkpoint(weights):
    def form(**more):
        return assistant.load(ChatOptions((weights / "plain",), device="cpu", **more)).form

    assert form(preset="original") == Form("llava_v1", "pad")
    assert form(preset="hf") == Form("hf", "square", "hf", "hf")
    assert form(preset="original", image_mode="square") == Form("llava_v1", "square")
    assert form(template="mpt") == Form("mpt", "square")
    with pytest.raises(ValueError, match="no preset 'hff'; there are: original, hf"):
        form(preset="hff")
    with pytest.raises(ValueError, match="no conversation template 'v9'"):
        form(template="v9")


def test_a_run_stands_for_its_newest_checkpoint(weights, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has saved no checkpoint yet"):
        assistant.load(ChatOptions((tmp_path,), device="cpu"))
    for step, name in ((9, "plain"), (10, "vicuna_v1")):
        (tmp_path / f"checkpoints/{step:06d}").symlink_to(weights / name)
    assert assistant.load(ChatOptions((tmp_path,), device="cpu")).trained == "vicuna_v1"


def test_parts_that_nothing_brings_are_named(tmp_path, tokenizer):
    state = layouts.hub(layouts.hf_model())
    text_only = layouts.write_vicuna(tmp_path / "vicuna", state, "safetensors", tokenizer.model)
    clip = layouts.write_clip(tmp_path / "clip", state, whole=False)
    with pytest.raises(ValueError, match="does not bring the vision"):
        assistant.load(ChatOptions((text_only,), device="cpu"))
    with pytest.raises(ValueError, match="does not bring the projector"):
        assistant.load(ChatOptions((text_only, clip), device="cpu"))
    projector = layouts.write_projector(tmp_path / "mm_projector.bin", state)
    with pytest.raises(ValueError, match="does not say its template or its image mode"):
        assistant.load(ChatOptions((text_only, clip, projector), device="cpu"))
    m = ChatOptions((text_only, clip, projector), device="cpu", preset="original")
    assert assistant.load(m).form.template == "llava_v1"
    (text_only / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="brings no tokenizer.model"):
        assistant.load(ChatOptions((text_only, clip, projector), device="cpu", preset="original"))


def test_only_weights_of_stage_1_warn(a, captioner, weights):
    assert assistant.warning(a) == ""
    assert "stage 1" in assistant.warning(captioner)
    m = ChatOptions((weights / "plain",), device="cpu", preset="original")
    assert "stage 1" in assistant.warning(assistant.load(m))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("hub")
    state = layouts.hub(layouts.hf_model())
    return layouts.write_llava_hf(folder / "llava-hf", state, "hub", tokenizer.model)


@pytest.fixture(scope="module")
def processor(hf_folder, tmp_path_factory, tokenizer):
    alone = tmp_path_factory.mktemp("tokenizer")
    (alone / "tokenizer.model").write_bytes(tokenizer.model)
    words = LlamaTokenizer.from_pretrained(alone, legacy=False)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = layouts.C.vision.image
    pixels = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(pixels, words, layouts.C.vision.patch, "default", num_additional_image_tokens=1)


def photo(size=(50, 31)):
    rng = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (size[1] // 6, size[0] // 6, 3), generator=rng, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC)


def test_hf_preset_gives_the_ids_pixels_and_answers_of_transformers(hf_folder, processor):
    mine = assistant.load(ChatOptions((hf_folder,), device="cpu", preset="hf"))
    chat = ask(Chat(), "What is\nshown?", [picture(photo(), mine)])
    chat = dataclasses.replace(chat, turns=(*chat.turns, ("gpt", "A cat </s>.")))
    chat = ask(chat, "And <image> there?", [picture(photo((30, 44)), mine)])
    chat = dataclasses.replace(chat, feats=conversation.features(mine, chat.pictures, {}))
    said = "USER: <image>\nWhat is\nshown? ASSISTANT: A cat </s>.</s>USER: And <image> there? ASSISTANT:"
    inputs = processor(images=[photo(), photo((30, 44))], text=said, return_tensors="pt")
    (asked, _), marker = conversation.prompt(mine, chat, D), processor.tokenizer.convert_tokens_to_ids("<image>")
    want = [mine.tokenizer.bos, *[IMAGE if i == marker else i for i in inputs["input_ids"][0].tolist()]]
    assert list(asked.ids) == want
    model = layouts.hf_model(dtype=torch.float32)
    model.load_state_dict(layouts.hf_model().float().state_dict())
    with torch.no_grad():
        feats = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(asked.feats, torch.cat(list(feats)), rtol=1e-4, atol=1e-4)
    ids = torch.where(torch.tensor([want]) == IMAGE, layouts.C.llama.vocab, torch.tensor([want]))
    out = model.generate(
        input_ids=ids, pixel_values=inputs["pixel_values"], max_new_tokens=12, do_sample=False,
        suppress_tokens=list(range(layouts.C.llama.vocab, layouts.PADDED)),
    )[0, len(want) :].tolist()  # fmt: skip
    ((found,),) = conversation.answers(mine, [chat], D)
    assert list(found.ids) == (out[: out.index(2)] if 2 in out else out)


def test_original_preset_is_llavas_own_prompt_and_pads_the_picture(hf_folder, tokenizer):
    mine = assistant.load(ChatOptions((hf_folder,), device="cpu", preset="original"))
    shot = picture(photo(), mine)
    chat = ask(Chat(feats={shot.key: torch.zeros(4, layouts.C.llama.width)}), "What is shown?", [shot])
    asked, _ = conversation.prompt(mine, chat, D)
    spiece = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    system = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: "
    )
    pieces = [spiece.encode(piece) for piece in (system, "\nWhat is shown? ASSISTANT:")]
    assert list(asked.ids) == [1, *pieces[0], *[IMAGE] * 4, *pieces[1]]
    cropped = picture(photo(), assistant.load(ChatOptions((hf_folder,), device="cpu", preset="hf")))
    assert not torch.equal(shot.pixels, cropped.pixels) and shot.pixels[:, 0, 0].tolist() == [122, 116, 104]


def test_a_picture_is_the_same_by_path_bytes_base64_and_pillow(a, emojis):
    path = sorted((emojis / "images").iterdir())[0]
    content = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    opened = Image.open(io.BytesIO(content))
    grown = Image.open(path).convert("RGBA")
    keys = {picture(s, a).key for s in (path, str(path), content, url, opened, grown)}
    assert len(keys) == 1
    assert picture(Image.new("L", (9, 9)), a).pixels.shape == (3, 16, 16)


@pytest.mark.parametrize(
    "source, said",
    [
        ("no/such.png", "no/such.png: cannot be read .No such file or directory.; correct the path"),
        ("data:image/png;base64,@@", "no base64"),
        ("data:image/png,abc", "a data URL begins with data:image/...;base64"),
        ("data:image/png;base64,aGFsbG8=", "not one of JPEG, PNG"),
        (b"", "the file is empty"),
        (Image.new("1", (20_000, 10_000)), "20000x10000 = 200000000 pixels, over the limit of 89478485"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_is_no_picture_is_refused_by_name(a, source, said):
    with pytest.raises(BadRecord, match=said):
        picture(source, a)


def test_a_file_of_200_megapixels_is_refused_before_it_is_decoded(a, tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.tif", compression="group4")
    with pytest.raises(BadRecord, match="huge.tif: over the limit of 89478485 pixels"):
        picture(tmp_path / "huge.tif", a)


def test_questions_place_their_pictures(pictures):
    one, two = pictures[:2]
    assert ask(Chat(), "What?", [one]).turns == (("human", "<image>\nWhat?"),)
    assert ask(Chat(), "What?", [one, two]).turns == (("human", "<image>\n<image>\nWhat?"),)
    assert ask(Chat(), "Is <image> like <image>?", [two, one]).pictures == (two, one)
    assert ask(Chat(), "", [one]).turns == (("human", "<image>"),)
    for question, given in (("a <image>", []), ("<image> <image>", [one]), ("<image>", [one, two])):
        with pytest.raises(BadRecord, match=f"{question.count('<image>')} <image> in .* but {len(given)} images"):
            ask(Chat(), question, given)


def test_marks_and_pictures_of_a_whole_conversation_must_agree(a, pictures):
    chat = Chat((("human", "<image> and <image>"),), tuple(pictures[:1]))
    with pytest.raises(BadRecord, match="the prompt has 2 <image> but 1 images"):
        conversation.prompt(a, chat, D)


def test_a_prompt_longer_than_the_context_is_named_and_never_cut(a, pictures):
    small = dataclasses.replace(a, context=300)
    chat = ask(Chat(), "word " * 30, pictures[:2])
    chat = dataclasses.replace(chat, feats=conversation.features(a, chat.pictures, {}))
    n = len(conversation.prompt(a, chat, D)[0].ids)
    said = f"the prompt has {n} tokens, 8 of them for 2 images; with tokens={301 - n} for the answer .* context of 300"
    with pytest.raises(BadRecord, match=said):
        conversation.prompt(small, chat, dataclasses.replace(D, tokens=301 - n))
    assert len(conversation.prompt(small, chat, dataclasses.replace(D, tokens=300 - n))[0].ids) == n


QUESTIONS = (("What is this?", 1), ("And <image> beside <image>?", 2), ("So?", 0), ("Again <image>", 1))


def test_turns_on_one_cache_say_what_a_full_prefill_says_and_prefill_only_what_is_new(a, pictures, monkeypatch):
    rows, chat, at = count_tokens(monkeypatch), Chat(), 0
    for question, images in QUESTIONS:
        chat = ask(chat, question, pictures[at : at + images])
        fresh = Chat(chat.turns, chat.pictures)
        held, rows[:] = chat.cached, []
        chat, want = last(reply(a, chat, D)), last(reply(a, fresh, D))
        assert chat.turns == want.turns and chat.cached == want.cached
        same = list(takewhile(lambda pair: pair[0] == pair[1], zip(held, want.cached, strict=False)))
        assert rows[0] == rows[1] - len(same)
        assert not held or rows[0] < rows[1] / 2
        at += images
    text = "".join(said for _, said in chat.turns)
    assert "</s>" not in text and len({said for role, said in chat.turns if role == "gpt"}) > 1
    n = len(chat.cached)
    same_but_rounded(chat.cache.k[:, 0, :n], want.cache.k[:, 0, :n])


def test_another_picture_at_the_same_place_is_not_taken_for_the_one_in_the_cache(a, pictures):
    one = last(reply(a, ask(Chat(), "What is it?", pictures[:1]), D))
    for j in (1, 2, 3):
        other = ask(undo(one), "What is it?", pictures[j : j + 1])
        assert last(reply(a, other, D)).turns == last(reply(a, Chat(other.turns, other.pictures), D)).turns


def test_a_question_asked_again_is_answered_from_the_cache_alone(a, pictures, monkeypatch):
    rows = count_tokens(monkeypatch)
    one = last(reply(a, ask(Chat(), "What is it?", pictures[:1]), D))
    again = last(reply(a, ask(undo(one), "What is it?", pictures[:1]), D))
    assert again.turns == one.turns and rows[1] == 1


def test_the_cache_holds_the_prompt_and_all_tokens_of_the_answer_but_the_last(a, pictures):
    chat = ask(Chat(feats=conversation.features(a, pictures[:1], {})), "What is it?", pictures[:1])
    _, keys = conversation.prompt(a, chat, D)
    ((said,),) = conversation.answers(a, [chat], D)
    assert not said.ended and last(reply(a, chat, D)).cached == (*keys, *said.ids[:-1])


def test_history_ends_each_answer_with_one_eos(a, pictures):
    chat = last(reply(a, ask(Chat(), "What?", pictures[:1]), D))
    chat = ask(chat, "And?")
    ids = list(conversation.prompt(a, chat, D)[0].ids)
    assert ids.count(a.tokenizer.eos) == 1 and ids.count(a.tokenizer.bos) == 1


def test_undo_takes_back_the_last_question_its_pictures_and_its_answer(a, pictures):
    first = last(reply(a, ask(Chat(), "What?", pictures[:1]), D))
    second = last(reply(a, ask(first, "And <image> or <image>?", pictures[1:3]), D))
    assert (undo(second).turns, undo(second).pictures) == (first.turns, first.pictures)
    assert undo(undo(undo(second))).turns == ()
    again = ask(undo(second), "So?")
    assert last(reply(a, again, D)).turns == last(reply(a, Chat(again.turns, again.pictures), D)).turns


def test_features_are_computed_once_for_each_picture(a, pictures, monkeypatch):
    counts, features = [], decode.features
    monkeypatch.setattr(decode, "features", lambda m, x: counts.append(len(x)) or features(m, x))
    known = conversation.features(a, [*pictures[:2], *pictures[:2]], {})
    known = conversation.features(a, pictures[1:4], known)
    again = conversation.features(a, pictures[:4], known)
    assert counts == [2, 2] and again.keys() == known.keys() and len(counts) == 2
    want = features(a.model, torch.stack([s.pixels for s in pictures[:4]])).split(4)
    for shot, feats in zip(pictures, want, strict=False):
        torch.testing.assert_close(known[shot.key], feats, rtol=1e-4, atol=1e-4)  # of another number of images at once


def test_only_so_many_features_are_kept(a, pictures, monkeypatch):
    monkeypatch.setattr(conversation, "KEPT", 1)
    known = conversation.features(a, pictures[:3], {})
    after = conversation.features(a, pictures[3:4], known)
    assert list(after) == [pictures[2].key, pictures[3].key]


def test_pieces_make_the_answer_that_a_batch_gives(a, pictures):
    d = Decoding(tokens=30, temperature=1.5, seed=3)
    chats = [ask(Chat(), f"What {j}?", pictures[: j % 3]) for j in range(4)]
    for chat, (want,) in zip(chats, conversation.answers(a, chats, d), strict=True):
        pieces = list(reply(a, chat, d))
        assert "".join(s.new for s in pieces) == want.text
        assert pieces[-1].chat.turns[-1] == ("gpt", want.text.strip())


@pytest.mark.parametrize(
    "whole, stop, want",
    [
        ("caf\ufffd", (), "caf"),
        ("caf\ufffd\ufffd", (), "caf"),
        ("ab\ufffdc", (), "ab\ufffdc"),
        ("one #", ("###",), "one "),
        ("one ##", ("###",), "one "),
        ("one ## two", ("###",), "one ## two"),
        ("one ### two", ("###", "one"), ""),
        ("one ### two", ("###",), "one "),
        ("say ST", ("STOP", "T!"), "say "),
    ],
)
def test_what_may_still_change_is_held_back(whole, stop, want):
    assert conversation.visible(whole, stop, False) == want
    ended = whole if not any(s in whole for s in stop) else want
    assert conversation.visible(whole, stop, True) == ended


def test_characters_of_several_tokens_come_whole(a):
    text = "a 猫 and 🧑‍🚒 é"
    ids = a.tokenizer.encode(" " + text)
    assert len(ids) > len(text)
    parts = [conversation.visible(a.tokenizer.decode(ids[:n]), (), False) for n in range(1, len(ids) + 1)]
    assert all(text.startswith(part) for part in parts) and parts[-1] == text


def test_a_caption_ends_at_its_newline_and_a_stop_text_is_cut(captioner, a, emojis, pictures):
    shot = picture(sorted((emojis / "images").iterdir())[0], captioner)
    chat = ask(Chat(), "", [shot])
    assert 13 in assistant.vocabulary(captioner).ends and assistant.vocabulary(a).ends[-1] == a.tokenizer.eos
    text = last(reply(captioner, chat, Decoding(tokens=40))).turns[-1][1]
    assert "\n" not in text
    chat = ask(Chat(), "What?", pictures[:1])
    free = last(reply(a, chat, Decoding(tokens=40))).turns[-1][1]
    stop = free[7:9]
    assert last(reply(a, chat, Decoding(tokens=40, stop=(stop,)))).turns[-1][1] == free[: free.index(stop)].strip()


@pytest.mark.parametrize("template, end", [("plain", "\n"), ("llava_v0", "###"), ("mpt", "<|im_end|>"), ("v1", None)])
def test_what_ends_an_answer_in_a_template_is_a_stop_text(a, template, end):
    form = dataclasses.replace(a.form, template=template)
    stop = assistant.with_stop(dataclasses.replace(a, form=form), Decoding(stop=("x",))).stop
    assert stop == (("x", end) if end else ("x",))


def test_a_step_is_compiled_if_that_is_asked_for(a, weights, pictures):
    m = options.ChatOptions((weights / "vicuna_v1",), device="cpu", compile="eager")
    compiled, d = assistant.load(m), Decoding(tokens=3)
    assert a.model.step is llama.decode_step and compiled.model.step is not llama.decode_step
    chat = ask(Chat(), "What?", pictures[:1])
    assert last(reply(compiled, chat, d)).turns == last(reply(a, chat, d)).turns
    with pytest.raises(ValueError, match="compile=nothing is no backend of torch.compile; there are: .*inductor"):
        assistant.load(dataclasses.replace(m, compile="nothing"))


def test_an_answer_that_grows_has_no_beams(a, pictures):
    with pytest.raises(ValueError, match="one sample and no beams"):
        next(reply(a, ask(Chat(), "What?"), Decoding(beams=2)))


def test_layouts_of_others_say_their_template(tmp_path, tokenizer):
    folder = layouts.write_liuhaotian(tmp_path / "x", layouts.hub(layouts.hf_model()), True, tokenizer.model)
    a = assistant.load(ChatOptions((Path(folder),), device="cpu"))
    assert a.form == Form("v1", "pad") and assistant.warning(a) == ""
