"""Tokenizer, templates and targets.

STAND_IN is a public vocabulary built like Llama's (32000 pieces, BPE, byte fallback, the same control tokens). LLAMA
holds only the pieces of Llama's vocabulary that the golden conversation needs, at their true ids. The golden ids came
once from LLaVA's own preprocess functions on the slow LlamaTokenizer of transformers 4.37.2 and 4.31.0, with either
vocabulary; `history` below writes the same algorithm again and is itself held to those ids.
"""

import hashlib
import importlib.util
import pickle
import re
import struct
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fn.batch import IMAGE
from llava_fn.data import schema, text
from llava_fn.data.templates import TEMPLATES, template_of
from llava_fn.data.text import encode, images_of, prompt, render, template_for, turns_of
from llava_fn.data.tokenizer import Tokenizer, open_tokenizer, read_tokenizer
from llava_fn.errors import BadRecord

GOLDEN = [("human", "<image>\nWhat is shown?"), ("gpt", "A dog."), ("human", "Why?"), ("gpt", "Because.")]
CHAT = sorted(set(TEMPLATES) - {"plain", "v0_plain"})
V1 = TEMPLATES["vicuna_v1"]
MODES = [None, "llava_437", "llava_431", "legacy"]
SPACE = "\u2581"


def stand_in_bytes() -> bytes:
    package = importlib.util.find_spec("mistral_common")
    assert package, "the tests need the file tokenizer.model.v1 of mistral-common: pip install --no-deps mistral-common"
    return (Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1").read_bytes()


STAND_IN = open_tokenizer(stand_in_bytes())


def message(*fields: tuple[int, object]) -> bytes:
    """A protobuf message of (number, int | float | bytes | str) fields."""
    out = []
    for number, value in fields:
        if isinstance(value, int):
            out += [varint(number << 3), varint(value)]
        elif isinstance(value, float):
            out += [varint(number << 3 | 5), struct.pack("<f", value)]
        else:
            value = value.encode() if isinstance(value, str) else value
            out += [varint(number << 3 | 2), varint(len(value)), value]
    return b"".join(out)


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def model(pieces: dict[int, str], size: int, eos="</s>", byte_fallback=1, squeeze=0) -> bytes:
    """A BPE sentencepiece model: `pieces` at their ids, earlier ids merge first; all other ids are unused."""
    normal, unknown, control, unused, byte = 1, 2, 3, 5, 6
    fixed = {0: ("<unk>", unknown), 1: ("<s>", control), 2: (eos, control)}
    fixed |= {i + 3: (f"<0x{i:02X}>", byte if byte_fallback else unused) for i in range(256)}
    fixed |= {i: (piece, normal) for i, piece in pieces.items()}
    rows = [fixed.get(i, (f"<none {i}>", unused)) for i in range(size)]
    table = [(1, message((1, piece), (2, -float(i)), (3, kind))) for i, (piece, kind) in enumerate(rows)]
    trainer = message((3, 2), (35, byte_fallback))
    normalizer = message((1, "identity"), (3, 1), (4, squeeze), (5, 1))
    return message(*table, (2, trainer), (3, normalizer))


LLAMA_PIECES = """
_t=260 er=261 in=262 _a=263 en=264 on=265 _th=266 es=267 _s=269 _d=270 at=271 an=273 _c=274 is=275 re=276 it=277
_the=278 le=280 _p=282 ou=283 al=284 _b=289 ion=291 ic=293 el=295 _in=297 _h=298 nd=299 et=300 _to=304 _u=318 _A=319
_and=322 _T=323 ol=324 _g=330 ur=332 ig=335 _re=337 _is=338 qu=339 ow=340 est=342 se=344 ce=346 _B=350 ul=352 he=354
if=361 _an=385 ist=391 _W=399 _as=408 ers=414 ant=424 _do=437 _qu=439 iv=440 _The=450 ile=488 _U=501 _us=502 ell=514
_ch=521 _sh=528 _ar=564 ite=568 au=585 estion=602 ial=616 ence=663 ous=681 ec=687 we=705 own=776 _Wh=806 ific=928
_int=938 ER=1001 _bet=1010 ause=1071 _hel=1081 _question=1139 eta=1187 _ass=1223 _pol=1248 ST=1254 ful=1319 _help=1371
_user=1404 ween=1452 _giv=1517 _between=1546 _art=1616 SS=1799 AN=2190 iled=2356 hat=2455 _red=2654 ious=2738 sw=2774
_US=3148 _cur=3151 US=3308 _Why=3750 _gives=4076 _shown=4318 _questions=5155 What=5618 ecause=5658 swers=5956
_answers=6089 _cat=6635 _assist=6985 _Because=7311 _helpful=8444 IST=9047 ellig=9347 _dog=11203 etailed=11881 USER=11889
_curious=12758 _intellig=13052 _detailed=13173 _chat=13563 ANT=13566 _artific=19069 _assistant=20255
_intelligence=21082 _artificial=23116 _=29871 s=29879 .=29889 ,=29892 :=29901 '=29915 ?=29973
"""


@cache
def llama() -> Tokenizer:
    rows = [row.rsplit("=", 1) for row in LLAMA_PIECES.split()]
    return open_tokenizer(model({int(i): piece.replace("_", SPACE) for piece, i in rows}, 32000))


def ints(row: str) -> list[int]:
    return [int(i) for i in row.split()]


LLAMA_GOLDEN = """
1 319 13563 1546 263 12758 1404 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 29892 322 1248 568 6089
304 278 1404 29915 29879 5155 29889 3148 1001 29901 29871 -200 29871 13 5618 338 4318 29973 319 1799 9047 13566 29901
319 11203 29889 2 {user} 29901 3750 29973 319 1799 9047 13566 29901 7311 29889 2
"""
STAND_IN_GOLDEN = """
1 330 10706 1444 264 13903 2188 304 396 18278 10895 13892 28723 415 13892 5212 10865 28725 10537 28725 304 27057 11194
298 272 2188 28742 28713 4224 28723 2223 725 28747 28705 -200 28705 13 3195 349 4894 28804 8602 8048 12738 28747
330 3914 28723 2 {user} 28747 4315 28804 8602 8048 12738 28747 5518 28723 2
"""
# How "USER" after "</s>" was encoded: the one place where the three histories differ on ordinary records.
LLAMA_USER = {None: "11889", "llava_437": "11889", "llava_431": "3308 1001", "legacy": "3148 1001"}
STAND_IN_USER = {None: "11123", "llava_437": "11123", "llava_431": "2252 725", "legacy": "2223 725"}


@pytest.mark.parametrize("compat", MODES)
def test_golden_conversation_has_the_ids_and_targets_of_llava(compat):
    got = encode(GOLDEN, V1, llama(), compat)
    assert got.ids == ints(LLAMA_GOLDEN.format(user=LLAMA_USER[compat]))
    assert targets(got) == [319, 11203, 29889, 2, 7311, 29889, 2]
    got = encode(GOLDEN, V1, STAND_IN, compat)
    assert got.ids == ints(STAND_IN_GOLDEN.format(user=STAND_IN_USER[compat]))
    assert targets(got) == [330, 3914, 28723, 2, 5518, 28723, 2]


@pytest.mark.parametrize("compat", MODES)
def test_caption_and_newline_are_the_targets_of_plain_without_eos(compat):
    turns = [("human", "Describe it briefly.\n<image>"), ("gpt", "a red cat")]
    assert render(turns, TEMPLATES["plain"]) == "<image>a red cat\n"
    for tokenizer, ids in ((llama(), [1, -200, 263, 2654, 6635, 13]), (STAND_IN, [1, -200, 264, 2760, 5255, 13])):
        got = encode(turns, TEMPLATES["plain"], tokenizer, compat)
        assert got.ids == ids
        assert got.supervised == [False, False, True, True, True, True]
        assert prompt(turns[:1], TEMPLATES["plain"], tokenizer, compat) == ids[:2]


def targets(encoded: text.Encoded) -> list[int]:
    return [i for i, target in zip(encoded.ids, encoded.supervised, strict=True) if target]


# LLaVA's own algorithm, from its description: a whole prompt is tokenized, then every round again for its length.


@cache
def bare_processor() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=STAND_IN.model)


