"""Two runs on the same questions: how far apart they are, and where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_fn.evaluate import intervals
from llava_fn.evaluate.intervals import Interval
from llava_fn.evaluate.records import Question
from llava_fn.evaluate.tally import Row, Summary


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
    """Two runs on the questions that both were asked. difference: mean score of one less that of the other."""

    one: Summary
    other: Summary
    pairs: Sequence[Pair]
    difference: float
    interval: Interval

    def __str__(self) -> str:
        n = Counter(pair.change for pair in self.pairs)
        low, high = 100 * self.interval.low, 100 * self.interval.high
        return (
            f"{self.one.dataset.name}: {self.one.model} less {self.other.model} is {100 * self.difference:+.2f} points "
            f"(95 % interval {low:+.2f} to {high:+.2f}); {n['better']} questions better, {n['worse']} worse, of "
            f"{len(self.pairs)}"
        )


def compare(one: Summary, other: Summary) -> Comparison:
    """Two runs, question by question, by index. ValueError if their file, rules or questions are not the same."""
    for what, a, b in (("dataset", one.dataset.name, other.dataset.name), ("rules", one.rules, other.rules)):
        if a != b:
            raise ValueError(f"{what} {a!r} of {one.model} is not {b!r} of {other.model}; compare like with like")
    theirs = {row.question.index: row for row in other.rows if row.said}
    pairs = [Pair(row, theirs[row.question.index]) for row in one.rows if row.said and row.question.index in theirs]
    changed = [p.one.question.index for p in pairs if _content(p.one.question) != _content(p.other.question)]
    if changed or not pairs:
        why = f"index {changed[0]} and {len(changed) - 1} more differ" if changed else "no index has answers in both"
        raise ValueError(f"{one.model} and {other.model} were asked different questions of {one.dataset.name}: {why}")
    mine = np.array([p.one.score.score for p in pairs])
    others = np.array([p.other.score.score for p in pairs])
    interval = intervals.of_difference(mine, others, np.array([p.one.question.images for p in pairs]))
    return Comparison(one, other, pairs, float((mine - others).mean()), interval)


def _content(q: Question) -> tuple:
    return q.images, dict(q.cells)
