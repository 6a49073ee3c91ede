"""Scores of a whole file: each row's, and their means by split, category and subject, as the peers print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llava_fn.evaluate import chartqa, intervals, score
from llava_fn.evaluate.golds import golds
from llava_fn.evaluate.intervals import Interval
from llava_fn.evaluate.records import Dataset, Prediction, Question
from llava_fn.evaluate.score import Score

GROUPS = ("l2-category", "category")  # columns, in the peers' order: MMMU's subjects, then its disciplines
LETTERED = ("choice", "mmmu")  # kinds whose accuracies the peers write as fractions, a row a split
NONE = "none"  # how the peers call the only split of a file without that column


@dataclass(frozen=True)
class Scored:
    """A question, its prediction if there is one yet, and the score. lenient: see `chartqa.lenient`, else None."""

    question: Question
    prediction: Prediction | None
    score: Score
    lenient: bool | None = None

    @property
    def status(self) -> str:
        """ok, failed (there is an error in place of an answer) or missing (nothing was asked yet)."""
        return "missing" if self.prediction is None else "failed" if self.prediction.error else "ok"

    @property
    def verdict(self) -> str:
        """What became of it: right, wrong, unparsed, failed or missing."""
        if self.status != "ok":
            return self.status
        return "right" if self.score.hit else "wrong" if self.score.parsed else "unparsed"

    def group(self, column: str) -> str:
        """Its cell of a column, "none" if that is empty or not there."""
        return self.question.cells.get(column) or NONE


@dataclass(frozen=True)
class Tally:
    """Figures of some rows; missing rows are left out. mean: 0 to 1, failed rows as 0.

    unparsed: answers in which nothing was found to compare. ungraded: rows whose cell answer no answer can match.
    """

    name: str
    n: int
    mean: float
    interval: Interval
    unparsed: int
    failed: int
    ungraded: int
    lenient: float | None = None


@dataclass(frozen=True)
class Summary:
    """The result of a run. headline: figures of the split that is published, if that is known, else of all rows.

    groups: column -> split -> figures by value of that column, sorted.
    """

    model: str
    dataset: Dataset
    rules: str
    about: Mapping[str, str]
    partial: bool
    rows: Sequence[Scored] = field(repr=False)
    headline: Tally
    overall: Tally
    splits: Sequence[Tally]
    groups: Mapping[str, Mapping[str, Sequence[Tally]]]

    def __str__(self) -> str:
        h = self.headline
        part = " (partial)" if self.partial else ""
        odd = ", ".join(f"{n} {what}" for n, what in odd_counts(h))
        low, high = 100 * h.interval.low, 100 * h.interval.high
        return (
            f"{self.dataset.name}{part}: {100 * h.mean:.2f} % ({h.name}; 95 % interval {low:.2f} to {high:.2f}; "
            f"{h.n} rows{'; ' + odd if odd else ''})"
        )


def odd_counts(t: Tally) -> list[tuple[int, str]]:
    """The counts that a reader of a score should see, if they are not 0."""
    counts = ((t.unparsed, "unparsed"), (t.failed, "failed"), (t.ungraded, "without a usable gold"))
    return [(n, what) for n, what in counts if n]


def score_rows(
    data: Dataset, questions: Sequence[Question], predictions: Mapping[str, Prediction], rules: str
) -> list[Scored]:
    """Every question with its score, in the file's order. predictions: by index. ValueError for unknown rules."""
    score.check_rules(data.kind, rules)
    return [_scored(data, q, predictions.get(q.index), rules) for q in questions]


def _scored(data: Dataset, q: Question, p: Prediction | None, rules: str) -> Scored:
    if p is None or p.error:
        return Scored(q, p, score.failed(p.error if p else "not asked yet"))
    lenient = chartqa.lenient(p.text, golds(q.cells["answer"])) if data.kind == "chartqa" else None
    return Scored(q, p, score.score(data.kind, q, p.text, rules), lenient)


def tally(data: Dataset, name: str, rows: Sequence[Scored]) -> Tally | None:
    """Figures of rows; None if no row has a prediction."""
    rows = [row for row in rows if row.prediction]
    if not rows:
        return None
    scores = np.array([row.score.score for row in rows])
    interval = intervals.of_mean(scores, np.array([row.question.images for row in rows]))
    verdicts = [row.verdict for row in rows]
    return Tally(
        name, len(rows), float(scores.mean()), interval, verdicts.count("unparsed"), verdicts.count("failed"),
        sum(bool(score.problem(data.kind, row.question)) for row in rows),
        float(np.mean([bool(row.lenient) for row in rows])) if data.kind == "chartqa" else None,
    )  # fmt: skip


