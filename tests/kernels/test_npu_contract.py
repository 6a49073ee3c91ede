"""The NPU code against the real torch_npu, on a machine without an NPU: npu_contract/, in a process of its own.

The wheel of this torch's line and the newest are fetched once into a cache (~/.cache/llava_fn/torch_npu; remove it to
fetch them again) and unpacked there, never installed. Without the network, or
without gcc and binutils, this is a skip that says so; where CI is set in the environment, as .ci/run does, a failure.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llava_fn" / "torch_npu"
LINE = ".".join(importlib.metadata.version("torch").split(".")[:2])


def give_up(reason: str) -> None:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def fetch(name: str, requirement: str) -> Path:
    """The folder in the cache that holds this wheel, unpacked."""
    folder = CACHE / f"{name}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "2", "--dest"]
        done = subprocess.run([*command, str(new), requirement], capture_output=True, text=True, timeout=600)
        if done.returncode:
            give_up(f"{requirement} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
        (wheel,) = new.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(new)
        wheel.unlink()
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def test_npu_code_keeps_the_contract_of_the_real_torch_npu():
    tools = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    if tools or sys.platform != "linux":
        give_up(f"needs Linux with gcc and binutils; missing: {', '.join(tools) or sys.platform}")
    wheel, newest = fetch(LINE, f"torch_npu=={LINE}.*"), fetch("newest", "torch_npu")
    env = os.environ | {
        "LLAVA_FN_TORCH_NPU": str(wheel),
        "LLAVA_FN_TORCH_NPU_NEWEST": str(newest),
        "PYTHONPATH": f"{ROOT}:{wheel}",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/kernels/npu_contract")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
