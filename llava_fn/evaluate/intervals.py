"""95 % confidence intervals of mean scores.

Questions about one picture are right or wrong together, so the units of the sample are pictures and not questions:

- Scores of 0 and 1, each question with its own picture: Wilson's interval.
- Else, from 30 pictures up: percentiles of means over pictures drawn again with replacement (a bootstrap clustered by
  picture), with a fixed seed.
- Else, and where all drawn means are the same: Wilson's interval with as many trials as there are pictures. Scores in
  [0, 1] vary most when they are 0 or 1 and the scores of a picture agree, so the interval is never too narrow.

Of the difference of two runs: the bootstrap in the same cases, and else an interval for paired samples of any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of the normal distribution, 95 % of it within
DRAWS = 2000
FEW = 30  # pictures below which the bootstrap is not to be trusted
BLOCK = 2**22  # indices drawn at a time


@dataclass(frozen=True)
class Interval:
    """Bounds, in the unit of the scores, and how they were found: "wilson", "bootstrap" or "adjusted"."""

    low: float
    high: float
    method: str


def wilson(mean: float, trials: int) -> Interval:
    """Of a share of trials that succeed. trials: at least 1. Source: Wilson 1927, JASA 22, p. 209."""
    share = Z * Z / trials
    centre = (mean + share / 2) / (1 + share)
    half = Z * math.sqrt(mean * (1 - mean) / trials + share / (4 * trials)) / (1 + share)
    return Interval(min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)), "wilson")


def of_mean(scores: np.ndarray, pictures: np.ndarray, seed: int = 0) -> Interval:
    """Of the mean of scores in [0, 1], by the rules above. scores: f64[n], n at least 1; pictures: [n], any labels."""
    count = len(np.unique(pictures))
    drawn = None
    if count < len(scores) or not np.isin(scores, (0, 1)).all():
        drawn = bootstrap(scores, pictures, seed) if count >= FEW else None
    # Rounding may put the mean of a hundred ones above 1.
    return drawn if drawn and drawn.low < drawn.high else wilson(min(1.0, float(scores.mean())), count)


def bootstrap(values: np.ndarray, pictures: np.ndarray, seed: int = 0) -> Interval:
    """Of the mean of any values: percentiles over pictures drawn again. values: f64[n]; pictures: [n], any labels.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3, with pictures as the units.
    """
    _, which = np.unique(pictures, return_inverse=True)
    sizes = np.bincount(which).astype(float)
    sums = np.bincount(which, weights=values)
    generator = np.random.Generator(np.random.PCG64(seed))
    rows, means = max(1, BLOCK // len(sizes)), []
    for begin in range(0, DRAWS, rows):
        draws = generator.integers(len(sizes), size=(min(rows, DRAWS - begin), len(sizes)))
        means.append(sums[draws].sum(1) / sizes[draws].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(low), float(high), "bootstrap")


def of_difference(one: np.ndarray, other: np.ndarray, pictures: np.ndarray, seed: int = 0) -> Interval:
    """Of the mean of one run's scores less the other's on the same questions, question by question.

    How hard a question is does not matter to a paired difference, so this interval is far narrower than the intervals
    of the two means. one, other: f64[n] in [0, 1], n at least 1; pictures: [n].
    """
    drawn = bootstrap(one - other, pictures, seed) if len(np.unique(pictures)) >= FEW else None
    return drawn if drawn and drawn.low < drawn.high else adjusted(one - other, pictures)


def adjusted(values: np.ndarray, pictures: np.ndarray) -> Interval:
    """Of the mean of few differences in [-1, 1]: Wald's interval, with a picture of 1 and one of -1 added.

    Source: Bonett and Price 2012, J. Educ. Behav. Stat. 37, p. 479, whose 0 and 1 are scores of any size here, and
    whose persons are pictures.
    """
    _, which = np.unique(pictures, return_inverse=True)
    sums = np.bincount(which, weights=values)
    units = np.append(sums * len(sums) / len(values), (1, -1))
    mean, centre = float(values.mean()), float(units.mean())
    half = Z * float(units.std()) / math.sqrt(len(units))
    return Interval(min(mean, max(-1.0, centre - half)), max(mean, min(1.0, centre + half)), "adjusted")
