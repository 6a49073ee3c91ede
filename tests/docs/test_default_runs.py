"""The README's first commands as they stand there: what the default runs learn. A file, and so a worker, of its own."""

import re
import subprocess

import pytest
from pages import ENV, ROOT, SETUP, lines


@pytest.mark.slow
def test_default_runs_learn_to_caption_and_to_answer_about_what_they_have_not_seen(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (first,) = [line for line in SETUP if "pretrain" in line]
    first = first.rpartition("&&")[2].replace(".venv/bin/python", "python")
    second = [line for line in lines("README.md") if "finetune" in line or "results" in line][:3]

    def call(command):
        done = subprocess.run(command.split(), cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = re.search(r"([\d.]+)% of 281 .*; ([\d.]+) nats .* image, ([\d.]+) with", call(first))
    exact, nll, shuffled = map(float, said.groups())
    assert exact >= 80 and shuffled - nll > 1
    assert (tmp_path / "runs/emoji/samples.html").exists()
    for command in second:
        call(command.replace('"What is the role?"', "role?"))
    names, values = (tmp_path / "results/emoji-finetune_heldout_acc.csv").read_text().replace('"', "").splitlines()
    scores = dict(zip(names.split(","), map(float, values.split(",")), strict=True))
    assert scores["Overall"] >= 80 and min(scores["role"], scores["gender"]) >= 90 and scores["name"] >= 70
