"""Every command and snippet of the README and of docs/ runs, in an empty folder, as it stands there."""

import dataclasses
import json
import re
import runpy
import shlex
import signal
import subprocess
import urllib.request
from string import Template

import layouts
import pages
import pytest
import tsvs
from layouts import HFLlava
from mindspeed_files import mindspeed_json
from pages import ROOT, SETUP, blocks, lines
from PIL import Image
from serving import start
from torch.distributed import run as torchrun

from llava_fn import config, llava, lora, spec
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.data import emoji, emoji_chat

# in the order in which a reader may need them: README's and weights.md's commands make what the others start from
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in (
    "weights", "answers", "study", "evaluate", "training", "cluster", "serve", "npu", "npu.zh", "reliability",
    "architecture", "extend",
)), "README.zh.md"]  # fmt: skip


def commands(page: str) -> list[str]:
    """Those that no earlier page has and that a test can run: not the set-up, and not the server, which never ends."""
    earlier = {line for other in PAGES[: PAGES.index(page)] for line in lines(other)}
    return [x for x in lines(page) if x not in earlier and "-m venv" not in x and "serve.py" not in x]


EMOJI = r".*pretrain\.py .*--data\.epochs 0\.1( .*)?"
SHORTER = {  # commands that take minutes, and options that make them short
    r"python recipes/(pretrain|finetune)\.py --config published .*": "--data.workers 0",
    r"python recipes/finetune\.py --config task .*": "--data.workers 0 --heldout.answers 2",
    r".*--run-dir runs/emoji-kept .*": "--source few.json runs/emoji-data --heldout.records few.json --data.workers 0 "
    "--saving.save-interval 4",
    r"python recipes/finetune\.py": "--data.epochs 0.01 --heldout.most 16 --heldout.answers 8",
    EMOJI: "--heldout.records few.json --heldout.images runs/emoji-data",
    r".*recipes/infer\.py --tp 2 .*": "--tokens 16",
    r"python recipes/(look\.py .*--what|patch\.py) .*": "--tokens 8",
    r"python recipes/evaluate\.py .*heldout\.tsv .*": "--limit 16",
    r"python -m llava_fn\.plan --config qlora .*": "--model emoji",
    r"python -m llava_fn\.kernels\.check": "--parts attention-full two-ranks",
    r"python tests/campaigns/kills\.py .*": "--train 0 --evaluate 2",
    r"python tests/campaigns/(inputs|hostile_requests)\.py .*": "--n 20",
}


