"""What stands below torch_npu: CANN, the driver, and what npu-smi says of the cards."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from llava_fn.launch.ascend import ASCEND_VARIABLES
from llava_fn.launch.versions import version

PACKAGES = ("llava_fn", "torch", "torch_npu", "tensordict")
VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH")  # of CANN's set_env.sh
FILES = (  # of versions, as installed; {home}: ASCEND_HOME_PATH
    "/usr/local/Ascend/driver/version.info", "/usr/local/Ascend/firmware/version.info", "{home}/version.cfg",
    "{home}/*/ascend_toolkit_install.info", "{home}/compiler/version.info",
)  # fmt: skip


def installed(environ: Mapping[str, str] = os.environ) -> dict:
    """What is there, read without torch: python, platform, packages (None: not there), and of Ascend's software

    variables: those of set_env.sh and of launch/ascend.py that are set; files: the text of each file of versions, or
    the error in its place; smi: the output of `npu-smi info`, None where there is no such command.
    """
    home = environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest")
    found = sorted({path for name in FILES for path in glob.glob(name.format(home=glob.escape(home)))})
    names = (*VARIABLES, *(row.name for row in ASCEND_VARIABLES))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "variables": {name: environ[name] for name in names if name in environ},
        "files": {path: _text(path) for path in found},
        "smi": _smi(),
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")[:4000]
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def _smi() -> str | None:
    if shutil.which("npu-smi") is None:
        return None
    try:
        done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return done.stdout + done.stderr
