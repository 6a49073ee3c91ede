"""Where each record stands in a file of records, so that a process holds two numbers a record and no parsed JSON.

A file is read once to find its records and to see that each is JSON; a record is parsed again where it is used.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 2**20  # bytes that are looked at together; more do not fit a core's cache
SPACES = b" \t\n\r"  # of JSON
MARKS = bytes(byte in b'"\\{}[]' for byte in range(256))  # 1 for each byte that structure is made of


def has_lines(path: Path) -> bool:
    """Whether a file is of JSON lines and not one value.

    .jsonl is, unless it begins and ends as a list does; with another name a file is whose first line is a record.
    """
    with path.open("rb") as f:
        first = next((line for line in iter(partial(f.readline, CHUNK), b"") if line.strip()), b"")
        opens = first.lstrip().startswith(b"[")
        if path.suffix.lower() == ".jsonl":
            f.seek(max(0, path.stat().st_size - CHUNK))
            return not (opens and f.read().rstrip().endswith(b"]"))
        if opens:
            return False
        try:
            value = json.loads(first if first.endswith(b"\n") else first + f.readline())
        except ValueError:
            return False
    return isinstance(value, dict) and "conversations" in value


def spans(path: Path, see: Callable[[Any], None]) -> np.ndarray | None:
    """(start, stop) in bytes of each record of a JSON list of objects, or of JSON lines: int64[n, 2].

    see: is called with each record. None where the file is anything else, broken JSON too: then only a parser can say
    what it is.
    """
    if not path.stat().st_size:
        return None
    found = array("q")
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for some in _lines(data, see) if has_lines(path) else _objects(data, see):
                found.extend(some)
        except (ValueError, RecursionError):  # of the list, of JSON, or of UTF-8
            return None
    return np.frombuffer(found, np.int64).reshape(-1, 2) if found else None


def _lines(data: mmap.mmap, see: Callable[[Any], None]) -> Iterator[list[int]]:
    """[start, stop, start, stop, ...] of the lines that are not blank. ValueError if one is no JSON, or no UTF-8."""
    decode = json.JSONDecoder().raw_decode  # json.loads without what it costs a call
    begin = 0
    while begin < len(data):
        end = data.find(b"\n", min(begin + CHUNK, len(data)) - 1) + 1 or len(data)
        lines = data[begin:end].split(b"\n")
        sizes, kept = np.array([len(line) for line in lines]), np.ones(len(lines), bool)
        for i, line in enumerate(str(data[begin:end], "utf-8").split("\n")):
            try:
                value, stop = decode(line)
            except json.JSONDecodeError:  # it is broken, or begins with a space
                value, stop = None, -1
            if stop != len(line):
                kept[i] = bool(line.strip())
                value = json.loads(line) if kept[i] else None
            see(value)
        stops = begin + np.cumsum(sizes + 1) - 1
        yield np.stack([stops - sizes, stops], 1)[kept].ravel().tolist()
        release(data, end)
        begin = end


def _objects(data: mmap.mmap, see: Callable[[Any], None]) -> Iterator[tuple[int, int]]:
    """The objects of a list, in order.

    ValueError if one is no JSON, or no UTF-8, or where something else than commas and spaces stands between them.
    """
    before, begin = b"[", 0
    for start, stop in _braces(data):
        if data[begin:start].strip(SPACES) != before:
            raise ValueError(f"no list of objects at byte {begin}")
        see(json.loads(str(data[start:stop], "utf-8")))
        yield start, stop
        before, begin = b",", stop
    if data[begin:].strip(SPACES) != b"]":
        raise ValueError(f"the list does not end at byte {begin}")


def _braces(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """The outermost braces inside of one bracket."""
    start, depth, quoted = -1, 0, False
    begin = 0
    while begin < len(data):
        end = min(begin + CHUNK, len(data))
        while data[end - 1] == ord("\\") and end < len(data):  # what a backslash escapes belongs to its chunk
            end += 1
        at, kinds = _marks(data[begin:end])
        quotes = kinds == ord('"')
        outside = (np.cumsum(quotes) + quoted) % 2 == 0
        opens, closes = (
            ((kinds | 32) == ord(brace)) & outside for brace in "{}"
        )  # a bracket is a brace but for one bit
        depths = depth + np.cumsum(opens.astype(np.int64) - closes)
        edges = ((kinds == ord("{")) & opens & (depths == 2)) | ((kinds == ord("}")) & closes & (depths == 1))
        for place, opening in zip((begin + at[edges]).tolist(), opens[edges].tolist(), strict=True):
            if opening:
                start = place
            else:
                yield start, place + 1
        quoted = bool((quotes.sum() + quoted) % 2)
        depth = int(depths[-1]) if len(depths) else depth
        release(data, end)
        begin = end


def release(data: mmap.mmap, end: int) -> None:
    """Give up the pages before `end`, which stay in the file cache and no longer count as this process's memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED, 0, end // mmap.PAGESIZE * mmap.PAGESIZE or mmap.PAGESIZE)


def _marks(chunk: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(place, kind) of each byte that is a mark and is not escaped. Backslashes are not among them."""
    at = np.flatnonzero(np.frombuffer(chunk.translate(MARKS), bool))
    kinds = np.frombuffer(chunk, np.uint8)[at]
    slash = kinds == ord("\\")
    follows = np.zeros(len(at), bool)
    follows[1:] = slash[:-1] & (np.diff(at) == 1)  # a backslash stands right before
    order = np.arange(len(at))
    first = np.maximum.accumulate(np.where(slash & ~follows, order, 0))  # of the run of backslashes
    run = np.where(follows, order - np.concatenate([[0], first[:-1]]), 0)  # its length, before this byte
    plain = ~slash & (run % 2 == 0)
    return at[plain], kinds[plain]
