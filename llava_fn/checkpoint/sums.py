"""The SHA-256 that stands beside a downloaded file, and the file held to it.

FILE.sha256                      the sum of FILE, with or without its name
SHA256SUMS, sha256sums.txt       in the file's folder: sums of some or all files, as sha256sum writes them
snapshots/REV/FILE -> blobs/SUM  in Hugging Face's cache: only `of_cache`, since a sum costs most of a second a GB
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llava_fn.files import digest

LISTS = ("SHA256SUMS", "sha256sums.txt")
_LINE = re.compile(
    r"\\?(?P<sum>[0-9a-fA-F]{64})(?: [ *](?P<name>.+))?|SHA256 \((?P<bsd>.+)\) = (?P<of>[0-9a-fA-F]{64})"
)


def _listed(path: Path) -> Iterator[tuple[str | None, str]]:
    """(name or None, sum) of each line. ValueError names a line that is none."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise ValueError(
                f"{path}, line {number}: {line[:100]!r} is no SHA-256 of a file; fetch it again or remove it"
            )
        name = found["name"] or found["bsd"]
        yield name and name.removeprefix("./"), (found["sum"] or found["of"]).lower()


def beside(path: Path) -> dict[Path, str]:
    """Where the sum of a file stands in its folder -> the sum."""
    own, found = path.with_name(f"{path.name}.sha256"), {}
    if own.is_file():
        sums = [value for name, value in _listed(own) if name in (None, path.name)]
        if not sums:
            raise ValueError(f"{own} holds no SHA-256 of {path.name}; fetch it again or remove it")
        found[own] = sums[0]
    for place in (path.with_name(name) for name in LISTS):
        if place.is_file():
            listed = {name: value for name, value in _listed(place)}
            found |= {place: listed[path.name]} if path.name in listed else {}
    return found


def of_cache(path: Path) -> dict[Path, str]:
    """The same for a file of Hugging Face's cache: a link to a large file whose name is its sum."""
    blob = path.resolve()
    return {blob: blob.name} if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob.name) else {}


def check(path: Path, stated: dict[Path, str]) -> None:
    """ValueError if a file has another SHA-256 than is stated. It is read as a whole if there is one."""
    have = digest(path) if stated else ""
    for place, want in stated.items():
        if have != want:
            where = f"the name of {place}" if place.name == want else str(place)
            raise ValueError(f"{path} is damaged: its SHA-256 is {have}, not the {want} of {where}; get the file again")
