"""A few kills of each kind; tests/campaigns/kills.py does a thousand."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import kills  # noqa: E402

SEED = 1


@pytest.mark.slow
def test_what_is_killed_again_and_again_equals_what_was_not(warm, tmp_path):
    total = Counter()
    for kind, share in kills.kinds(tmp_path):
        counts = kills.campaign(warm, kind, round(10 * share) or 2, SEED, tmp_path / "runs")
        assert counts["later"] or kind.begun is kills.answered, kind.name  # a start after a kill reads a checkpoint
        total += counts
    assert not total["violations"] and total["ended"] >= 6 and sum(total[place] for place in kills.PLACES) == 14


def test_a_difference_is_a_violation(warm, tmp_path):
    kind = next(kind for kind, _ in kills.kinds(tmp_path) if kind.name == "evaluation")
    ends = iter(["planted"])  # the first comparison finds something
    kind = replace(kind, wrong=lambda *_: next(ends, ""))
    assert kills.campaign(warm, kind, 1, 1, tmp_path / "runs")["violations"] == 1
