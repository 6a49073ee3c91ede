"""Scores: tables written by hand from the rules, and properties."""

import re
from pathlib import Path
from string import ascii_uppercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fn.evaluate import anls, chartqa, choice, mmmu, score
from llava_fn.evaluate.golds import golds
from llava_fn.evaluate.records import Question

OPTIONS = {"A": "red", "B": "green", "C": "light blue", "D": "the sun"}
ALL = ("vlmevalkit-2024", "vlmevalkit-2025", "vlmevalkit-2026")
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


def question(answer, **cells):
    return Question(0, "0", {"index": "0", "question": "?", "answer": answer, **cells}, "x")


def found(text, options=OPTIONS, rules=ALL):
    return "".join(choice.find(text, options, name).letter for name in rules)


BARE = [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), (" B ", "B"), ("B\n", "B"), ("[B]", "B"), ("B: green", "B"), ("B!", "B"),
    ("Answer: B", "B"), ("answer:B", "B"), ("#B#", "B"), ("*B*", "B"), ("{B}", "B"), ("B, B", "B"),
    ("The answer is B", "B"),
    ("", "Z"), ("   ", "Z"), ("b", "Z"), ("E", "Z"), ("A or B", "Z"), ("A,B", "Z"), ("AB", "Z"), ("B?", "Z"),
    ("'B'", "Z"),
    ("-B", "Z"), ("\uff22", "Z"), ("B\u3002", "Z"), ("Z", "Z"), ("Z green", "Z"), ("I do not know", "Z"),
    ("green", "B"), ("GREEN", "B"), ("Light Blue", "C"), ("It is green.", "B"), ("evergreen", "B"), ("green, red", "Z"),
    ("Sorry, I can't help with images of people yet. B", "Z"), ("I can't process this file. green", "Z"),
    ("I'm sorry, but without the image provided I say B", "Z"), ("Cannot determine the answer B", "Z"),
    ("Failed to obtain answer via API B", "Z"), ("Failed to obtain answer via API green", "B"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "letters"), BARE)
def test_short_answers_of_a_choice_mean_the_same_in_every_generation_of_rules(text, letters):
    assert found(text) == 3 * letters


GENERATIONS = [
    ("B is the one that I choose", "BZZ"),  # the letter stands before the last four words
    ("B is what I choose", "BZZ"),  # just before them
    ("So B is my choice", "BBB"),  # and here it is the first of the last four
    ("It is green, as green as anything in this picture can possibly ever be", "BZZ"),  # over twice all options
    ("The answer is blue.", "ZZB"),  # no word has to end behind the letter
    ("answer is a green", "BBA"),
    ("The correct answer is **B**. The sun is red there", "BZB"),
    ("Correct  ANSWER\tis c, or A or B", "ZZC"),
    ("The answer is E", "ZZZ"),  # a letter of no option
    ("A or B: the answer is B", "ZZB"),  # two letters among the words
    ("The answer is (B), not (A)", "ZZZ"),  # a bracket is not a star
    ("green " + 44 * "\u0130", "BZZ"),  # 50 characters, and 94 in lower case, which are counted
]


@pytest.mark.parametrize(("text", "letters"), GENERATIONS)
def test_generations_of_rules_differ_as_they_are_described(text, letters):
    assert found(text) == letters


def test_a_verbose_letter_beyond_the_options_is_no_answer():
    assert found("answer is D", {"A": "x", "B": "y"}) == "ZZZ"


def test_an_option_called_none_is_an_option_and_an_empty_one_is_not():
    q = question("B", A="some", B="None", C="", D="NA")
    assert q.options == {"A": "some", "B": "None", "D": "NA"}
    assert score.score("choice", q, "none", "vlmevalkit-2024").hit
    assert score.score("choice", q, "C", "vlmevalkit-2024").extracted == "Z"


def test_the_environment_changes_no_score(monkeypatch):
    monkeypatch.setenv("VERBOSE", "1")
    assert found("I would say A, surely") == "AAA"


@pytest.mark.parametrize("rules", ALL)
def test_a_choice_is_scored_against_its_key(rules):
    q = question("B", **OPTIONS)
    got = [score.score("choice", q, text, rules) for text in ("B", "(C)", "?", "")]
    assert [(s.extracted, s.score, s.hit, s.parsed) for s in got] == [
        ("B", 1.0, True, True), ("C", 0.0, False, True), ("Z", 0.0, False, False), ("Z", 0.0, False, False),
    ]  # fmt: skip
    assert all(s.why for s in got)


@given(st.sampled_from(sorted(OPTIONS)), st.sampled_from(["{}", " {}\n", "({})", "{}.", "Answer: {}", "**{}**"]))
def test_a_gold_letter_scores_full_marks_in_every_form(letter, form):
    for rules in (*choice.GENERATIONS, "official"):
        kind = "mmmu" if rules == "official" else "choice"
        if (rules, form) != ("official", "**{}**"):  # the one form that the official parser does not know
            assert score.score(kind, question(letter, **OPTIONS), form.format(letter), rules).hit


@given(TEXT, st.dictionaries(st.sampled_from(ascii_uppercase[:6]), TEXT.filter(bool), max_size=5))
def test_a_choice_is_an_option_or_undecided_whatever_is_said(text, options):
    for rules in choice.GENERATIONS:
        assert choice.find(text, options, rules).letter in {*options, "Z"}
    assert mmmu.letter(text, options).letter in {*options, "Z"}


GOLDS = [
    ("2011", ["2011"]), ("[2011, 2015]", ["2011", "2015"]), ("[Blue, Orange]", ["[Blue, Orange]"]), ("[]", ["[]"]),
    ("['a', \"b's\", 'c\\'d']", ["a", "b's", "c'd"]), ("[ 'a' , ]", ["a"]),
    ("['a', 1.50, True, None]", ["a", "1.5", "True", "None"]),
    (" ['x']\n", ["x"]), ("['a'", ["['a'"]), ("[007]", ["[007]"]), ("[1-2]", ["[1-2]"]), ("[-4]", ["-4"]),
    ("[['a']]", ["[['a']]"]), ("('a', 'b')", ["('a', 'b')"]), ("", [""]), ("None", ["None"]), ("['\\d']", ["\\d"]),
    ("['caf\u00e9', '\u65e5\u672c']", ["caf\u00e9", "\u65e5\u672c"]), ("['a, b]', 'c']", ["a, b]", "c"]),
    ("['a'] + ['b']", ["['a'] + ['b']"]), ("['a'*9]", ["['a'*9]"]), ("[" + "9" * 5000 + "]", ["[" + "9" * 5000 + "]"]),
]  # fmt: skip


@pytest.mark.parametrize(("cell", "want"), GOLDS, ids=range(len(GOLDS)))
def test_a_cell_is_a_list_of_golds_or_one_text(cell, want):
    assert golds(cell) == want


@given(st.lists(TEXT, min_size=1))
def test_every_list_of_texts_is_read_back(texts):
    assert golds(repr(texts)) == texts


@pytest.mark.parametrize("cell", [
    "[__import__('pathlib').Path('{}').touch()]", "[open('{}', 'w')]", "__import__('pathlib').Path('{}').touch()",
    "[x for x in [open('{}', 'w')]]", "[f'{{open(\"{}\", \"w\")}}']",
])  # fmt: skip
def test_code_in_a_cell_stays_text(cell, tmp_path):
    cell = cell.format(tmp_path / "ran")
    assert golds(cell) == [cell] and not Path(tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "cell", ["[" * 100_000, "[" + "-" * 100_000 + "1]", "['" + "\\" * 100_001, "['a'" + " ,'a'" * 50_000]
)
def test_a_long_malformed_list_is_one_text_at_once(cell):
    assert golds(cell) == [cell]