def summarise(
    model: str, data: Dataset, rows: Sequence[Scored], rules: str, about: Mapping[str, str], partial: bool
) -> Summary:
    """All figures. ValueError if nothing was asked yet."""
    whole = tally(data, "Overall", rows)
    if whole is None:
        raise ValueError(f"{data.path}: none of its rows has an answer yet; there is nothing to score")
    names = list(dict.fromkeys(row.group("split") for row in rows))
    parts = {name: [row for row in rows if row.group("split") == name] for name in names}
    splits = _tallies(data, parts)
    groups = {
        column: {name: by_group(data, part, column) for name, part in parts.items()}
        for column in GROUPS if column in data.columns
    }  # fmt: skip
    published = [t for t in splits if data.kind == "mmmu" and t.name == "validation"]
    headline = published[0] if published else whole
    return Summary(model, data, rules, about, partial, rows, headline, whole, splits, groups)


def by_group(data: Dataset, rows: Sequence[Scored], column: str) -> list[Tally]:
    """Figures by the values of a column, sorted."""
    names = sorted({row.group(column) for row in rows})
    return _tallies(data, {name: [row for row in rows if row.group(column) == name] for name in names})


def _tallies(data: Dataset, parts: Mapping[str, Sequence[Scored]]) -> list[Tally]:
    return [t for name, rows in parts.items() if (t := tally(data, name, rows))]


def accuracy(s: Summary) -> list[dict[str, str]]:
    """The peers' table: their columns and units, their full precision, rows and columns in an order that never changes.

    Of questions with options a row a split, in fractions: split, Overall, subjects, disciplines or categories, both
    sorted; empty where a split has none of them. Of others one row, in percent: the splits as they first appear, and
    Overall; without splits Overall and the categories. Source: VLMEvalKit dataset/utils/multiple_choice.py (report_acc)
    and dataset/image_vqa.py (evaluate_heuristic), whose orders change from run to run.
    """
    if s.dataset.kind not in LETTERED:
        named = s.splits if "split" in s.dataset.columns else []
        rest = [] if named else s.groups.get("category", {}).get(NONE, [])
        return [{t.name: repr(100 * t.mean) for t in [*named, s.overall, *rest]}]
    return [_accuracy_of_split(s, split) for split in s.splits]


def _accuracy_of_split(s: Summary, split: Tally) -> dict[str, str]:
    row = {"split": split.name, "Overall": repr(split.mean)}
    for column, by_split in s.groups.items():
        found = {t.name: repr(t.mean) for t in by_split.get(split.name, [])}
        for name in sorted({t.name for tallies in by_split.values() for t in tallies}):
            row[f"{name} ({column})" if name in row else name] = found.get(name, "")
    return row


def plain(s: Summary) -> dict:
    """The summary as JSON has it: percent, two bounds, counts. Without times: it is the same for the same answers."""
    groups = {
        column: {split: {t.name: _plain(t) for t in tallies} for split, tallies in by_split.items()}
        for column, by_split in s.groups.items()
    }
    return {
        "model": s.model, "dataset": s.dataset.name, "kind": s.dataset.kind, "rules": s.rules, "unit": "percent",
        "partial": s.partial, "rows": len(s.rows), "missing": sum(row.prediction is None for row in s.rows),
        "headline": {"of": s.headline.name} | _plain(s.headline), "overall": _plain(s.overall),
        "splits": {t.name: _plain(t) for t in s.splits}, "groups": groups, "about": dict(s.about),
    }  # fmt: skip


def _plain(t: Tally) -> dict:
    """Figures in percent, to 4 decimals."""
    bounds = [round(100 * bound, 4) for bound in (t.interval.low, t.interval.high)]
    figures = {
        "score": round(100 * t.mean, 4), "interval": bounds, "method": t.interval.method, "n": t.n,
        "unparsed": t.unparsed, "failed": t.failed, "ungraded": t.ungraded,
    }  # fmt: skip
    lenient = {} if t.lenient is None else {"lenient (a diagnosis)": round(100 * t.lenient, 4)}
    return figures | lenient
