"""The NPU code against the real torch_npu, on a machine without an NPU: npu_contract/, in a process of its own.

.ci/versions.md says which torch_npu belongs to this torch, and of which others CI compares the schemas; so it does of
the newest. They are fetched once into a cache (~/.cache/llava_fn/torch_npu; remove it to fetch them again) and unpacked
there, never installed. Without the network, or without gcc and binutils, this is a skip that says so; where CI is set
in the environment, as .ci/run does, a failure. `bash .ci/npu` runs it on every torch that is "in full".
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from wheels import fetch, give_up

ROOT = Path(__file__).parents[2]
TORCH = importlib.metadata.version("torch").partition("+")[0]
ROWS = [line.strip("| \n").split(" | ") for line in (ROOT / ".ci/versions.md").read_text().splitlines()[2:]]


def test_the_versions_are_those_that_are_admitted_and_the_table_of_the_readme():
    text, project = (ROOT / ".ci/versions.md").read_text(), (ROOT / "pyproject.toml").read_text()
    assert text in (ROOT / "README.md").read_text() and text in (ROOT / "docs/npu.md").read_text()
    assert {row[-1] for row in ROWS} <= {"in full, in CI", "in full, by hand", "schemas, in CI"}
    assert f'"torch>={ROWS[0][1]},<' in project and f'"torch_npu>={ROWS[0][1]},<' in project
    assert [row[-1] for row in (ROWS[0], ROWS[-1])] == ["in full, in CI"] * 2
    assert "tests/kernels tests/model" in (ROOT / ".ci/run").read_text()


def test_npu_code_keeps_the_contract_of_the_real_torch_npu():
    tools = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    if tools or sys.platform != "linux":
        give_up(f"needs Linux with gcc and binutils; missing: {', '.join(tools) or sys.platform}")
    own = next((row[0] for row in ROWS if row[1] == TORCH), f"{TORCH}.*")
    wheel = fetch(f"torch_npu/{own}", f"torch_npu=={own}")
    wanted = {row[0]: f"torch_npu=={row[0]}" for row in ROWS if row[-1] == "schemas, in CI"} | {"newest": "torch_npu"}
    others = [str(fetch(f"torch_npu/{name}", requirement)) for name, requirement in wanted.items()]
    env = os.environ | {
        "LLAVA_FN_TORCH_NPU": str(wheel),
        "LLAVA_FN_TORCH_NPU_OTHERS": os.pathsep.join(others),
        "PYTHONPATH": f"{ROOT}:{wheel}",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/kernels/npu_contract")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
