"""bench/card.py on the CPU, with tiny sizes: what it says of a card cannot be tested here."""

import json
import sys

import pytest
from pages import ROOT

sys.path.append(str(ROOT / "bench"))

import card  # noqa: E402


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="parts=nothing: no such part; there are: machine, parity"):
        card.Card(parts=("nothing", "machine"))


@pytest.mark.slow
def test_parts_run_and_share_their_weights(tmp_path):
    """A process a part costs ten seconds: stage2 is stage1 with other numbers, the rest is a table of kernels.check."""
    names = ["parity", "stage1", "decoding", "serving"]
    assert card.main(card.Card("cpu", tuple(names), tiny=True, out=tmp_path)) == 0, (tmp_path / "card.log").read_text()
    rows = [json.loads(line) for line in (tmp_path / "card.jsonl").read_text().splitlines()]
    assert [name for name in names if card.of(rows, name)] == names and not (tmp_path / "weights").exists()
    exact, rounded = (row["worst gradient off by"] for row in card.of(rows, "parity"))
    assert exact < 1e-5 and 1e-3 < rounded < 0.1
    assert f"## {names[-1]}" in (tmp_path / "card.md").read_text()
