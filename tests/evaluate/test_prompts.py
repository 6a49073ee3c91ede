"""Prompts to the character and to the token, against strings that were written down and LLaVA's own rule for images."""

import json

import pytest
import sentencepiece
import tsvs

from llava_fn.batch import IMAGE
from llava_fn.data import text
from llava_fn.data.templates import template_of
from llava_fn.evaluate import prompts, tsv
from llava_fn.evaluate.records import Question
from llava_fn.generate.options import Form

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: "
)
USER = HUMAN.replace("human", "user")
TAIL = "\nAnswer with the option's letter from the given choices directly."
VLMEVALKIT = {
    "choice": HUMAN + ' <image> What is "A"?\nA. None\nB. NA\nC. 007\nD. =1+1' + TAIL + " ASSISTANT: ",
    "chartqa": HUMAN + " <image> How many in 2000?\nAnswer the question using a single word or phrase. ASSISTANT: ",
    "docvqa": HUMAN + " <image> What is the name of the company?\nAnswer the question using a single word or phrase."
    " ASSISTANT: ",
    "mmmu": HUMAN + " <image>  <image> Which of <image 1> and <image 2>?\nA. <image 1>\nB. <image 2>" + TAIL
    + " ASSISTANT: ",
}  # fmt: skip
OWN = Form("hf", "square", "hf")


def prompt(table, j, name="vlmevalkit", own=OWN):
    q, s = table.questions[j], prompts.style(name, own)
    return prompts.parts(s, prompts.question_text(q, table.dataset.kind), len(table.pictures[q.index]))


@pytest.mark.parametrize("kind", tsvs.ALL)
def test_prompt_of_each_kind_is_vlmevalkits_to_the_character(kind, tmp_path):
    table = tsv.open_table(tsvs.ALL[kind](tmp_path))
    assert prompts.shown(prompt(table, 0)) == VLMEVALKIT[kind]


def test_prompt_of_llava_has_images_in_front_and_no_blank_behind(tmp_path):
    table = tsv.open_table(tsvs.mmmu(tmp_path))
    body = "Which of <image 1> and <image 2>?\nA. <image 1>\nB. <image 2>" + TAIL
    assert prompts.shown(prompt(table, 0, "llava")) == f"{USER}<image>\n<image>\n{body} ASSISTANT:"
    assert prompts.shown(prompt(table, 0, "own")) == f"USER: <image>\n<image>\n{body} ASSISTANT:"
    with pytest.raises(ValueError, match="own: these weights know only captions"):
        prompts.style("own", Form("plain", "square"))
    tagged = prompts.shown(prompt(table, 0, "own", Form("v1_mmtag", "pad")))
    assert "USER: <Image><image></Image>\n<Image><image></Image>\nWhich of" in tagged


def test_hints_open_questions_and_chinese(tmp_path):
    asked = [prompts.shown(prompt(tsv.open_table(tsvs.mmmu(tmp_path)), j)) for j in range(5)]
    assert asked[1] == HUMAN + " <image> How long is it in m?\nAnswer the question directly. ASSISTANT: "
    letters = "".join(f"\n{x}. option {x}" for x in "ABCDEFGHI")
    assert asked[2] == HUMAN + f" <image> __import__('os').system('touch hacked'){letters}{TAIL} ASSISTANT: "
    chinese = json.loads('"\\u770b\\n\\u8fd9\\u662f\\u4ec0\\u4e48?\\nA. \\u732b\\nB. \\u72d7"')
    tail = json.loads('"\\n\\u8bf7\\u76f4\\u63a5\\u56de\\u7b54\\u9009\\u9879\\u5b57\\u6bcd\\u3002"')
    assert asked[3] == f"{HUMAN} <image> {chinese}{tail} ASSISTANT: "
    assert asked[4] == HUMAN + " <image> Look twice.\nPick.\nA. 12\nB. 12.5" + TAIL + " ASSISTANT: "