# of a page together, as one notebook
SNIPPETS = {page: code for page in PAGES if (code := "\n".join(blocks(page, "python"))) and "openai" not in code}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder in which the README's relative paths mean something, with small models and data under the real names."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "tests"):
        (folder / name).symlink_to(ROOT / name)
    data, words = emoji.unpack(folder / "emoji-data"), (folder / "emoji-data/tokenizer.model").read_bytes()
    state = layouts.hub(layouts.hf_model())
    layouts.write_openai(folder / "ViT-L-14-336px.pt", state)
    layouts.write_vicuna(folder / "vicuna-7b-v1.5", state, "bin", words)
    layouts.write_projector(folder / "mm_projector.bin", state)
    layouts.write_llava_hf(folder / "llava-1.5-7b-hf", state, "hub", words)
    layouts.write_liuhaotian(folder / "llava-v1.5-7b", state, False, words)
    layouts.write_lora(folder / "llava-v1.5-7b-lora", state, 4, 8)
    layouts.write_megatron(folder / "save_dir", state)
    converted = layouts.write_mindspeed(folder / "converted", state, layouts.C.vision.blocks, words)
    mindspeed_json(folder, converted, data)
    pairs = json.loads((folder / "emoji-data/train.json").read_text())[:40]
    (folder / "LLaVA-Pretrain").mkdir()
    (folder / "LLaVA-Pretrain/images").symlink_to(folder / "emoji-data")
    (folder / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").write_text(json.dumps(pairs))
    (folder / "mix665k").mkdir()
    (folder / "mix665k/images").symlink_to(folder / "emoji-data")
    people = emoji_chat.people(folder / "emoji-data/train.json")[:30]
    talks = [emoji_chat.about(p, 0) for p in people] + [emoji_chat.without(i) for i in range(10)]
    (folder / "mix665k/llava_v1_5_mix665k.json").write_text(json.dumps(talks))
    trained = checkpoint.Manifest(config.LLAVA_EMOJI, ("vision", "projector", "llama"), "square", "plain", None)
    params = spec.init(llava.spec(config.LLAVA_EMOJI), 0)
    checkpoint.save(folder / "runs/emoji/checkpoints/000682", trained, params, None, words)
    few = json.loads((emoji.unpack(folder / "runs/emoji-data") / "heldout.json").read_text())[:8]
    (folder / "few.json").write_text(json.dumps(few))
    earlier = runpy.run_path(str(ROOT / "recipes/pretrain.py"))["EMOJI"]
    (folder / "runs/emoji/config.json").write_text(json.dumps(config.plain(earlier)))
    adapters = config.Lora(rank=2, alpha=4.0)
    whole, record = (
        lora.extended(llava.spec(config.LLAVA_EMOJI), adapters),
        checkpoint.Base(
            str(folder / "runs/emoji/checkpoints/000682"),
            checkpoint.fingerprint(folder / "runs/emoji/checkpoints/000682"),
        ),
    )
    own = dataclasses.replace(trained, parts=("projector", "lora"), base=record, lora=adapters, template="hf")
    params = spec.init(spec.only(whole, own.parts), 1)
    checkpoint.save(folder / "runs/emoji-lora/checkpoints/000420", own, params, None, words)
    Image.new("RGB", (60, 40), (200, 120, 30)).save(folder / "cat.jpg")
    for make in tsvs.ALL.values():
        make(folder, 3)
    lines = ({"prompt": f"What is {j}?", "image": "cat.jpg"} for j in range(5))
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


ENV = pages.ENV | {"NODES": "1", "CARDS": "2", "HEAD": "127.0.0.1"}


@pytest.fixture(scope="module")
def run(clone, warm):
    """A command in the clone, from a warm process. Torchrun only reads its options here; a slow test starts it."""

    def call(command: str) -> subprocess.CompletedProcess:
        command += next((f" {more}" for start, more in SHORTER.items() if re.fullmatch(start, command)), "")
        if command.startswith("python "):
            done = warm.run(command, clone, ENV)
        else:
            told = torchrun.parse_args(shlex.split(Template(command.partition("torchrun ")[2]).substitute(ENV)))
            assert told.nnodes in ("1", "1:1") and told.nproc_per_node == "2", command
            argv = [told.training_script, *told.training_script_args]
            pids = warm.start_ranks(2, lambda _: argv, clone, ENV, lambda rank: clone / f"rank{rank}.log")
            status, logs = max(map(abs, warm.statuses(pids))), [(clone / f"rank{r}.log").read_text() for r in (0, 1)]
            done = subprocess.CompletedProcess(command, status, logs[0], "".join(logs))
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return call


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [line for line in SETUP if "pytest" in line]
    install, _, tests = command.rpartition(" && ")
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script.index(install) < script.index(tests)


def test_every_page_of_docs_is_tested():
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages == {page for page in PAGES if page.startswith("docs/")}


def test_layers_of_the_architecture_are_those_that_the_linter_holds():
    contract = re.search(r"^layers = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    text = (ROOT / "docs/architecture.md").read_text()
    assert "```\n" + "\n".join(re.findall(r'"(.*)"', contract)) + "\n```" in text


SLOW = ("docs/reliability.md",)  # tests/campaigns tests each campaign


@pytest.mark.parametrize("page", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in PAGES])
def test_every_command_runs_in_the_order_of_the_page(page, clone, run):
    for command in commands(page):
        done = run(command)
        if "validate" in command:
            assert "40 of 40 records are fine" in done.stdout
        if "infer" in command and "llava" not in command and "finetune" not in command:
            assert "stage 1" in done.stderr and done.stdout.strip()
        if "evaluate.py" in command:
            assert "dry-run" in command or "95 % interval" in done.stdout
        if "llava_fn.plan" in command:
            assert "fits: " in done.stdout and "the same on all roles" in done.stdout
        if "kernels.check" in command:
            assert "2 passed" in done.stdout and (clone / "llava_fn-check.json").exists()
    MADE.get(page, lambda clone: None)(clone)


def made_weights(clone):
    assert HFLlava.from_pretrained(clone / "out/llava-hf").config.image_token_index == layouts.C.llama.vocab
    assert checkpoint.load_model(clone / "weights/lora").manifest.parts == ("vision", "projector", "llama")
    assert {p.name for p in (clone / "out/peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (clone / "weights/moved-pretrain.json").exists() and (clone / "out/mm_projector.bin").exists()


def made_answers(clone):
    assert len((clone / "answers.jsonl").read_text().splitlines()) == 5 and (clone / "look.npz").exists()


def made_pictures(clone):
    for name in ("integrated", "lens", "patch"):
        assert (clone / f"{name}.png").exists() and (clone / f"{name}.npz").exists()
    assert "Raised its probability" in (clone / "why.html").read_text() and (clone / "scores.tsv").exists()


def made_scores(clone):
    for end in (".html", "_acc.csv", "_summary.json", ".xlsx"):
        assert (clone / f"results/llava-1.5-7b-hf_AI2D_TEST{end}").exists()
    assert (clone / "results/llava-prompt_AI2D_TEST_vs_llava-1.5-7b-hf.html").exists()


def made_runs(clone):
    manifest = json.loads((clone / "runs/pretrain/checkpoints/000001/manifest.json").read_text())
    assert manifest["parts"] == ["projector"] and manifest["base"]["path"] == str((clone / "weights/base").resolve())
    assert (clone / "runs/emoji-short/samples.html").exists()
    stage2, task = (next((clone / f"runs/{name}/checkpoints").glob("*")) for name in ("finetune", "task"))
    assert json.loads((stage2 / "manifest.json").read_text())["parts"] == ["projector", "llama"]
    assert json.loads((task / "manifest.json").read_text())["lora"]["rank"] == 128


MADE = {"docs/weights.md": made_weights, "docs/answers.md": made_answers, "docs/study.md": made_pictures,
        "docs/evaluate.md": made_scores, "docs/training.md": made_runs}  # fmt: skip


@pytest.mark.slow
def test_the_batch_script_starts_one_torchrun_a_machine(clone, tmp_path):
    (script,) = blocks("docs/cluster.md", "sh")
    script = script.rstrip().replace("$head:29500", "$head:0") + " " + SHORTER[EMOJI]  # as above
    for name, does in (("srun", '"$@"'), ("scontrol", "echo 127.0.0.1")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
    env = ENV | slurm | {"PATH": f"{tmp_path}:{ENV['PATH']}"}
    done = subprocess.run(["bash", "-ec", script], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes (dp=2, tp=1, zero=1)" in done.stderr and (clone / "runs/emoji-slurm/samples.html").exists()


def test_servers_of_the_docs_answer_and_end_when_told_to(clone, warm, monkeypatch, capsys):
    commands, (client,) = lines("docs/serve.md"), blocks("docs/serve.md", "python")
    first, adapters, proxied = (start(warm, line, clone, ENV, f"server{i}") for i, line in enumerate(commands))
    assert json.load(urllib.request.urlopen(f"{first.url}/health"))["status"] == "ok"
    monkeypatch.chdir(clone)
    exec(compile(client.replace("http://127.0.0.1:8000", first.url), "serve.md", "exec"), {})
    assert len(capsys.readouterr().out) > 10
    told = json.load(urllib.request.urlopen(f"{adapters.url}/v1/models"))
    assert adapters.told.startswith("emoji, chat: ") and [m["id"] for m in told["data"]] == ["emoji", "chat"]
    headers = {"Host": "example.org", "Origin": "https://chat.example.org"}
    with urllib.request.urlopen(urllib.request.Request(f"{proxied.url}/llava/v1/models", headers=headers)) as answer:
        assert answer.headers["access-control-allow-origin"] == headers["Origin"]
    assert [server.end(signal.SIGINT)[0] for server in (first, adapters, proxied)] == [0, 0, 0]


@pytest.mark.parametrize("page", SNIPPETS)
def test_snippets_of_a_page_run_as_one_notebook(page, clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    exec(compile(SNIPPETS[page], page, "exec"), {})
    said = re.findall(r"print\(.*\) +# (.+)", SNIPPETS[page])
    assert capsys.readouterr().out.split() == " ".join(said).split()


def test_examples_of_trees_as_values_have_at_most_ten_lines():
    cells = blocks("docs/study.md", "python")[-7:]  # what stands before them prepares models and data
    assert max(len([line for line in cell.splitlines() if line]) for cell in cells) <= 10


@pytest.mark.parametrize("page", PAGES)
def test_options_of_the_tables_exist(page, run):
    text = (ROOT / page).read_text() + "\n\n"
    for recipe, table in re.findall(r"\| option of `(recipes/\w+\.py)` .*?\n(.*?)\n\n", text, re.S):
        shown = run(f"python {recipe} --help").stdout
        names = re.findall(r"--[a-z][a-z_.-]+", table)
        assert len(names) > 3
        for name in names:
            assert name in shown, name