def pieces_of(text: str) -> list[str]:
    return bare_processor().encode(text, out_type=str)  # with the dummy prefix


def unprefixed(text: str) -> list[str]:
    """Pieces of `text` without the dummy prefix, by encoding it behind an emoji: bytes never merge with text."""
    guard = pieces_of("\U0001f600")
    got = pieces_of("\U0001f600" + text)
    assert got[: len(guard)] == guard
    return got[len(guard) :]


def slow_tokenizer(chunk: str, compat: str) -> list[int]:
    """LlamaTokenizer(chunk).input_ids."""
    if compat != "legacy" and chunk:
        chunk = SPACE + chunk.replace(SPACE, " ")
    pieces = ["<s>"]
    for run in filter(None, re.split("(</?s>|<unk>)", chunk)):
        if run in ("<s>", "</s>", "<unk>"):
            pieces += [run]
        elif compat == "legacy":
            pieces += pieces_of(run)
        elif compat == "llava_437":
            pieces += unprefixed(run)
        elif run.startswith(SPACE):
            pieces += pieces_of(run[1:])
        else:
            new = pieces_of(run)
            pieces += new if run.startswith(" ") else [p for p in [new[0][1:]] if p] + new[1:]
    if pieces[1:2] == [SPACE] and pieces[2:3] in (["<s>"], ["</s>"], ["<unk>"]):
        del pieces[1]
    return [bare_processor().piece_to_id(piece) for piece in pieces]


def image_tokens(text: str, compat: str) -> list[int]:
    first, *rest = [slow_tokenizer(chunk, compat) for chunk in text.split("<image>")]
    return first + [i for chunk in rest for i in [IMAGE, *chunk[1:]]]


def history(turns, template, compat, sep) -> tuple[list[int], list[bool]]:
    """Ids and targets as preprocess_v1 (sep " ASSISTANT: ") and preprocess_llama_2 (sep "[/INST] ") made them."""
    text = render(turns, template)
    ids = image_tokens(text, compat)
    target, at = [False] + [True] * (len(ids) - 1), 1
    for i, a_round in enumerate(filter(None, text.split("</s>"))):
        question, _ = a_round.split(sep)
        length = len(image_tokens(a_round, compat))
        masked = len(image_tokens(question + sep, compat)) - 2
        shift = int(i > 0 and compat == "llava_437" and sep == " ASSISTANT: ")
        target[at : at + masked - shift] = [False] * (masked - shift)
        at += length - shift
    assert at == len(ids), "tokenization mismatch"
    return ids, target


@pytest.mark.parametrize("compat", MODES[1:])
def test_history_oracle_has_the_golden_ids(compat):
    ids, target = history(GOLDEN, V1, compat, " ASSISTANT: ")
    assert ids == ints(STAND_IN_GOLDEN.format(user=STAND_IN_USER[compat]))
    assert [i for i, t in zip(ids, target, strict=True) if t] == [330, 3914, 28723, 2, 5518, 28723, 2]


WORDS = ["a", "cat", " ", "  ", "\n", "12", "dog.", "USER", ":", "<", ">", "    x", "The", "\u732b", "\U0001f600"]
ORDINARY = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map("".join).filter(str.strip)
HOSTILE = (
    st.lists(
        st.sampled_from(
            WORDS + ["</s>", "<s>", "<unk>", "<0x0A>", "[INST]", " ASSISTANT: ", "<|im_end|>", "###", SPACE]
        ),
        min_size=1,
        max_size=8,
    )
    .map("".join)
    .filter(lambda text: text.replace(SPACE, " ").strip())
)


def conversations(questions, answers):
    pair = st.tuples(questions, answers)
    return st.lists(pair, min_size=1, max_size=3).map(
        lambda pairs: [turn for q, a in pairs for turn in (("human", q), ("gpt", a))]
    )


IMAGED = st.one_of(ORDINARY, ORDINARY.map("<image>\n{}".format), st.just("<image>"), ORDINARY.map("{} <image>".format))


@settings(max_examples=60, deadline=None)
@given(conversations(IMAGED, ORDINARY))
def test_compat_has_the_ids_and_targets_that_llava_made(turns):
    for compat in MODES[1:]:
        got = encode(turns, V1, STAND_IN, compat)
        assert (got.ids, got.supervised) == history(turns, V1, compat, " ASSISTANT: ")
        for template in (TEMPLATES["llava_llama_2"], TEMPLATES["mistral_instruct"]):
            got = encode(turns, template, STAND_IN, compat)
            assert (got.ids, got.supervised) == history(turns, template, compat, "[/INST] ")


@settings(max_examples=40, deadline=None)
@given(ORDINARY, st.one_of(ORDINARY, st.just("")), st.one_of(ORDINARY, st.just(SPACE)))
def test_compat_splits_control_tokens_in_a_question_as_llava_did(before, middle, after):
    question = f"{before}<s>{middle}<s>{after}"
    for compat in MODES[1:]:
        turns = [("human", f"<image>\n{question}"), ("gpt", "Yes"), ("human", question), ("gpt", "No")]
        got = encode(turns, V1, STAND_IN, compat)
        assert (got.ids, got.supervised) == history(turns, V1, compat, " ASSISTANT: ")
        assert got.ids.count(STAND_IN.bos) == 5


