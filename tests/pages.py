"""The commands and snippets of the README and of docs/, and the environment in which tests run them."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def blocks(page: str, kind: str) -> list[str]:
    text = (ROOT / page).read_text()
    return [block for found, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S) if found == kind]


def lines(page: str) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines()]


SETUP = [line for line in lines("README.md") if "-m venv" in line]
