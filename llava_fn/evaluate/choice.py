"""Multiple choice without a judge: which letter an answer means.

Source: VLMEvalKit utils/matching_util.py (can_infer) and dataset/utils/multiple_choice.py; MindSpeed-MM
tasks/evaluation/utils/string_utils.py. There are three generations of these rules, which agree on "B", "B." and "(B)",
the answers that LLaVA-1.5 is trained to give:

- "vlmevalkit-2024", until August 2025, behind the published numbers of LLaVA-1.5: the one option letter among the
  words; else the one option whose text stands in the answer, even inside a word: of the options "cat" and "dog",
  "concatenated" means "cat". MindSpeed-MM has the same rules ("mindspeed").
- "vlmevalkit-2025": the letter must first stand among the last four words, and an answer over twice as long as all
  options together is not searched for their texts. "B is the one that I would choose here" no longer means B.
- "vlmevalkit-2026", since June 2026: after the words, "answer is" and a letter of A to D in either case. No word has to
  end there: "The answer is blue." means B, whatever B is, and "answer is a green thing" means A.

Differs: VLMEvalKit leaves "A" undecided in long answers when the environment variable VERBOSE is set. Here neither the
environment, a judge nor chance changes a score.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

UNDECIDED = "Z"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"
_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


@dataclass(frozen=True)
class Generation:
    """One generation of rules. late: a letter counts only among the last four words. phrase: "answer is B" counts."""

    late: bool
    phrase: bool


GENERATIONS: Mapping[str, Generation] = {
    "vlmevalkit-2024": Generation(late=False, phrase=False),
    "vlmevalkit-2025": Generation(late=True, phrase=False),
    "vlmevalkit-2026": Generation(late=True, phrase=True),
    "mindspeed": Generation(late=False, phrase=False),
}


@dataclass(frozen=True)
class Found:
    """A letter of the options, or UNDECIDED, and by which rule."""

    letter: str
    why: str


def find(text: str, options: Mapping[str, str], rules: str) -> Found:
    """The letter that an answer means. options: letter -> text. rules: a name of GENERATIONS.

    Letters count in upper case only, the texts of options in either. Source: VLMEvalKit utils/matching_util.py.
    """
    g = GENERATIONS[rules]
    return _letter(text, options, g) or _text(text, options, g)


def _letter(text: str, options: Mapping[str, str], g: Generation) -> Found | None:
    """By a letter that stands alone; None: the options' texts decide."""
    if FAILED in text:
        return None
    if refusal := next((refusal for refusal in REFUSALS if refusal in text), None):
        return Found(UNDECIDED, f"a refusal: {refusal!r}")
    words = text.translate(_BLANKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not (g.late and words.index(letters[0]) < len(words) - 4):
        return Found(letters[0], f"the only option letter is {letters[0]}")
    if not letters and UNDECIDED in words:
        return Found(UNDECIDED, "it says Z")
    phrase = _ANSWER_IS.search(text) if g.phrase else None
    if phrase and phrase[1].upper() in options:
        return Found(phrase[1].upper(), f"it says {phrase[0]!r}")
    return None


def _text(text: str, options: Mapping[str, str], g: Generation) -> Found:
    """By the one option whose text stands in the answer."""
    lowered = text.lower()
    if g.late and len(lowered) > 2 * sum(map(len, options.values())):
        return Found(UNDECIDED, "no single option letter, and too long to search for the options' texts")
    letters = [letter for letter, option in options.items() if option.lower() in lowered]
    if len(letters) == 1:
        return Found(letters[0], f"the only option whose text it holds is {letters[0]}")
    if letters:
        return Found(UNDECIDED, f"no single option letter, and it holds the texts of {', '.join(letters)}")
    return Found(UNDECIDED, "no single option letter, and no option's text")
