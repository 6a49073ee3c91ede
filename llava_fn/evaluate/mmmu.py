"""MMMU: questions with options, and open ones whose answer is a number or a few words.

- VLMEvalKit (dataset/utils/multiple_choice.py, MMMU_preproc and mcq_vanilla_eval) makes a choice of two of an open
  question: A is the gold cell, B "Other Answers", and the key is A; see `choice` for the rest. So the prediction "A" is
  right for every open question, "12" is right for a gold "2", and a list of golds is one text.
- "official" is the parser of the benchmark itself (MMMU-Benchmark/MMMU eval/eval_utils.py; lmms-eval
  tasks/mmmu/utils.py, tasks/_task_utils/mmmu_mcq_utils.py): the last letter in brackets, else before a blank or a
  point, even at the end of a word ("DNA is" means A); and of an open answer the ends of its sentences behind "is", "so"
  and the like, and the numbers in them, which must equal a gold to two decimals.
- "mindspeed": MindSpeed-MM tests for 'MMMU' in "mmmu_dev_val", and never makes a choice of an open question: every open
  answer is wrong there, and the gold itself too.

Differs: where the official parser draws a letter at random, the answer is undecided here.
"""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from llava_fn.evaluate.choice import UNDECIDED, Found

OTHER = "Other Answers"
_ENDS = (",", ".", "!", "?", ";", ":", "'")
_FORMS = (("in brackets", "({})", "({})"), ("before a blank", "{} ", " {} "), ("before a point", "{}.", " {} "))
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)  # with commas, with an exponent, plain


def reformulate(options: Mapping[str, str], answer: str) -> tuple[dict[str, str], str]:
    """Options and key as VLMEvalKit has them: without an option A, the answer cell is A and "Other Answers" is B.

    The key is the answer if that is a capital letter, even of an open question, and else A.
    """
    key = answer if len(answer) == 1 and answer in ascii_uppercase else "A"
    return (dict(options) if "A" in options else {**options, "A": answer, "B": OTHER}), key


def letter(text: str, options: Mapping[str, str]) -> Found:
    """The letter that an answer means by the official parser; of several letters the last one.

    Options' texts count in answers of more than five words. Source: parse_multi_choice_response, with its quirk: of
    letters before blanks or points it takes the last one between blanks, and the first of all if none is.
    """
    for char in _ENDS:
        text = text.strip(char)
    text = f" {text} "
    for name, form, place in _FORMS:
        letters = [x for x in options if form.format(x) in text]
        if letters:
            last = max((text.rfind(place.format(x)), -ord(x), x) for x in letters)[2]
            return Found(last, f"the last option letter {name} is {last}")
    lowered = text.lower()
    letters = [x for x in options if options[x].lower() in lowered] if len(text.split()) > 5 else []
    if letters:
        last = max(letters, key=lambda x: lowered.rfind(options[x].lower()))
        return Found(last, f"the last option whose text it holds is {last}")
    return Found(UNDECIDED, "no option letter, and no option's text in more than five words")


def normalise(text: str) -> list[float | str]:
    """A number to two decimals; else the text in lower case, one character beside a blank. Source: normalize_str."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def clauses(text: str) -> list[str]:
    """The ends of an answer's lines, behind "is", "so", "answer" and, in the last one, "="; without any, the answer.

    Source: parse_open_response. Its sentences would begin with a capital, but it has put them in lower case by then.
    """
    text = text.strip().strip(".").lower()
    *lines, last = text.split("\n")
    ends = [*(_end(line, _KEYS) for line in lines), _end(last, (*_KEYS, "="))]
    return [end for end in ends if end and end not in _ENDS] or [text]


def _end(line: str, keys: Sequence[str]) -> str:
    """The shortest text behind the last of each key; an empty one gives way to the next."""
    end = ""
    for tail in [line.rsplit(key, 1)[1].strip() for key in keys if key in line]:
        end = tail if not end or len(tail) < len(end) else end
    return end


def claims(text: str) -> list[float | str]:
    """What an open answer says: its clauses and the numbers in them. Source: parse_open_response."""
    ends = clauses(text)
    numbers = [number for end in ends for form in _NUMBERS for number in form.findall(end)]
    return list(dict.fromkeys(value for part in [*ends, *numbers] for value in normalise(part)))


def open_answer(text: str, golds: Sequence[str]) -> Found:
    """Letter A if an open answer is right and B if not, as of the two options above; why names what the answer says.

    A number must equal a gold, and a text must hold one. Source: eval_open.
    """
    accepted = [value for gold in golds for value in normalise(gold)]
    words = [gold for gold in accepted if isinstance(gold, str)]
    values = claims(text)
    for value in values:
        if any(word in value for word in words) if isinstance(value, str) else value in accepted:
            return Found("A", f"it says {value}")
    return Found("B", f"it says {values[0]}, and none of {', '.join(map(str, accepted))}")
