"""The report: one HTML file that needs nothing else, of one run or of two on the same questions.

It shows the score with its interval, bars by split, category and subject, the length and time of answers, which letter
was taken for which, and every question with its answer and score, to be filtered in the browser. A click on a picture
opens it large. There are PICTURES of them at most: those of the first questions that are not right (of two runs: whose
score changed). Texts longer than TEXT characters are cut, with a mark. So 5,349 questions make a file of some 4 MB, and
pictures add up to 16 MB if all are densely printed pages.
Whatever stands in a cell stays text: the template escapes it, and the script makes text nodes of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Sized

from markupsafe import Markup

from llava_fn.evaluate import score, tally
from llava_fn.evaluate.compare import Comparison
from llava_fn.evaluate.records import Question
from llava_fn.evaluate.tally import Scored, Summary, Tally
from llava_fn.evaluate.tsv import Table
from llava_fn.runs import page

PICTURES = 120
EACH = 3  # pictures of one question
TEXT = 500  # characters of a text
LONG = 16  # bars above which a table takes the whole width
GROUPS = ("category", "l2-category")  # columns: few bars first
VERDICTS = ("right", "wrong", "unparsed", "failed", "missing")


def report(s: Summary, table: Table) -> str:
    """The page of one run. OSError or ValueError if the TSV is no longer there as it was."""
    shown = [row.question for row in s.rows if row.verdict not in ("right", "missing")]
    data = {"rows": [_row(row) for row in s.rows], "pictures": _pictures(table, shown)}
    return _render(s, data, None, shown)


def comparison(c: Comparison, table: Table) -> str:
    """The page of two runs. OSError or ValueError if the TSV is no longer there as it was."""
    shown = [p.one.question for p in c.pairs if p.change != "same"]
    rows = [_row(p.one) | {"change": p.change, "other": _answer(p.other)} for p in c.pairs]
    return _render(c.one, {"rows": rows, "pictures": _pictures(table, shown)}, c, shown)


def _render(s: Summary, data: dict[str, Sized], c: Comparison | None, shown: Sequence[Question]) -> str:
    return page.render(
        "evaluate/page.html",
        s=s, c=c, data=_script(data | {"columns": [name for name, _ in _sections(s)]}), verdicts=_verdicts(s),
        changes=Counter(p.change for p in c.pairs) if c else {}, agreement=_agreement(c) if c else {},
        sections=_sections(s), histograms=_histograms(s), confusion=_confusion(s),
        odd=tally.odd_counts, methods=_METHODS, pictures=len(data["pictures"]),
        metric=_METRICS[s.dataset.kind], long=LONG, wanted=len({q.images for q in shown}), cap=PICTURES, text=TEXT,
    )  # fmt: skip


_METRICS = {"choice": "accuracy", "mmmu": "accuracy", "chartqa": "relaxed accuracy", "docvqa": "ANLS"}
_METHODS = {
    "wilson": "Wilson's interval, each picture one trial",
    "bootstrap": "bootstrap over pictures, since questions about one picture succeed and fail together",
    "adjusted": "Bonett and Price's interval, each picture one pair",
}


def _script(data: Mapping[str, object]) -> Markup:
    """JSON that no text in it can end: nothing of HTML is left in it. Halves of surrogate pairs are written as such."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _short(text: str, most: int = TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]} [{len(text) - most} more characters]"


def _row(row: Scored) -> dict:
    q = row.question
    options = {letter: _short(text, 120) for letter, text in q.options.items()}
    where = {name: row.group(name) for name in ("split", *GROUPS) if name in q.cells}
    return {
        "index": q.index, "question": _short(q.cells["question"]), "options": options, "where": where,
        "gold": _short(q.cells["answer"]), "picture": q.images,
    } | _answer(row)  # fmt: skip


def _answer(row: Scored) -> dict:
    p, x = row.prediction, row.score
    return {
        "verdict": row.verdict, "score": round(x.score, 4), "said": _short(p.text) if p else "",
        "extracted": _short(x.extracted, 120), "why": _short(x.why, 240), "tokens": p.tokens if p else 0,
        "seconds": round(p.seconds, 3) if p else 0,
    }  # fmt: skip


def _pictures(table: Table, questions: Sequence[Question]) -> dict[str, list[str]]:
    """JPEGs of the first PICTURES different sets of pictures, as data URLs. "" where one cannot be opened."""
    first = list({q.images: q for q in reversed(questions)}.values())[::-1][:PICTURES]
    return {q.images: [page.small(content) for content in table.images(q)[:EACH]] for q in first}


def _verdicts(s: Summary) -> list[tuple[str, int]]:
    found = Counter(row.verdict for row in s.rows)
    return [(name, found[name]) for name in VERDICTS if found[name]]


def _sections(s: Summary) -> list[tuple[str, list[Tally]]]:
    """Column -> its bars, if there are two: splits, and categories and subjects of the rows that the headline is of."""
    rows = [row for row in s.rows if s.headline is s.overall or row.group("split") == s.headline.name]
    groups = [name for name in GROUPS if name in s.dataset.columns]
    sections = [("split", list(s.splits)), *((name, tally.by_group(s.dataset, rows, name)) for name in groups)]
    return [(name, bars) for name, bars in sections if len(bars) > 1]


def _histograms(s: Summary) -> list[dict]:
    answers = [row.prediction for row in s.rows if row.prediction and row.status == "ok"]
    if not answers:
        return []
    tokens = page.histogram("Length of answers", "tokens", [p.tokens for p in answers])
    return [tokens, page.histogram("Time of answers", "seconds", [p.seconds for p in answers])]


def _confusion(s: Summary) -> dict | None:
    """Right letter -> letter that was found -> count, of answered questions with options; None without such."""
    if s.dataset.kind not in tally.LETTERED:
        return None
    rows = [row for row in s.rows if row.status == "ok" and "A" in row.question.options]
    counts = Counter((score.key(s.dataset.kind, row.question), row.score.extracted) for row in rows)
    right, found = (sorted({pair[j] for pair in counts}) for j in (0, 1))
    sums = Counter(score.key(s.dataset.kind, row.question) for row in rows)
    return {"right": right, "found": found, "counts": counts, "sums": sums} if counts else None


def _agreement(c: Comparison) -> dict[str, int]:
    """How many questions each run, both or neither has right."""
    found = Counter((p.one.score.hit, p.other.score.hit) for p in c.pairs)
    names = {"both": (True, True), "one": (True, False), "other": (False, True), "neither": (False, False)}
    return {name: found[pair] for name, pair in names.items()}
