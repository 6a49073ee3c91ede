"""The tokens of each record, kept in a file, so that a start does not measure again what an earlier one measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np


def kept(path: Path, count: int, most: int) -> np.ndarray | None:
    """The int64[count] of a file, each from 0 to `most`; None if there is none that holds, and why is said.

    A file of the same folder under another name is of other records or of another preparation.
    """
    if not path.is_file():
        if others := sorted(path.parent.glob("lengths-*.npy")):
            _say(others[-1], "is of other records, another tokenizer or another preparation")
        return None
    try:
        with path.open("rb") as f:
            out = np.lib.format.read_array(f, allow_pickle=False)
    except (ValueError, EOFError) as error:
        return _say(path, f"is broken ({error})")
    if out.shape != (count,) or out.dtype != np.int64:
        return _say(path, f"is broken ({out.dtype}{list(out.shape)} instead of int64[{count}])")
    if count and not 0 <= out.min() <= out.max() <= most:
        return _say(path, f"is broken (tokens from {out.min()} to {out.max()}, where a record has at most {most})")
    return out


def _say(path: Path, what: str) -> None:
    print(f"{path} {what}; the tokens of each record are measured again", file=sys.stderr)


def keep(path: Path, lengths: np.ndarray) -> None:
    """Write int64[n] at once, so that a reader finds all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.npy")
    np.save(part, lengths, allow_pickle=False)
    part.replace(path)
