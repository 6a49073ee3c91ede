"""Wheels that tests read and nobody installs: fetched once into a cache, and unpacked there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llava_fn"


def give_up(reason: str) -> None:
    """Without the network a skip that says so; where CI is set in the environment, as .ci/run does, a failure."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def settle(new: Path, folder: Path) -> None:
    """Give the new folder its name, unless another process was faster, with the same."""
    try:
        new.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def fetch(name: str, requirement: str) -> Path:
    """The folder in the cache that holds this wheel, unpacked."""
    folder = CACHE / f"{name}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "2", "--dest"]
        done = subprocess.run([*command, str(new), requirement], capture_output=True, text=True, timeout=600)
        if done.returncode:
            give_up(f"{requirement} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
        (wheel,) = new.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(new)
        wheel.unlink()
        settle(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder
