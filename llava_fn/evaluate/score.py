"""Scores: one answer of a model against one question of a file, by named rules.

The first of a kind's RULES are the default: for multiple choice those behind the published numbers of LLaVA-1.5, for
ChartQA and DocVQA those of the papers. "vlmevalkit-2024", "-2025" and "-2026" are VLMEvalKit's rules for every kind
until August 2025, from then to June 2026, and since. "mindspeed" are MindSpeed-MM's rules, errors included. The modules
`choice`, `chartqa`, `anls` and `mmmu` give the source of each, and an example of every error.
A score depends on nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from llava_fn.evaluate import anls, chartqa, choice, mmmu
from llava_fn.evaluate.choice import UNDECIDED, Found
from llava_fn.evaluate.golds import golds
from llava_fn.evaluate.records import Kind, Question

RULES: Mapping[Kind, tuple[str, ...]] = MappingProxyType({
    "choice": tuple(choice.GENERATIONS),
    "chartqa": chartqa.RULES,
    "docvqa": anls.RULES,
    "mmmu": (*choice.GENERATIONS, "official"),
})  # fmt: skip


@dataclass(frozen=True)
class Score:
    """The score of an answer, 0 to 1.

    extracted: the letter or the text that was compared. hit: whether the score is above 0. why: the rule that decided.
    parsed: whether the answer holds anything to compare; if not, the score is 0.
    """

    extracted: str
    score: float
    hit: bool
    why: str
    parsed: bool


def check_rules(kind: Kind, rules: str) -> None:
    """ValueError if a kind of questions has no such rules."""
    if rules not in RULES[kind]:
        raise ValueError(f"rules={rules!r}: questions of kind {kind} are scored by one of {', '.join(RULES[kind])}")


def problem(kind: Kind, question: Question) -> str:
    """Why no answer to this question can be right, or "". Such a row has score 0, and says so."""
    answer, options = question.cells["answer"], question.options
    if not answer.strip():
        return "the answer cell is empty"
    if (kind == "choice" or (kind == "mmmu" and "A" in options)) and answer not in options:
        return f"the answer cell {answer!r} is none of its options {', '.join(options) or '(it has none)'}"
    return ""


def failed(error: str) -> Score:
    """The score of a question that has no answer."""
    return Score("", 0.0, False, f"no answer: {error}", False)


def score(kind: Kind, question: Question, text: str, rules: str) -> Score:
    """The score of an answer. text: what the model said. rules: a name of RULES[kind]; else ValueError."""
    check_rules(kind, rules)
    wrong = problem(kind, question)
    if wrong:
        return Score(text.strip(), 0.0, False, f"no gold: {wrong}", bool(text.strip()))
    return {"choice": _choice, "chartqa": _chartqa, "docvqa": _docvqa, "mmmu": _mmmu}[kind](question, text, rules)


def key(kind: Kind, question: Question) -> str:
    """The right letter of a question with options; of an open one of MMMU "A", the first of its two; else ""."""
    if kind == "mmmu":
        return mmmu.reformulate(question.options, question.cells["answer"])[1]
    return question.cells["answer"] if kind == "choice" else ""


def _of_letter(found: Found, right: str) -> Score:
    hit = found.letter == right
    return Score(found.letter, float(hit), hit, found.why, found.letter != UNDECIDED)


def _choice(question: Question, text: str, rules: str) -> Score:
    return _of_letter(choice.find(text, question.options, rules), question.cells["answer"])


def _mmmu(question: Question, text: str, rules: str) -> Score:
    options, answer, text = question.options, question.cells["answer"], text.strip()
    if rules == "mindspeed":
        return _choice(question, text, rules)
    if rules == "official":
        is_open = "A" not in options
        found = mmmu.open_answer(text, golds(answer)) if is_open else mmmu.letter(text, options)
        return _of_letter(found, "A" if is_open else answer)
    two, right = mmmu.reformulate(options, answer)
    scored = _of_letter(choice.find(text, two, rules), right)
    # An open answer need not name a letter: it is wrong, and was understood.
    return scored if "A" in options else replace(scored, parsed=bool(text))


def _chartqa(question: Question, text: str, rules: str) -> Score:
    hit, why = chartqa.correct(text, golds(question.cells["answer"]), rules)
    return Score(text.strip(), float(hit), hit, why, bool(text.strip()))


def _docvqa(question: Question, text: str, rules: str) -> Score:
    value, why = anls.anls(text, golds(question.cells["answer"]), rules)
    return Score(anls.plain(text), value, value > 0, why, bool(text.strip()))
