"""What stands below torch_npu: CANN, the driver, and what npu-smi says of the cards."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH")  # of CANN's set_env.sh
FILES = (  # of versions, as installed; {home}: ASCEND_HOME_PATH
    "/usr/local/Ascend/driver/version.info", "/usr/local/Ascend/firmware/version.info", "{home}/version.cfg",
    "{home}/*/ascend_toolkit_install.info", "{home}/compiler/version.info",
)  # fmt: skip


def ascend(environ: Mapping[str, str] = os.environ) -> dict:
    """variables of set_env.sh; files: text of each file of versions; smi: the output of `npu-smi info`, if it is there.

    A file that cannot be read has the error in place of its text.
    """
    home = environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest")
    found = sorted({path for name in FILES for path in glob.glob(name.format(home=glob.escape(home)))})
    out = {"variables": {name: environ.get(name) for name in VARIABLES}, "files": {path: _text(path) for path in found}}
    return out | {"smi": _smi()}


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
