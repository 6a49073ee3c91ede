"""Every command and snippet of the README runs, in an empty folder, as it stands there."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_convert import write_clip, write_llama

from llava_fn import config

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
SETUP = [line for line in COMMANDS if "-m venv" in line]
SNIPPETS = [block for kind, block in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder in which the README's relative paths mean something, with small models and data under the real names."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    write_clip(folder / "clip-vit-large-patch14-336", whole=True)
    write_llama(folder / "vicuna-7b-v1.5", folder)
    pairs = json.loads((folder / "emoji-data/train.json").read_text())[:40]
    (folder / "LLaVA-Pretrain").mkdir()
    (folder / "LLaVA-Pretrain/images").symlink_to(folder / "emoji-data")
    (folder / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").write_text(json.dumps(pairs))
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-ec", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [line for line in SETUP if "pytest" in line]
    assert command in (ROOT / ".ci/run").read_text().splitlines()


def test_every_other_command_runs_in_the_order_of_the_readme(clone):
    (clone / "runs/emoji").mkdir(parents=True)
    earlier = runpy.run_path(str(ROOT / "recipes/pretrain.py"))["EMOJI"]
    (clone / "runs/emoji/config.json").write_text(json.dumps(config.plain(earlier)))
    shown = [line for line in COMMANDS if line not in SETUP]
    assert len(shown) == 5
    for command in shown:
        done = run(command, clone)
        if "validate" in command:
            assert "40 of 40 records are fine" in done.stdout
        if "kernels.check" in command:
            assert "| rotary | bfloat16 |" in done.stdout
    manifest = json.loads((clone / "runs/pretrain/checkpoints/000001/manifest.json").read_text())
    assert manifest["parts"] == ["projector"] and manifest["base"]["path"] == str((clone / "weights/base").resolve())
    assert (clone / "runs/emoji-short/samples.html").exists()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(snippet, capsys):
    exec(compile(snippet, "README.md", "exec"), {})
    said = re.findall(r"print\(.*\) +# (.+)", snippet)
    assert capsys.readouterr().out.split() == said


def test_options_of_the_readme_exist(clone):
    (table,) = re.findall(r"\| option .*?\n\n", (ROOT / "README.md").read_text(), re.S)
    shown = run("python recipes/pretrain.py --help", clone).stdout
    names = re.findall(r"--[a-z][a-z_.-]+", table)
    assert len(names) > 10
    for name in names:
        assert name in shown, name


@pytest.mark.slow
def test_default_run_learns_to_caption_what_it_has_not_seen(clone):
    (command,) = [line for line in SETUP if "pretrain" in line]
    done = run(command.rpartition("&&")[2].replace(".venv/bin/python", "OMP_NUM_THREADS=2 python"), clone)
    said = re.search(r"([\d.]+)% of 281 .*; ([\d.]+) nats .* image, ([\d.]+) with", done.stdout)
    exact, nll, shuffled = map(float, said.groups())
    assert exact >= 70 and shuffled - nll > 1
    assert (clone / "runs/emoji/samples.html").exists()
