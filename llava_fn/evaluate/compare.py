"""Two runs on the same questions: how far apart they are, and where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_fn.evaluate import intervals, tally
from llava_fn.evaluate.intervals import Interval
from llava_fn.evaluate.records import Question
from llava_fn.evaluate.tally import Row, Summary, Tally


@dataclass(frozen=True)
class Pair:
    """One question in two runs."""

    one: Row
    other: Row

    @property
    def change(self) -> str:
        """What the first run is, seen from the other: better, worse or same. Words that differ may score the same."""
        gain = self.one.score.score - self.other.score.score
        return "better" if gain > 0 else "worse" if gain < 0 else "same"


@dataclass(frozen=True)
class Comparison:
    """Two runs on the questions that both were asked.

    difference: the mean score of one less that of the other, of the rows that the headlines count: of is their split's
    name, or "Overall". tallies: of one and of the other, on these rows.
    """

    one: Summary
    other: Summary
    pairs: Sequence[Pair]
    of: str
    tallies: tuple[Tally, Tally]
    difference: float
    interval: Interval

    def __str__(self) -> str:
        n = Counter(pair.change for pair in self.pairs)
        low, high = 100 * self.interval.low, 100 * self.interval.high
        return (
            f"{self.one.dataset.name} ({self.of}): {self.one.model} less {self.other.model} is "
            f"{100 * self.difference:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}); {n['better']} questions "
            f"better, {n['worse']} worse, of {len(self.pairs)}"
        )


def compare(one: Summary, other: Summary) -> Comparison:
    """Two runs, question by question, by index. ValueError if their file, rules or questions are not the same."""
    pairs, of = _pairs(one, other), one.headline.name
    counted = [p for p in pairs if one.headline is one.overall or p.one.group("split") == of]
    mine, theirs = [p.one for p in counted], [p.other for p in counted]
    tallies = tally.tally(one.dataset, one.model, mine), tally.tally(other.dataset, other.model, theirs)
    if None in tallies:
        raise ValueError(
            f"{one.model} and {other.model} share no question of the split {of}; there is nothing to compare"
        )
    scores = [np.array([row.score.score for row in rows]) for rows in (mine, theirs)]
    interval = intervals.of_difference(*scores, np.array([row.question.images for row in mine]))
    return Comparison(one, other, pairs, of, tallies, tallies[0].mean - tallies[1].mean, interval)


def _pairs(one: Summary, other: Summary) -> list[Pair]:
    for what, a, b in (("dataset", one.dataset.name, other.dataset.name), ("rules", one.rules, other.rules)):
        if a != b:
            raise ValueError(f"{what} {a!r} of {one.model} is not {b!r} of {other.model}; compare like with like")
    theirs = {row.question.index: row for row in other.rows if row.said}
    pairs = [Pair(row, theirs[row.question.index]) for row in one.rows if row.said and row.question.index in theirs]
    changed = [p.one.question.index for p in pairs if _content(p.one.question) != _content(p.other.question)]
    if changed or not pairs:
        why = f"index {changed[0]} and {len(changed) - 1} more differ" if changed else "no index has answers in both"
        raise ValueError(f"{one.model} and {other.model} were asked different questions of {one.dataset.name}: {why}")
    return pairs


def _content(q: Question) -> tuple:
    return q.images, dict(q.cells)
