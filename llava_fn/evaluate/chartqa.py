"""Relaxed accuracy of ChartQA: a number may be off by 5 % of the gold value, a word must be the same.

Source: Masry et al. 2022, arXiv 2203.10244, section 5.1; VLMEvalKit dataset/utils/vqa_eval.py (relaxed_correctness);
MindSpeed-MM tasks/evaluation/utils/analysis_utils.py. As there, a number is what Python's float reads, so "1,234" and
"$5" are words; "12%" is 0.12 and differs from "12"; a gold of 0 must be spelled the same way; years are numbers, and
"1950" is right for "2010".

- "relaxed", the default: both sides are stripped, and nan and the infinities are words.
- "vlmevalkit-2025" and "vlmevalkit-2026", since September 2025: only the prediction is stripped, so that nothing is
  right for a gold "Blue "; and nothing is right for a gold "nan".
- "vlmevalkit-2024" and "mindspeed": besides, the two sides are swapped, and 5 % of the prediction count. 100 is right
  for 95 there, and 95 is wrong for 100.
"""

import math
import re
from collections.abc import Sequence

SWAPPED = ("vlmevalkit-2024", "mindspeed")
RELAXED = "relaxed"
RULES = (RELAXED, "vlmevalkit-2024", "vlmevalkit-2025", "vlmevalkit-2026", "mindspeed")
TOLERANCE = 0.05
_MONEY = re.compile("[,$\u00a3\u00a5\u20ac]|\\b(?:usd|eur|gbp)\\b", re.IGNORECASE)


def number(text: str) -> float | None:
    """The number that a text spells, percent as hundredths; None if it spells none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(target: str, prediction: str) -> tuple[bool, str]:
    """Whether the prediction is within 5 % of the target, or the same word, and why. Source: relaxed_correctness."""
    value, aim = number(prediction), number(target)
    if value is not None and aim:
        off = abs(value - aim) / abs(aim)
        return off <= TOLERANCE, f"off by {100 * off:.3g} % of {target}"
    same = prediction.lower() == target.lower()
    return same, f"{'the same text as' if same else 'not the text'} {target}"


def correct(prediction: str, golds: Sequence[str], rules: str = RELAXED) -> tuple[bool, str]:
    """Whether a prediction is right for one of the golds, and why (of a wrong one: for the last gold)."""
    prediction, why = prediction.strip(), "no gold"
    for gold in golds:
        good, why = _one(prediction, gold, rules)
        if good:
            return True, why
    return False, why


def _one(prediction: str, gold: str, rules: str) -> tuple[bool, str]:
    if rules in SWAPPED:
        return relaxed(prediction, gold)
    if rules != RELAXED:
        return relaxed(gold, prediction)
    gold, spelled = gold.strip(), gold.strip().lower() == prediction.lower()
    if all(math.isfinite(value) for value in (number(gold), number(prediction)) if value is not None):
        return relaxed(gold, prediction)
    return spelled, f"{'the same text as' if spelled else 'not the text'} {gold}"


def lenient(prediction: str, golds: Sequence[str]) -> bool:
    """A diagnosis and no score: whether it would be right without final points, commas, signs and codes of currencies.

    The difference from the score is what a model loses by its punctuation alone.
    """
    return correct(_bare(prediction), [_bare(gold) for gold in golds])[0]


def _bare(text: str) -> str:
    return _MONEY.sub("", text).strip().rstrip(".").strip()
