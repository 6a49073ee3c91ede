"""Prompts: a row of a TSV as the text of VLMEvalKit, in the prompt of VLMEvalKit, LLaVA or the weights.

    vlmevalkit   "... USER: " + " <image> " for each image + text + " ASSISTANT: "
    llava        "... USER: " + "<image>\\n" for each image + text + " ASSISTANT:"
    own          the template that the weights were trained with, with images as in llava

A prompt is a list of texts with None where an image stands, so "<image>" in a question is never taken for an image: it
becomes ordinary tokens, like any text.
Source: vlmeval/vlm/llava/llava.py, class LLaVA, of which MindSpeed-MM's build_prompt_llava.py is a copy; LLaVA
conversation.py, vicuna_v1.
Differs: there "<image>" in a question becomes one more place for an image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llava_fn.data.templates import MARK, template_of
from llava_fn.evaluate.options import PromptName
from llava_fn.evaluate.records import Kind, Question
from llava_fn.generate.options import Form

Parts = tuple[str | None, ...]

LETTER = (
    "\nAnswer with the option's letter from the given choices directly.",
    "\n\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002",
)  # where the question holds no Chinese, and where it does
DIRECTLY = ("\nAnswer the question directly.", "\n\u8bf7\u76f4\u63a5\u56de\u7b54\u95ee\u9898\u3002")
PHRASE = "\nAnswer the question using a single word or phrase."

_CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Style:
    """How a question and its images stand in a prompt. around: text before and behind each image; tail: at the end."""

    name: PromptName
    form: Form
    around: tuple[str, str] = ("", "\n")
    tail: str = ""


def style(name: PromptName, own: Form) -> Style:
    """own: the form of the weights. ValueError if their template is of captions, which take no question."""
    if name == "vlmevalkit":
        return Style(name, Form("llava_v1", "pad"), (" ", " "), " ")
    if name == "llava":
        return Style(name, Form("vicuna_v1", "pad"))
    template = template_of(own.template)
    if template.caption:
        raise ValueError(f"--template own: these weights know only captions ({own.template}); use vlmevalkit or llava")
    before, behind = template.image.split(MARK)
    return Style(name, own, (before, behind + "\n"))


def question_text(q: Question, kind: Kind) -> str:
    """The text of a question without images: hint, question, options, and what kind of answer is wanted."""
    if kind in ("chartqa", "docvqa"):
        return q.cells["question"] + PHRASE
    hint = q.cells.get("hint", "")
    text = (f"{hint}\n" if hint else "") + q.cells["question"]
    text += "".join(f"\n{letter}. {option}" for letter, option in q.options.items())
    return text + (LETTER if q.options else DIRECTLY)[bool(_CHINESE.search(text))]


def parts(s: Style, question: str, images: int) -> Parts:
    """The prompt of a question with so many images in front of its text, cut at them."""
    template = template_of(s.form.template)
    before, behind = s.around
    between = [x for _ in range(images - 1) for x in (behind + before, None)]
    end = question + template.reply + s.tail
    if not images:
        return (template.first + end,)
    return (template.first + before, None, *between, behind + end)


def shown(p: Sequence[str | None]) -> str:
    """The prompt as one text, with "<image>" for images, as VLMEvalKit and LLaVA write it."""
    return "".join(MARK if part is None else part for part in p)
