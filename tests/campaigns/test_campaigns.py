"""A few percent of each campaign (of requests: tests/docs); planted faults; what the campaigns have found before."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import hostile_requests
import pytest
from mutations import DEEP
from subjects import subjects
from trial import Limits, judge, prepare

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DEEPLY, DIGITS = b"[" * DEEP + b"]" * DEEP, b"1" * 5000


def run(warm, script, folder, *args):
    """Exit status, what was printed, and (subject, verdict) -> number."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = warm.run(["python", HERE / script, "--json", folder / "all.json", *map(str, args)], folder, env)
    rows = json.loads((folder / "all.json").read_text())["outcomes"]
    return done.returncode, done.stdout + done.stderr, Counter((row["subject"], row["verdict"]) for row in rows)


def test_no_spoiled_input_is_read_as_something_else(warm, tmp_path):
    status, said, counts = run(warm, "inputs.py", tmp_path, "--n", 160, "--seed", 7)
    assert status == 0, said
    verdicts = Counter(verdict for (_, verdict), n in counts.items() for _ in range(n))
    assert sum(counts.values()) == 160 and min(verdicts[v] for v in ("equal", "error", "changed")) > 10


def test_each_planted_fault_is_found_and_kept(warm, tmp_path):
    options = ("--n", 45, "--seconds", 1, "--keep", tmp_path / "kept", "--processes", 1)
    status, said, counts = run(warm, "planted.py", tmp_path, *options)
    assert status == 1, said
    assert counts["documented", "violation"] == counts["free", "violation"] == 0
    assert counts["documented", "error"] and counts["free", "changed"]
    for name, why in {
        "nameless": "names no file", "raises": "KeyError is no documented error", "sleeps": "not done after 1 s",
        "allocates": "more memory than the limit", "falls": "ended by SIGSEGV", "unusable": "using what was read",
        "silent": "another value was read",
    }.items():  # fmt: skip
        assert counts[name, "violation"] and not counts[name, "error"] and not counts[name, "changed"], name
        assert re.search(rf"^\d+: {name}, .*{why}", said, re.M), name
    kept = [json.loads(path.read_text()) for path in (tmp_path / "kept").glob("*/outcome.json")]
    one = next(outcome for outcome in kept if outcome["subject"] == "raises")
    again = warm.run(["python", HERE / "planted.py", "--only", str(one["index"])], tmp_path, dict(os.environ))
    assert again.returncode == 1 and f"{one['mutation']} of a.json\nviolation: reading: KeyError" in again.stdout


def test_the_faults_of_a_planted_server_are_found(monkeypatch):
    monkeypatch.setattr(hostile_requests, "SETTLED", 1.0)
    args = hostile_requests.parse(["--n", "12", "--seed", "1"])
    *found, server = hostile_requests.campaign(args, lambda folder: [HERE / "planted_server.py"])
    wrong = {o.kind: o.detail for o in found if o.verdict == "violation"}
    assert "not '[" in wrong["good"] and "500" in wrong["deep nesting"]
    assert server.verdict == "violation" and "/dev/null" in server.detail and "answers" in server.detail


# What was wrong: subject, the file that is spoiled, its new content, what the error says.
FOUND = {
    "deep config": ("configs of a model", "w/config.json", DEEPLY, "config.json: maximum recursion depth"),
    "deep run": ("config of a run", "config.json", DEEPLY, "config.json: maximum recursion depth"),
    "deep index": ("safetensors", "w/model.safetensors.index.json", DEEPLY, "index.json: maximum recursion depth"),
    "deep records": ("records of stage 1, .json", "train.json", DEEPLY, "train.json, from line 1 on: maximum rec"),
    "deep lines": ("records of stage 1, .jsonl", "train.jsonl", DEEPLY, "train.jsonl, from line 1 on: maximum rec"),
    "digits in records": ("records of stage 2, .json", "train.json", DIGITS, "train.json, from line 1 on: Exceeds"),
    "a key twice": ("configs of a model", "w/config.json", b'{"a": 1, "a": 2}', "config.json: one object has a twice"),
    "a path": ("config of a run", "config.json", b'{"run_dir": 7}', 'wrong value type for field "run_dir"'),
    "an index of links": ("safetensors", "w/model.safetensors.index.json", "pipe", "index.json: no such file"),
    "image, pipe": ("image, png", "images/0.png", "pipe", "a directory or a device, and no file"),
    "image, device": ("image, png", "images/0.png", "device", "a directory or a device, and no file"),
    "table, pipe": ("benchmark, paths", "0.png", "pipe", "a directory or a device, and no file"),
    "table, long": ("benchmark, paths", "paths.tsv", b"index\tquestion\tanswer\timage_path\n" + b"x" * 10**5
                    + b"\tq\ta\t9.png\n", "x\\.\\.\\.'\\): .*9.png cannot be read"),
    "no tokenizer": ("tokenizer.model", "w/tokenizer.model", b"no", "tokenizer.model: not a sentencepiece"),
    "legacy, cut": ("torch.save, legacy", "mm_projector.bin", slice(0, 141), "truncated or damaged"),
    "blocks": ("configs of a model", "w/config.json", (b'"num_hidden_layers": 2', b'"num_hidden_layers": 2000000000'),
               "config.json: .*blocks=2000000000: must be from 1 to 1000"),
    "blocks, ours": ("checkpoint of two ranks", "000007/manifest.json", (b'"blocks": 2', b'"blocks": 2000000000'),
                     "manifest.json: .*blocks=2000000000: must be from 1 to 1000"),
    "vast": ("config.json of LLaVA's code", "w/config.json", (b'"vocab_size": 512', b'"vocab_size": ' + b"9" * 30),
             "the config wants a .* and no tensor is so large"),
    "pieces": ("tokenizer.model", "w/tokenizer.model", (b"<unk>", b"\xff\xff\xff\xff>"), "a piece that is no UTF-8"),
    "boxes": ("checkpoint of two ranks", "000007/boxes.json", (b'"crc32": [', b'"crc32": [0.5, '), "no list of whole"),
}  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    names = {subject for subject, *_ in FOUND.values()}
    return prepare([s for s in subjects() if s.name in names], 0, Limits(), tmp_path_factory.mktemp("valid"))


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_is_an_error_with_a_name(valid, tmp_path, case):
    name, file, content, said = FOUND[case]
    subject = next(s for s in valid.subjects if s.name == name)
    folder = Path(shutil.copytree(valid.inputs[name][0], tmp_path / "in"))
    old = (folder / file).read_bytes()
    (folder / file).unlink()
    if content == "pipe":
        os.mkfifo(folder / file)
    elif content == "device":
        (folder / file).symlink_to("/dev/zero")
    else:
        new = old[content] if isinstance(content, slice) else content
        (folder / file).write_bytes(old.replace(*new) if isinstance(new, tuple) else new)
    if subject.seal:
        subject.seal(folder)
    verdict, detail = judge(valid, subject, folder, True)
    assert verdict == "error" and re.search(said, detail, re.S), (verdict, detail)
