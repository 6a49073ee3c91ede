"""Two runs on the same questions: how far apart they are, and where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llava_fn.evaluate import intervals, tally
from llava_fn.evaluate.intervals import Interval
from llava_fn.evaluate.records import Question
from llava_fn.evaluate.tally import Scored, Summary, Tally


@dataclass(frozen=True)
class Pair:
    """One question in two runs."""

    one: Scored
    other: Scored

    @property
    def change(self) -> str:
        """How the first run scores beside the other: better, worse or same. Different answers may score the same."""
        gain = self.one.score.score - self.other.score.score
        return "better" if gain > 0 else "worse" if gain < 0 else "same"


@dataclass(frozen=True)
class Gain:
    """The mean scores of two runs on the same n questions, 0 to 1, and the interval of the first less the second."""

    name: str
    n: int
    one: float
    other: float
    interval: Interval

    @property
    def difference(self) -> float:
        """Of the means."""
        return self.one - self.other


@dataclass(frozen=True)
class Comparison:
    """Two runs on the questions that both were asked.

    whole: of the rows that the headlines count; its name is that of their split, or "Overall". tallies: of one and of
    the other, on these rows. groups: column -> gains by its values, sorted; of the same rows, but for the column split.
    """

    one: Summary
    other: Summary
    pairs: Sequence[Pair]
    tallies: tuple[Tally, Tally]
    whole: Gain
    groups: Mapping[str, Sequence[Gain]]

    def __str__(self) -> str:
        n = Counter(pair.change for pair in self.pairs)
        low, high = 100 * self.whole.interval.low, 100 * self.whole.interval.high
        return (
            f"{self.one.dataset.name} ({self.whole.name}): {self.one.model} less {self.other.model} is "
            f"{100 * self.whole.difference:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}); "
            f"{n['better']} questions better, {n['worse']} worse, of {len(self.pairs)}"
        )


def compare(one: Summary, other: Summary) -> Comparison:
    """Two runs, question by question, by index. ValueError if their file, rules or questions are not the same."""
    pairs, split = _pairs(one, other), one.headline.name
    counted = [p for p in pairs if one.headline is one.overall or p.one.group("split") == split]
    first = tally.tally(one.dataset, one.model, [p.one for p in counted])
    second = tally.tally(other.dataset, other.model, [p.other for p in counted])
    if first is None or second is None:
        raise ValueError(
            f"{one.model} and {other.model} share no question of the split {split}; there is nothing to compare"
        )
    columns = [name for name in ("split", *tally.GROUPS) if name in one.dataset.columns]
    groups = {name: _gains(pairs if name == "split" else counted, name) for name in columns}
    return Comparison(one, other, pairs, (first, second), _gain(split, counted), groups)


def _gains(pairs: Sequence[Pair], column: str) -> list[Gain]:
    names = sorted({p.one.group(column) for p in pairs})
    return [_gain(name, [p for p in pairs if p.one.group(column) == name]) for name in names]


def _gain(name: str, pairs: Sequence[Pair]) -> Gain:
    one, other = np.array([(p.one.score.score, p.other.score.score) for p in pairs]).T
    interval = intervals.of_difference(one, other, np.array([p.one.question.images for p in pairs]))
    return Gain(name, len(pairs), float(one.mean()), float(other.mean()), interval)


def _pairs(one: Summary, other: Summary) -> list[Pair]:
    for what, a, b in (("dataset", one.dataset.name, other.dataset.name), ("rules", one.rules, other.rules)):
        if a != b:
            raise ValueError(f"{what} {a!r} of {one.model} is not {b!r} of {other.model}; compare like with like")
    others = {row.question.index: row for row in other.rows if row.prediction}
    rows = [row for row in one.rows if row.prediction and row.question.index in others]
    pairs = [Pair(row, others[row.question.index]) for row in rows]
    changed = [p.one.question.index for p in pairs if _content(p.one.question) != _content(p.other.question)]
    if changed or not pairs:
        why = f"index {changed[0]} and {len(changed) - 1} more differ" if changed else "no index has answers in both"
        raise ValueError(f"{one.model} and {other.model} were asked different questions of {one.dataset.name}: {why}")
    return pairs


def _content(q: Question) -> tuple:
    return q.images, dict(q.cells)