@settings(max_examples=60, deadline=None)
@given(conversations(IMAGED, ORDINARY), st.sampled_from(CHAT))
def test_default_mode_equals_llava_437_on_ordinary_records(turns, name):
    assert encode(turns, TEMPLATES[name], STAND_IN) == encode(turns, TEMPLATES[name], STAND_IN, "llava_437")


@settings(max_examples=60, deadline=None)
@given(conversations(IMAGED, ORDINARY), st.sampled_from(CHAT), st.sampled_from(MODES))
def test_prompt_is_the_beginning_of_the_training_sequence_up_to_the_answer(turns, name, compat):
    template = TEMPLATES[name]
    whole, start = encode(turns, template, STAND_IN, compat), prompt(turns[:-1], template, STAND_IN, compat)
    assert whole.ids[: len(start)] == start
    assert all(whole.supervised[len(start) :])
    assert not whole.supervised[len(start) - 1]


def test_prompt_ends_with_the_colon_and_no_space():
    ids = prompt(GOLDEN[:1], V1, STAND_IN)
    assert ids == ints(STAND_IN_GOLDEN.format(user=""))[: len(ids)]
    assert STAND_IN.decode(ids[-4:]) == "ASSISTANT:"


def spans(encoded: text.Encoded) -> list[list[int]]:
    """The maximal runs of targets."""
    runs, before = [], False
    for i, target in zip(encoded.ids, encoded.supervised, strict=True):
        if target:
            runs = runs if before else [*runs, []]
            runs[-1].append(i)
        before = target
    return runs


@settings(max_examples=100, deadline=None)
@given(conversations(HOSTILE, ORDINARY), st.sampled_from(CHAT))
def test_targets_spell_exactly_the_answers_and_their_ends(turns, name):
    template = TEMPLATES[name]
    got = spans(encode(turns, template, STAND_IN))
    answers = [answer for role, answer in turns if role == "gpt"]
    assert len(got) == len(answers)
    for ids, answer in zip(got, answers, strict=True):
        if "</s>" in template.end:
            assert ids[-1] == STAND_IN.eos
        want = template.lead + answer + template.end.replace("</s>", "")
        assert STAND_IN.decode(ids) == want.removeprefix(" ")


@settings(max_examples=150, deadline=None)
@given(conversations(HOSTILE, ORDINARY), st.sampled_from(CHAT))
def test_no_text_makes_a_control_token_in_default_mode(turns, name):
    template = TEMPLATES[name]
    rounds = len(turns) // 2
    ids = encode(turns, template, STAND_IN).ids
    assert ids.count(STAND_IN.eos) == rounds * template.end.count("</s>")
    assert ids.count(STAND_IN.bos) == 1 + (rounds - 1) * template.next.count("<s>")
    assert 0 not in ids
    ids = prompt([("human", "Hi"), ("gpt", turns[0][1]), turns[0]], template, STAND_IN)
    assert ids.count(STAND_IN.eos) == template.end.count("</s>")


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE), max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.one_of(TEXT, HOSTILE.map(lambda text: text.replace(SPACE, "_"))))
def test_decode_inverts_encode(text):
    assert STAND_IN.decode(STAND_IN.encode(" " + text)) == text
    if not text.startswith(" "):
        assert STAND_IN.decode(STAND_IN.encode(text)) == text
    assert not {0, STAND_IN.bos, STAND_IN.eos} & set(STAND_IN.encode(text))


