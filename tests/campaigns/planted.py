"""The campaign of inputs over readers with faults that it has to find. Its options are those of inputs.py."""

import os
import signal
import sys
import time
from pathlib import Path

import inputs
from subjects import Subject


def _make(folder: Path) -> None:
    (folder / "a.json").write_text('{"n": 1, "m": [2, 3], "name": "x"}')


def _fault(name: str) -> Subject:
    """A reader that refuses every spoiled input as it should, but for one fault."""

    def read(folder: Path) -> object:
        path = folder / "a.json"
        if path.is_file() and path.read_text(errors="replace").startswith('{"n": 1, "m": [2, 3], "name": "x"}'):
            return 1
        if name == "documented":
            raise ValueError(f"{path} is broken")
        if name == "nameless":
            raise ValueError("it is broken")
        if name == "raises":
            raise KeyError(f"{path}")
        if name == "sleeps":
            time.sleep(3600)
        if name == "allocates":
            return len(bytes(3 * 2**30))
        if name == "falls":
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "unusable":
            return "7"
        return 2  # silently something else

    return Subject(name, _make, ("a.json",), read, "it may be" if name in ("unusable", "free") else "", _use)


def _use(value: object) -> None:
    if isinstance(value, str):
        raise TypeError("a text is no number")


FAULTS = ("documented", "free", "nameless", "raises", "sleeps", "allocates", "falls", "unusable", "silent")

if __name__ == "__main__":
    sys.exit(inputs.main([_fault(name) for name in FAULTS], sys.argv[1:]))
