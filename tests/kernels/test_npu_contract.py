"""The NPU code against the real torch_npu, on a machine without an NPU: npu_contract/, in a process of its own.

The wheels of this torch's line, of the oldest line that pyproject.toml admits, and the newest are fetched once into a
cache (~/.cache/llava_fn/torch_npu; remove it to fetch them again) and unpacked there, never installed. Without the
network, or without gcc and binutils, this is a skip that says so; where CI is set in the environment, as .ci/run does,
a failure.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from wheels import fetch, give_up

ROOT = Path(__file__).parents[2]
LINE = ".".join(importlib.metadata.version("torch").split(".")[:2])


def test_npu_code_keeps_the_contract_of_the_real_torch_npu():
    tools = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    if tools or sys.platform != "linux":
        give_up(f"needs Linux with gcc and binutils; missing: {', '.join(tools) or sys.platform}")
    wheel = fetch(f"torch_npu/{LINE}", f"torch_npu=={LINE}.*")
    (oldest,) = re.findall(r'"torch_npu>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    wanted = {"newest": "torch_npu", oldest: f"torch_npu=={oldest}.*"}
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