def test_several_images_keep_their_places():
    turns = [("human", "Compare <image> with <image>."), ("gpt", "Same."), ("human", "And <image>?"), ("gpt", "No.")]
    ids = encode(turns, V1, STAND_IN).ids
    cuts = [i for i, token in enumerate(ids) if token == IMAGE]
    pieces = [STAND_IN.decode(ids[a + 1 : b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    # From the second piece on the first space is the one of the text; the piece's own is what decode takes off.
    assert pieces[0].endswith("USER: Compare ")
    assert pieces[1:] == [" with ", ". ASSISTANT: Same.USER: And ", "? ASSISTANT: No."]
    for compat in MODES[1:]:
        with pytest.raises(BadRecord, match="LLaVA would have dropped"):
            encode(turns, V1, STAND_IN, compat)


def test_text_image_mark_in_an_answer_of_a_chat_history_is_text():
    ids = prompt([("human", "Write the tag."), ("gpt", "<image>"), ("human", "Thanks")], V1, STAND_IN)
    assert IMAGE not in ids
    assert "ASSISTANT: <image>USER: Thanks" in STAND_IN.decode(ids)


# First 16 digits of the SHA-256 of LLaVA's Conversation.get_prompt() for GOLDEN; "mmtag" with its <Image> tags.
PROMPTS = {
    "chatml_direct": "810c7d70d24eeb94",
    "llama_2": "e946a14863402e02",
    "llava_llama_2": "cb2a88aec6efe3f9",
    "llava_v0": "9b1a24f76b97be98",
    "llava_v1": "22b402623752871f",
    "mistral_direct": "810c7d70d24eeb94",
    "mistral_instruct": "f8c111689cd1ca47",
    "mpt": "a5ecc9cfaa785df0",
    "v0_mmtag": "0b45af7003899f53",
    "v1": "1af6d64a9e06c467",
    "v1_mmtag": "d08c9cdefc5c5d75",
    "vicuna_v1": "1af6d64a9e06c467",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_rendered_prompt_is_that_of_llava(name):
    digest = hashlib.sha256(render(GOLDEN, TEMPLATES[name]).encode()).hexdigest()
    assert digest[:16] == PROMPTS[name]


def test_rendered_prompt_may_be_open():
    assert render(GOLDEN[:3], V1).endswith("ASSISTANT: A dog.</s>USER: Why? ASSISTANT:")
    assert render(GOLDEN[:1], TEMPLATES["mistral_instruct"]) == "[INST] <image>\nWhat is shown? [/INST]"
    assert render(GOLDEN[:1], TEMPLATES["plain"]) == "<image>"
    assert render([("human", "Hi")], TEMPLATES["chatml_direct"]) == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    )


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'vicuna'.*vicuna_v1"):
        template_of("vicuna")
    assert template_of("v1") is TEMPLATES["v1"]
    for function, turns in ((encode, GOLDEN), (prompt, GOLDEN[:3])):
        with pytest.raises(ValueError, match="'llava_4'.*llava_431"):
            function(turns, V1, STAND_IN, "llava_4")


Q, A = ("human", "Why?"), ("gpt", "So.")


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([], "empty"),
        ([Q], "no answer"),
        ([Q, A, Q], "no answer"),
        ([A, Q], "turn 0 is from 'gpt'"),
        ([Q, Q], "turn 1 is from 'human'"),
        ([("user", "Why?"), A], "turn 0 is from 'user'"),
        ([Q, ("gpt", "")], r"turn 1 \(gpt\) is empty"),
        ([Q, ("gpt", " \n")], r"turn 1 \(gpt\) is empty"),
        ([Q, ("gpt", ""), Q, A], r"turn 1 \(gpt\) is empty"),
        ([("human", ""), A], r"turn 0 \(human\) is empty"),
        ([Q, ("gpt", "x</s>y")], r"turn 1 \(gpt\) holds '</s>'"),
        ([Q, ("gpt", "x ASSISTANT: y")], r"turn 1 \(gpt\) holds ' ASSISTANT: '"),
        ([Q, ("gpt", "x ASSISTANT:")], r"turn 1 \(gpt\) holds ' ASSISTANT: '"),
        ([Q, ("gpt", "see <image>")], r"turn 1 \(gpt\) holds <image>"),
        ([Q, ("gpt", "half \ud83d")], "not valid Unicode"),
    ],
)
def test_conversation_that_llava_would_spoil_is_refused(turns, reason):
    for compat in MODES:
        with pytest.raises(BadRecord, match=reason):
            encode(turns, V1, STAND_IN, compat)


@pytest.mark.parametrize("turns", [[], [A], [Q, ("gpt", "")], [Q, Q]])
def test_render_refuses_turns_that_spoil_a_prompt(turns):
    with pytest.raises(BadRecord):
        render(turns, V1)


@pytest.mark.parametrize("mark, name", [("[/INST] ", "llama_2"), ("<|im_end|>", "mpt"), ("###", "llava_v0")])
def test_separator_of_another_template_is_ordinary_text(mark, name):
    turns = [Q, ("gpt", f"x{mark}y")]
    with pytest.raises(BadRecord, match=re.escape(repr(mark))):
        encode(turns, TEMPLATES[name], STAND_IN)
    assert targets(encode(turns, V1, STAND_IN))


@pytest.mark.parametrize("mark", ["</s>", " ASSISTANT: ", "<unk>"])
def test_separator_in_a_question_is_refused_only_where_history_zeroed_it(mark):
    turns = [("human", f"x{mark}y"), A]
    assert STAND_IN.decode(targets(encode(turns, V1, STAND_IN))) == "So."
    assert STAND_IN.decode(prompt(turns[:1], V1, STAND_IN)).endswith(f"USER: x{mark}y ASSISTANT:")
    for compat in MODES[1:]:
        with pytest.raises(BadRecord, match=f"turn 0 .*{mark}"):
            encode(turns, V1, STAND_IN, compat)


@pytest.mark.parametrize("turns", [[Q, A], [("human", "<image> <image>"), A], [("human", "<image>"), A, Q, A]])
def test_plain_takes_one_image_and_its_caption_only(turns):
    with pytest.raises(BadRecord, match="'plain' takes one question"):
        encode(turns, TEMPLATES["plain"], STAND_IN)


@pytest.mark.parametrize("turns, reason", [([], "empty"), ([Q, A], "ends with a question"), ([A], "turn 0 is from")])
def test_prompt_must_end_with_a_question(turns, reason):
    with pytest.raises(BadRecord, match=reason):
        prompt(turns, V1, STAND_IN)


def record(*values: str, image=None, speakers=("human", "gpt")) -> dict:
    turns = [{"from": speakers[i % len(speakers)], "value": value} for i, value in enumerate(values)]
    return {"id": "1", "model": "x", "conversations": turns} | ({} if image is None else {"image": image})


@pytest.mark.parametrize(
    "question, placed",
    [
        ("Why?\n<image>", "<image>\nWhy?"),
        ("<image>Why? ", "<image>\nWhy?"),
        (" Is <image> red?", "<image>\nIs  red?"),
        ("\n<image>\n", "<image>"),
    ],
)
def test_one_image_of_a_question_moves_to_its_front_as_llava_trained(question, placed):
    assert turns_of(record(question, "So.", image="a.jpg")) == [("human", placed), A]


def test_text_without_an_image_and_several_images_stay_as_they_are():
    two = " <image> or <image> "
    assert turns_of(record(two, " b ", " c ", "d", image=["a", "b"])) == [
        ("human", two),
        ("gpt", " b "),
        ("human", " c "),
        ("gpt", "d"),
    ]
    assert turns_of(record("<image>a", "b", "c<image>", "d", image=["a", "b"]))[2] == ("human", "<image>\nc")


@pytest.mark.parametrize("image, paths", [("a.jpg", ["a.jpg"]), (["a", "b"], ["a", "b"]), ([], [])])
@pytest.mark.parametrize("key", ["image", "images"])
def test_images_of_gives_the_paths(key, image, paths):
    assert images_of({key: image}) == images_of({"images": None, "image": None, key: image}) == paths
    assert images_of({"image": image, "images": image}) == paths


@pytest.mark.parametrize("empty", [None, "", float("nan"), [], {}])
def test_an_empty_image_is_none(empty):
    assert turns_of(record("a", "b") | {"image": empty, "images": empty}) == [("human", "a"), ("gpt", "b")]
    with pytest.raises(BadRecord, match="0 images in 'image' but 1 <image>"):
        turns_of(record("<image>", "b") | {"image": empty})


@pytest.mark.parametrize("image", [3, [""], ["a", None], {"path": "a"}])
def test_image_that_is_no_path_is_refused(image):
    with pytest.raises(BadRecord, match="'image' is"):
        turns_of(record("<image>", "b", image=image))
    with pytest.raises(BadRecord, match="'images' is"):
        images_of({"images": image})


def test_image_and_images_that_differ_are_refused():
    with pytest.raises(BadRecord, match="'image' and 'images' differ: .*; keep one"):
        images_of({"image": "a", "images": ["b"]})


# Keys beside them, and marks of other tools.


@pytest.mark.parametrize(
    "more, said",
    [
        ({"video": "a.mp4"}, 'video="a.mp4"; media of this name are not read'),
        ({"audio": ["x"]}, "audio="),
        ({"image_path": "a.png"}, "image_path="),
        ({"image": "b.png", "image_path": "a.png"}, "image_path="),
        ({"image": "b.png", "depth": "b.npy"}, "depth="),
        ({"meta": {"where": ["x/a.JPG"]}}, "meta=.*it names a file that is not read"),
        ({"clip": "data:video/mp4;base64,AAAA"}, "clip="),
        ({"url": "http://a.b/c.png"}, "url="),
        ({"messages": [{"role": "user"}]}, "messages=.*put it into 'conversations'"),
        ({"system_prompt": "Be kind."}, "system_prompt="),
        ({"tools": "[{}]"}, "tools="),
        ({"loss": False}, "loss=false; only 1 is supported"),
        ({"weight": 0.5}, "weight=0.5; only 1 is supported"),
    ],
)
def test_a_key_that_says_something_which_training_would_not_see_is_refused_by_name(more, said):
    question = "<image>a" if "image" in more else "a"
    with pytest.raises(BadRecord, match=said):
        turns_of(record(question, "b") | more)


@pytest.mark.parametrize(
    "turn, more, said",
    [
        (1, {"loss": False}, "turn 1: loss=false; only 1"),
        (1, {"weight": 0}, "turn 1: weight=0; only 1"),
        (0, {"weight": 1}, "turn 0: weight=1; only 0"),
        (0, {"image": "a.png"}, "turn 0: image=.*named by the record's 'image'"),
        (0, {"audio": "a"}, "turn 0: audio="),
        (1, {"mask_file": "x.png"}, "turn 1: mask_file=.*names a file"),
    ],
)
def test_a_key_of_a_turn_is_refused_by_name(turn, more, said):
    bad = record("a", "b")
    bad["conversations"][turn] |= more
    with pytest.raises(BadRecord, match=said):
        turns_of(bad)


def test_what_people_note_about_a_record_changes_nothing_and_is_named():
    notes = {
        "id": "x.jpg", "model": "gpt-4", "source": "gqa", "image_id": 7, "num_images": 1, "meta": {"split": "train"},
        "url": "http://a.b/c.png", "image_path": "/data/b.png", "weight": 1.0, "video": None, "audio": "", "tools": [],
        "bbox": [[1, 2, 3, 4]], "caption": "A dog.\nIn the grass.",
    }  # fmt: skip
    noted = record("<image>a", "b", image="x/b.png") | notes
    noted["conversations"][1] |= {"markdown": "b", "text": None, "loss": True}
    noted["conversations"][0] |= {"weight": 0}
    assert turns_of(noted) == turns_of(record("<image>a", "b", image="x/b.png"))
    known = {"id", "video", "audio", "tools", "weight", "image_path"}
    assert set(schema.unread(noted)) == set(notes) - known | {"conversations: markdown"}
    assert schema.unread(record("a", "b")) == ["model"] and not schema.unread(["x"])


@pytest.mark.parametrize(
    "question, mark",
    [
        ("<video>\nWhat?", "<video>"), ("What?\n<audio>", "<audio>"), ("<|image_1|> What?", "<|image_1|>"),
        ("<img>a.jpg</img>What?", "<img>"), ("<ImageHere>What?", "<ImageHere>"), ("<Image>\nWhat?", "<Image>"),
        (" <image_placeholder>", "<image_placeholder>"), ("<|vision_start|><|image_pad|>", "<|vision_start|>"),
        ("<image 1>What?", "<image 1>"),
    ],
)  # fmt: skip
def test_a_mark_of_another_tool_in_the_place_of_an_image_is_refused(question, mark):
    with pytest.raises(BadRecord, match=re.escape(f"turn 2 (human) has {mark!r}, another tool's mark")):
        turns_of(record("a", "b", question, "c"))


@pytest.mark.parametrize("question", ["How do I style <video> in HTML?", "Is it `<img>`?\nYes or no", "a <Image> b"])
def test_a_mark_of_another_tool_elsewhere_is_text(question):
    assert turns_of(record(question, "<video>"))[0] == ("human", question) and schema.FOREIGN.search(question)


# System prompts.


def test_a_system_prompt_takes_the_place_of_the_templates():
    own = V1.with_system("Be kind.")
    for told in (
        record("a", "b") | {"system": "Be kind."},
        record("Be kind.", "a", "b", speakers=("system", "human", "gpt")),
        record("Be kind.", "a", "b", speakers=("system", "human", "gpt")) | {"system": "Be kind."},
    ):
        assert turns_of(told) == [("human", "a"), ("gpt", "b")] and template_for(told, V1) == own
    assert template_for(record("a", "b") | {"system": None}, V1) == V1


@pytest.mark.parametrize(
    "told, template, compat, said",
    [
        (record("a", "b") | {"system": "x"}, TEMPLATES["plain"], None, "no place for a system prompt"),
        (record("a", "b") | {"system": ["x"]}, V1, None, "'system' is .*must be a text"),
        (record("y", "a", "b", speakers=("system", "human", "gpt")) | {"system": "x"}, V1, None, "keep one of them"),
        (record("a", "b") | {"system": "<image>"}, V1, None, "the system prompt holds '<image>'"),
        (record("a", "b") | {"system": "x ASSISTANT: y"}, V1, "llava_437", "LLaVA loses the answers"),
    ],
)
def test_a_system_prompt_that_has_no_place_is_refused(told, template, compat, said):
    with pytest.raises(BadRecord, match=said):
        template_for(told, template, compat)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (["x"], "not list"),
        ({}, "'conversations' is missing"),
        ({"conversations": []}, "'conversations' is missing"),
        ({"conversations": "x"}, "'conversations' is missing"),
        ({"conversations": ["x"]}, "turn 0 is not an object"),
        ({"conversations": [{"from": "human"}]}, "turn 0 is not an object"),
        ({"conversations": [{"value": "x"}]}, "turn 0 is from None"),
        (record("a", "b", speakers=("human", "system")), "turn 1 is from 'system'"),
        (record("a", "b", speakers=("gpt", "human")), "turn 0 is from 'gpt'"),
        (record("a", "b", speakers=("human", "human")), "turn 1 is from 'human'"),
        (record("a"), "no answer"),
        (record("a", ""), "turn 1 .* empty"),
        (record("a", " ", "c", "d"), "turn 1 .* empty"),
        (record("<image>", "<image>", image=["a", "b"]), "holds <image>"),
        (record("a", "b", image="a.jpg"), "1 images in 'image' but 0 <image>"),
        (record("<image>", "b"), "0 images in 'image' but 1 <image>"),
        (record("<image><image>", "b", image="a.jpg"), "1 images in 'image' but 2 <image>"),
        (record("<ima<image>ge>", "b", image="a.jpg"), "1 images in 'image' but 2 <image>"),
    ],
)
def test_record_that_llava_would_spoil_is_refused(bad, reason):
    with pytest.raises(BadRecord, match=reason):
        turns_of(bad)