@pytest.mark.parametrize("last, tail", [("\u4e00", 1), ("\u9fff", 1), ("\u3400", 0), ("\ua000", 0), ("\u00e9", 0)])
def test_chinese_is_what_vlmevalkit_takes_for_it(last, tail):
    for cells, tails in (({"A": last}, prompts.LETTER), ({"hint": last}, prompts.DIRECTLY)):
        q = Question(0, "0", {"question": "x"} | cells, "")
        assert prompts.question_text(q, "choice").endswith(tails[tail])
        assert prompts.question_text(q, "chartqa") == "x" + prompts.PHRASE
    assert tails[1] == json.loads('"\\n\\u8bf7\\u76f4\\u63a5\\u56de\\u7b54\\u95ee\\u9898\\u3002"')


def test_gaps_between_the_options_stay():
    q = Question(0, "0", {"question": "x", "A": "1", "B": "", "C": "3", "AA": "no", "hint": ""}, "")
    assert prompts.question_text(q, "mmmu") == "x\nA. 1\nC. 3" + TAIL


def peer_ids(string, tokenizer):
    """LLaVA mm_utils.py tokenizer_image_token: cut at "<image>", each piece tokenized alone, one BOS in front.

    Of text without control tokens the slow LlamaTokenizer gives what sentencepiece gives.
    """
    words = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    out = [words.bos_id()]
    for j, piece in enumerate(string.split("<image>")):
        out += ([IMAGE] if j else []) + words.encode(piece)
    return out


@pytest.mark.parametrize("name", ["vlmevalkit", "llava"])
@pytest.mark.parametrize("kind", tsvs.ALL)
def test_tokens_are_those_of_llavas_rule_for_images(kind, name, tmp_path, tokenizer):
    table = tsv.open_table(tsvs.ALL[kind](tmp_path))
    for j, q in enumerate(table.questions):
        cut = prompt(table, j, name)
        if "<image>" not in q.cells["question"]:
            assert text.pieces(cut, tokenizer) == peer_ids(prompts.shown(cut), tokenizer)


def test_tokens_of_own_templates_are_those_of_a_conversation(tmp_path, tokenizer):
    table = tsv.open_table(tsvs.mmmu(tmp_path))
    for form in (OWN, Form("vicuna_v1", "pad"), Form("chatml_direct", "pad"), Form("v1_mmtag", "pad", "legacy")):
        for j, q in enumerate(table.questions):
            marks = "<image>\n" * len(table.pictures[q.index])
            turns = [("human", marks + prompts.question_text(q, "mmmu"))]
            want = text.prompt(turns, template_of(form.template), tokenizer, form.compat)
            assert text.pieces(prompt(table, j, "own", form), tokenizer, form.compat) == want


def test_only_what_follows_an_image_or_nothing_gets_a_space_in_front(tokenizer):
    want = [tokenizer.bos, *tokenizer.encode(" a b"), *tokenizer.encode("c"), IMAGE, *tokenizer.encode(" d")]
    assert text.pieces(("", "a b", "", "c", None, "", "d"), tokenizer) == want


@pytest.mark.parametrize("name", ["vlmevalkit", "llava", "own"])
def test_image_in_a_question_is_text_and_no_place_for_an_image(name, tmp_path, tokenizer):
    table = tsv.open_table(tsvs.ai2d(tmp_path))
    q = table.questions[2]
    assert q.cells["question"] == "What does <image> show?"
    ids = text.pieces(prompt(table, 2, name), tokenizer)
    assert ids.count(IMAGE) == 1 and len(table.pictures[q.index]) == 1
    assert "What does <image> show?" in tokenizer.decode(ids[ids.index(IMAGE) + 1 :])
    control = Question(0, "0", {"question": "a </s><s> b"}, "")
    cut = prompts.parts(prompts.style(name, OWN), prompts.question_text(control, "chartqa"), 0)
    ids = text.pieces(cut, tokenizer)
    assert tokenizer.eos not in ids and ids.count(tokenizer.bos) == 1 and IMAGE not in ids