CHARTS = [  # prediction, gold, by 5 % of the gold, by 5 % of the prediction
    ("95", "100", 1, 0), ("105", "100", 1, 1), ("94.9", "100", 0, 0), ("100", "95", 0, 1), ("106", "100", 0, 0),
    ("1950", "2010", 1, 1), ("1995.", "1995", 1, 1), ("0.63", "0.6", 0, 1), ("-95", "-100", 1, 0),
    ("-100", "100", 0, 0),
    ("12%", "12%", 1, 1), ("12%", "12", 0, 0), ("12", "12%", 0, 0), ("0.12", "12%", 1, 1), ("12.5%", "12%", 1, 1),
    ("12%%", "12%", 1, 1),
    ("%", "%", 1, 1), ("1,234", "1234", 0, 0), ("1,234", "1,234", 1, 1), ("$5", "5", 0, 0), ("5 kg", "5", 0, 0),
    ("5 kg", "5 kg", 1, 1),
    ("0", "0", 1, 1), ("0.0", "0", 0, 0), ("0.04", "0", 0, 0), ("0%", "0", 0, 0), ("-0", "0", 0, 0), ("0", "1", 0, 0),
    ("Yes", "yes", 1, 1), ("Yes.", "Yes", 0, 0), ("  Yes ", "Yes", 1, 1), ("No", "Yes", 0, 0), ("", "Yes", 0, 0),
    ("1e3", "1000", 1, 1), ("\u0665", "5", 1, 1), ("1_234", "1234", 1, 1), ("\u00c9t\u00e9", "\u00e9t\u00e9", 1, 1),
    ("inf", "5", 0, 0), ("nan", "5", 0, 0),
    ("2015", "[2011, 2015]", 1, 1), ("2300", "[2011, 2015]", 0, 0), ("Orange", "[Blue, Orange]", 0, 0),
    ("[blue, orange]", "[Blue, Orange]", 1, 1),
    ("100", "[1, 95, 100]", 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("said", "gold", "right", "swapped"), CHARTS)
def test_a_chart_answer_may_be_off_by_five_percent_of_the_gold_and_by_name_of_the_prediction(
    said, gold, right, swapped
):
    got = {rules: score.score("chartqa", question(gold), said, rules).score for rules in chartqa.RULES}
    good = dict.fromkeys(("relaxed", "vlmevalkit-2025", "vlmevalkit-2026"), right)
    assert got == good | dict.fromkeys(("vlmevalkit-2024", "mindspeed"), swapped)


@pytest.mark.parametrize("gold", ["Blue ", " 007 x", "nan", "Infinity", "-inf", "[nan]"])
def test_a_gold_that_no_answer_can_reach_by_the_peers_rules_can_be_reached_by_the_default(gold):
    q = question(gold)
    assert score.score("chartqa", q, gold, "relaxed").hit
    assert not any(score.score("chartqa", q, gold.strip(), rules).hit for rules in chartqa.RULES[1:]) or gold == "[nan]"


@given(TEXT.filter(str.strip), st.sampled_from([str, str.strip, lambda x: f" {x}\n"]))
def test_a_gold_scores_full_marks_whatever_blanks_are_around_it(gold, change):
    for kind, rules in (("chartqa", "relaxed"), ("docvqa", "anls"), ("docvqa", "challenge")):
        q = question(repr([gold, "other"]))
        assert score.score(kind, q, change(gold), rules).score == 1


@given(
    st.text("abcXYZ .%$-0129", min_size=1, max_size=12).filter(str.strip), st.sampled_from(["12%", "blue", "0", "-4.5"])
)
def test_case_does_not_matter_to_charts_and_documents(said, gold):
    for kind in ("chartqa", "docvqa"):
        for rules in score.RULES[kind]:
            scores = {score.score(kind, question(g), x, rules).score
                      for x in (said, said.upper(), said.lower()) for g in (gold, gold.upper())}  # fmt: skip
            assert len(scores) == 1


def test_the_lenient_diagnosis_forgives_points_commas_and_currencies_only():
    good = [("Yes.", "Yes"), ("$1,234.", "1234"), ("1234", "1,234"), ("5 EUR", "5"), ("\u20ac 5", "5"), ("Yes", "yes")]
    bad = [("Yes!", "Yes"), ("12%", "12"), ("5 kg", "5"), ("No.", "Yes"), ("europe", "ope")]
    assert all(chartqa.lenient(said, [gold]) for said, gold in good)
    assert not any(chartqa.lenient(said, [gold]) for said, gold in bad)
    assert not chartqa.correct("Yes.", ["Yes"])[0]


DOCS = [  # prediction, gold, default, lengths before blanks are removed, strictly above one half
    ("abc", "abc", 1, 1, 1), ("ABC", "abc", 1, 1, 1), (" a  b ", "a b", 1, 1, 1), ("a\tb\nc", "a b c", 1, 1, 1),
    ("abcd", "abxy", 0.5, 0.5, 0), ("abcde", "abxyz", 0, 0, 0), ("abc", "abd", 2 / 3, 2 / 3, 2 / 3),
    ("", "abc", 0, 0, 0),
    ("     x     ", "abc", 0, 8 / 11, 0), ("kitten", "sitting", 4 / 7, 4 / 7, 4 / 7),
    ("\u00e9t\u00e9", "\u00c9t\u00e9", 1, 1, 1),
    ("report 1998", "['1998', 'Report, 1998']", 11 / 12, 11 / 12, 11 / 12), ("1,000", "1000", 0.8, 0.8, 0.8),
    ("x", "['', 'x']", 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("said", "gold", "default", "raw", "challenge"), DOCS)
def test_a_document_answer_has_its_similarity_to_the_nearest_gold(said, gold, default, raw, challenge):
    want = dict.fromkeys(anls.RAW, raw) | {"anls": default, "challenge": challenge}
    got = {rules: score.score("docvqa", question(gold), said, rules) for rules in score.RULES["docvqa"]}
    assert {name: s.score for name, s in got.items()} == pytest.approx(want)
    assert all(s.hit == (s.score > 0) and s.parsed == bool(said.strip()) for s in got.values())


def test_two_empty_texts_are_alike():
    assert anls.similarity(" ", "") == 1 and anls.similarity("", "", raw=True) == 1


@settings(max_examples=50)
@given(TEXT, TEXT)
def test_similarity_is_that_of_the_distance_by_its_definition(a, b):
    x, y = anls.plain(a), anls.plain(b)
    row = list(range(len(y) + 1))
    for i, p in enumerate(x):
        last, row[0] = row[0], i + 1
        for j, q in enumerate(y):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (p != q))
    assert anls.similarity(a, b) == pytest.approx(1 - row[-1] / max(len(x), len(y), 1))


OPEN = [  # prediction, gold, VLMEvalKit, official
    ("A", "42", 1, 0), ("A value", "42", 1, 0), ("12", "2", 1, 0), ("18.4", "8.4", 1, 0), ("1,000", "1000", 0, 1),
    ("1000.004", "1000", 1, 1),
    ("The result is 42.", "42", 1, 1), ("x = 42", "42", 1, 1), ("It is 41\nso x = 42", "42", 1, 1),
    ("42", "43", 0, 0), ("B", "42", 0, 0),
    ("Other answers", "42", 0, 0), ("0.5", "['0.50', '1/2']", 0, 1), ("-3", "-3", 1, 1), ("-3", "3", 1, 0),
    ("0", "0", 1, 1), ("4.2e1", "42", 0, 1),
    ("Paris", "paris", 1, 1), ("it is in Paris, France", "Paris", 1, 1), ("", "42", 0, 0), ("x", "x", 1, 1),
    ("max", "x", 1, 0), ("=1+1", "=1+1", 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("said", "gold", "kit", "official"), OPEN)
def test_an_open_question_is_a_choice_of_two_for_vlmevalkit_and_parsed_by_the_official_rules(said, gold, kit, official):
    q = question(gold, A="", B="")
    got = {rules: score.score("mmmu", q, said, rules).score for rules in ("vlmevalkit-2024", "official", "mindspeed")}
    assert got == {"vlmevalkit-2024": kit, "official": official, "mindspeed": 0}


def test_an_open_question_whose_gold_is_a_letter_has_that_key():
    assert mmmu.reformulate({}, "C") == ({"A": "C", "B": "Other Answers"}, "C")
    assert mmmu.reformulate({"B": "y"}, "12") == ({"A": "12", "B": "Other Answers"}, "A")
    assert mmmu.reformulate({"A": "x", "B": "y"}, "B") == ({"A": "x", "B": "y"}, "B")
    assert score.key("mmmu", question("12")) == "A" and score.key("choice", question("D", **OPTIONS)) == "D"
    assert score.key("chartqa", question("D")) == ""


def test_an_open_answer_is_understood_when_it_names_no_letter():
    q = question("42")
    assert score.score("mmmu", q, "17", "vlmevalkit-2024").parsed
    assert not score.score("mmmu", q, " ", "vlmevalkit-2024").parsed


OFFICIAL = [
    ("(B)", "B"), ("B", "B"), ("B.", "B"), ("(A) or (B)", "B"), ("B is wrong and A is right", "A"), ("A. or B.", "B"),
    ("(A) not B", "A"),
    ("green", "Z"), ("I think that the colour is green", "B"), ("green or rather red, all in all", "A"),
    ("colour is green, I think", "Z"), ("I think the colour is green", "B"),
    ("A. B. both", "A"), ("A or HUB is", "A"), ("DNA is", "A"), ("", "Z"), ("b", "Z"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "letter"), OFFICIAL)
def test_the_official_parser_takes_the_last_letter(text, letter):
    assert mmmu.letter(text, OPTIONS).letter == letter


def test_clauses_are_the_ends_behind_the_key_words():
    assert mmmu.clauses("The answer is 5.") == ["5"]
    assert mmmu.clauses("x = 3\nSo the result is y = 4") == ["4"]  # "=" counts in the last line only
    assert mmmu.clauses("It is 3 \nSo y is 4") == ["3", "4"]
    assert mmmu.clauses("No key. Word") == ["no key. word"] and mmmu.clauses("it is :") == ["it is :"]


def test_an_open_answer_claims_its_clauses_and_every_number_that_the_official_patterns_see_in_them():
    said = "about 1,234.5 or 2e3 or .256"  # the digits behind a comma, and those of an exponent, count once more
    assert mmmu.claims(said) == [said, 1234.0, 2000.0, 234.5, 3.0, 0.26]
    assert mmmu.claims("it is X") == [" x", "x "]


def test_rules_that_a_kind_does_not_have_are_refused_by_name():
    with pytest.raises(ValueError, match="rules='relaxed': questions of kind docvqa .* anls, .*challenge"):
        score.score("docvqa", question("x"), "x", "relaxed")
    assert [names[0] for names in score.RULES.values()] == ["vlmevalkit-2024", "relaxed", "anls", "vlmevalkit-2024"]
    common = set.intersection(*map(set, score.RULES.values()))
    assert common == {*ALL, "mindspeed"}


@pytest.mark.parametrize(("kind", "answer", "cells", "why"), [
    ("choice", "E", OPTIONS, "'E' is none of its options A, B, C, D"), ("choice", "b", OPTIONS, "none of its options"),
    ("choice", "A", {}, r"\(it has none\)"), ("mmmu", "E", OPTIONS, "none of its options"),
    ("docvqa", " ", {}, "is empty"),
    ("chartqa", "", {}, "is empty"), ("mmmu", "", {}, "is empty"),
])  # fmt: skip
def test_a_row_that_no_answer_can_be_right_for_scores_nothing_and_says_so(kind, answer, cells, why):
    q = question(answer, **cells)
    assert score.problem(kind, q)
    got = score.score(kind, q, answer, score.RULES[kind][0])
    assert got.score == 0 and not got.hit
    assert re.search(f"no gold: .*{why}", got.why)


def test_a_missing_answer_scores_nothing_and_says_why():
    assert score.failed("the prompt is too long") == score.Score(
        "", 0.0, False, "no answer: the prompt is too long", False
    )
