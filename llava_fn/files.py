"""Sums of files."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(path: Path, algorithm: str = "sha256") -> str:
    """A sum of a file in hexadecimal, read in pieces: hashlib.file_digest is not in Python 3.10."""
    found = hashlib.new(algorithm)
    with path.open("rb", buffering=0) as f:
        while piece := f.read(2**20):
            found.update(piece)
    return found.hexdigest()
