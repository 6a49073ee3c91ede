"""Copies of checkpoints for tests, full disks, and saves that are interrupted at every file operation."""

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_fn.checkpoint import folder as checkpoint


def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "000007"))


@contextmanager
def largest_file(size: int):
    """Writing more than this many bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CALLS = [*((Path, x) for x in ("mkdir", "write_bytes", "write_text", "rename")), (os, "fsync"), (shutil, "rmtree")]


def interrupt(monkeypatch, at: int) -> list:
    """Raise KeyboardInterrupt instead of file operation number `at`. -> the operations so far."""
    done = []

    def wrap(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            done.append(name)
            if len(done) - 1 == at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in CALLS:
        wrap(owner, name)
    return done


def interrupted(saved, folder: Path, monkeypatch, save) -> Iterator[Path]:
    """Copies of a checkpoint, over each of which save(copy) was interrupted: at its first file operation, its second,
    and so on. What is left must be one checkpoint."""
    for at in range(200):
        new = copy(saved, folder / str(at))
        with monkeypatch.context() as patch:
            done = interrupt(patch, at)
            try:
                save(new)
            except KeyboardInterrupt:
                pass
        if len(done) <= at:
            return
        checkpoint.clean(new.parent)
        assert [p.name for p in new.parent.iterdir()] == ["000007"], (at, done[at])
        yield new
    raise AssertionError("more than 200 file operations")
