"""Average normalised Levenshtein similarity (ANLS), the score of DocVQA.

Source: Biten et al. 2019, arXiv 1905.13648, equation 2; VLMEvalKit dataset/utils/vqa_eval.py (anls_compute,
hit_calculate).

- "anls", the default: 1 - distance / longer length of the two, in lower case with runs of blanks as one; of the
  best gold; below 0.5 it is 0. Exactly 0.5 is kept.
- "challenge": exactly 0.5 is 0 too, as in the paper.
- "vlmevalkit-2024" and later, "mindspeed": as the default, but the length is that of the texts before blanks are
  removed, so that blanks around a wrong word make it better: "     x     " has 0.73 for "abc".
"""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

RAW = ("vlmevalkit-2024", "vlmevalkit-2025", "vlmevalkit-2026", "mindspeed")
RULES = ("anls", *RAW, "challenge")
THRESHOLD = 0.5


def plain(text: str) -> str:
    """A text as it is compared: lower case, blanks around it removed, runs of blanks as one."""
    return " ".join(text.lower().split())


def similarity(prediction: str, gold: str, raw: bool = False) -> float:
    """1 - distance / longer length, in [0, 1]; 1 for two empty texts. raw: lengths before blanks are removed."""
    sides = (prediction.upper(), gold.upper()) if raw else (plain(prediction), plain(gold))
    longer = max(map(len, sides))
    return 1 - Levenshtein.distance(plain(prediction), plain(gold)) / longer if longer else 1.0


def anls(prediction: str, golds: Sequence[str], rules: str = "anls") -> tuple[float, str]:
    """The score of one question, in [0, 1], and the gold that is nearest (of equals the first)."""
    near, gold = max(((similarity(prediction, g, rules in RAW), g) for g in golds), key=lambda pair: pair[0])
    kept = near > THRESHOLD if rules == "challenge" else near >= THRESHOLD
    return (near if kept else 0.0), f"similarity {near:.3f} to {gold}"