def test_tokenizer_loads_from_its_file_and_survives_pickling(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(STAND_IN.model)
    loaded = read_tokenizer(path)
    copied = pickle.loads(pickle.dumps(loaded))
    assert loaded == copied == STAND_IN
    assert copied.encode("USER") == [11123]
    assert (copied.vocab_size, copied.bos, copied.eos) == (32000, 1, 2)
    assert len(pickle.dumps(loaded)) < len(STAND_IN.model) + 200


@pytest.mark.parametrize(
    "content",
    [b"", b'{"version": "1.0", "model": {}}', b"IQ== 0\nIg== 1\n", b"version https://git-lfs.github.com/spec/v1\n"],
)
def test_file_that_is_no_sentencepiece_model_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json: not a sentencepiece model.*tokenizer.model"):
        read_tokenizer(path)


@pytest.mark.parametrize(
    "broken, reason", [({"eos": "</x>"}, "EOS"), ({"byte_fallback": 0}, "byte fallback"), ({"squeeze": 1}, "spaces")]
)
def test_model_that_would_lose_text_is_refused(broken, reason):
    letters = {259: "a", 260: "b", 261: SPACE}
    assert open_tokenizer(model(letters, 262)).encode("ab a") == [259, 260, 261, 259]
    with pytest.raises(ValueError, match=reason):
        open_tokenizer(model(letters, 262, **broken))


@pytest.mark.parametrize("bad, reason", [(IMAGE, "image"), (-1, "outside"), (32000, "outside the vocabulary of 32000")])
def test_decode_refuses_ids_outside_the_vocabulary(bad, reason):
    with pytest.raises(ValueError, match=f"id {bad} at position 1 .*{reason}"):
        STAND_IN.decode([1, bad])
    assert STAND_IN.decode([31999]) and STAND_IN.decode([]) == ""


class Letters:
    """A tokenizer of another kind, as the protocol wants it: a token is a byte."""

    model, vocab_size, bos, eos = b"letters", 258, 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode().removeprefix(" ")

    def encode_stripped(self, text):
        return self.encode(text)


def test_a_tokenizer_of_another_kind_needs_the_protocol_and_nothing_else():
    tokenizer: Tokenizer = Letters()
    coded = encode(GOLDEN, V1, tokenizer)
    assert coded.ids.count(IMAGE) == 1 and coded.ids.count(257) == 2 and coded.ids[0] == 256
    targets = [i for i, target in zip(coded.ids, coded.supervised, strict=True) if target]
    assert tokenizer.decode(targets) == "A dog. Because."
    assert prompt(GOLDEN[:1], V1, tokenizer) == coded.ids[: coded.supervised.index(True)]
