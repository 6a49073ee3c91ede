"""The first hour on a card, on the CPU; its command runs in tests/docs/test_docs.py."""

import json
import sys

import pytest
import torch

from llava_fn.bringup import __main__ as command
from llava_fn.bringup import options, parts, process, ranks, versions
from llava_fn.kernels import check
from llava_fn.parallel.mesh import Axis

ROW = 'print(\'{"part": "x", "ms": 1.5}\', flush=True)'


@pytest.mark.parametrize("code, limit, why", [
    (f"{ROW}; print('beside')", 60, ""),
    (f"{ROW}; 1 / 0", 60, "exit status 1"),
    (f"{ROW}; import os; os.abort()", 60, "killed by SIGABRT"),
    (f"{ROW}; from llava_fn.bringup.process import *\nwith telling('x'): time.sleep(60)", 5, "over its limit of 5 s"),
])  # fmt: skip
def test_a_part_that_fails_crashes_or_hangs_costs_its_own_rows(tmp_path, code, limit, why):
    rows = []
    with open(tmp_path / "log", "w") as log:
        assert process.run([sys.executable, "-c", code], limit, rows.append, log) == why
    assert json.loads(*rows) == {"part": "x", "ms": 1.5}
    told = {"": "beside", "exit status 1": "ZeroDivisionError", "over its limit of 5 s": "line 2 in <module>"}
    assert told.get(why, "") in (tmp_path / "log").read_text()


def test_the_parts_are_the_cases_of_the_kernels_and_those_that_the_command_names():
    assert sorted(options.OPERATIONS) == sorted(case.name for case in check.cases(check.SMALL))
    assert list(parts.PARTS) == list(options.LIMITS) and list(options.LIMITS)[1] == "attention-full"
    with pytest.raises(ValueError, match="parts=nothing: no such part; there are: environment, attention-full"):
        options.Options(parts=("nothing", "gelu"))


@pytest.mark.parametrize("part", ["environment", "decoding", "decode-step", "train-step", "host-waits"])
def test_part_passes_on_the_cpu(part, monkeypatch):
    monkeypatch.setattr(check, "LAPTOP", check.SMALL)
    rows = list(parts.PARTS[part](parts.CPU))
    assert len(rows) > 1 and all(row.get("ok", True) for row in rows), rows


def test_a_wrong_step_and_a_wrong_gradient_are_beyond_their_limits(monkeypatch):
    right = parts.logits
    monkeypatch.setattr(parts, "logits", lambda d, dtype, ids: [x.flip(0) if ids else x for x in right(d, dtype, ids)])
    assert [row["ok"] for row in parts.decoding(parts.CPU)][:2] == [False, False]
    loss = parts.train.loss
    monkeypatch.setattr(parts.train, "loss", lambda w, b, step, share, task: (
        loss(w, b, step, share * (1 + (task.zero.dtype != parts.DTYPES[0])), task)
    ))  # fmt: skip
    assert [row["ok"] for row in parts.gradients(parts.CPU)] == [True, False]


def test_calls_that_wait_are_told_from_those_that_do_not():
    waiting = ["cudaStreamSynchronize", "cudaMemcpy", "AscendCL@aclrtSynchronizeStream", "AscendCL@aclrtMemcpy"]
    others = ["cudaMemcpyAsync", "AscendCL@aclrtMemcpyAsync", "cudaLaunchKernel", "aten::copy_", "Synchronize"]
    assert [name for name in waiting + others if parts.is_wait(name)] == waiting


def test_a_wrong_collective_is_named(monkeypatch):
    wrong = ("all-reduce", torch.ones(1), torch.zeros(1))
    monkeypatch.setattr(ranks, "calls", lambda axis, device: iter([wrong]))
    with pytest.raises(RuntimeError, match=r"rank 0: all-reduce gives \[1.0\], must be \[0.0\]"):
        list(ranks.check(ranks.Mesh(all=Axis("all")), parts.CPU))


def test_the_report_has_the_versions_that_are_found_without_torch(tmp_path, monkeypatch):
    (tmp_path / "version.cfg").write_text("runtime_running_version=[9.1.0]")
    (tmp_path / "npu-smi").write_text("#!/bin/sh\necho 910B2")
    (tmp_path / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    found = versions.installed({"ASCEND_HOME_PATH": str(tmp_path), "TASK_QUEUE_ENABLE": "2", "HOME": "/"})
    assert found["files"][f"{tmp_path}/version.cfg"].endswith("[9.1.0]") and found["smi"] == "910B2\n"
    assert found["variables"] == {"ASCEND_HOME_PATH": str(tmp_path), "TASK_QUEUE_ENABLE": "2"}
    assert found["packages"]["torch"] == torch.__version__ and found["packages"]["torch_npu"] is None


def test_an_error_of_a_part_is_told_and_goes_on(capsys):
    with pytest.raises(ZeroDivisionError), process.telling("x"):
        1 / 0  # noqa: B018
    row = {"part": "x", "what": "an error", "raised": "ZeroDivisionError: division by zero"}
    assert json.loads(capsys.readouterr().out) == row


def test_the_report_is_whole_after_every_part_and_a_failure_is_the_exit_status(tmp_path, monkeypatch, capsys):
    told = {
        "environment": ("", {"what": "versions", "torch": "2"}),
        "rotary": ("", {"what": "fp32", "error": 0.5, "ok": False}),
        "swiglu": ("exit status 1", {"what": "an error", "raised": "ValueError: no"}),
        "adamw": ("exit status 1", None),
        "gelu": ("killed by SIGSEGV", None),
        "two-ranks": ("", {"what": "two ranks", "skipped": "one card"}),
    }

    def run(words, limit, row, log):
        why, found = told[words[-2]]
        log.write("Fatal: here\n")
        if found:
            row(json.dumps({"part": words[-2], **found}))
        assert len(json.loads(c.out.read_text())["parts"]) == list(told).index(words[-2]) if c.out.exists() else True
        return why

    c = options.Options(parts=tuple(told), out=tmp_path / "check.json")
    monkeypatch.setattr(command, "run", run)
    with pytest.raises(SystemExit) as ended:
        command.main(c)
    report = json.loads(c.out.read_text())
    assert ended.value.code == 1 and [p["state"] for p in report["parts"]] == ["passed", *["failed"] * 4, "skipped"]
    assert [p.get("log") for p in report["parts"]] == [None, *[["Fatal: here"]] * 4, None]
    out = capsys.readouterr().out
    assert (
        "beyond its limit: fp32" in out
        and "swiglu: ValueError: no\n" in out
        and "adamw: exit status 1: Fatal: here\n" in out
        and "gelu: killed by SIGSEGV\nFatal: here" in out
    )
    assert out.endswith(f"1 passed, 4 failed, 1 skipped. Attach {c.out} to an issue.\n")
