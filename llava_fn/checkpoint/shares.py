"""Writing a sharded checkpoint without collectives: every rank writes its share, and rank 0 commits them.

    on each rank:   write_share(folder, rank, params, moments)
    on rank 0:      commit(folder, world, manifest, tokenizer, limit)

Shares are collected in a folder beside the checkpoint, .part-000100-shares, which every rank must see. A share is
complete when its sidecar appears, which is written last. Both functions may run in a thread, see `Background`.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from llava_fn import spec as specs
from llava_fn.checkpoint import boxes, leaf
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.boxes import Box, Entry, Piece
from llava_fn.checkpoint.leaf import Leaf

PERIOD = 0.02  # seconds between two looks for sidecars


@dataclass(frozen=True)
class _Share:
    """The content of a sidecar. sums: file -> SHA-256. rows: kind, path, global shape, box, CRC."""

    rank: int
    sums: dict[str, str]
    rows: list[tuple[str, str, list[int], Box, int]]


def _collected(folder: Path, attempt: str) -> Path:
    """The folder in which the shares of a checkpoint are collected."""
    return folder.with_name(f"{checkpoint.TEMPORARY}{folder.name}-shares{attempt}")


def _sidecar(rank: int) -> str:
    return f"share-{rank:05d}.json"


def write_share(
    folder: Path,
    rank: int,
    params: Sequence[Piece],
    moments: tuple[Sequence[Piece], Sequence[Piece]] | None,
    attempt: str = "",
) -> None:
    """Write this rank's boxes of the checkpoint that `folder` will be. Values on a device are copied to the CPU first.

    attempt: a word that all ranks of this launch share and no other launch has. It keeps out the shares that a process
    of an earlier launch left or is still writing; without it, only `checkpoint.clean` before the launch does. OSError
    naming the file if the disk is full. ValueError if this rank has already written its share.
    """
    into = _collected(folder, attempt)
    if (into / _sidecar(rank)).exists():
        raise ValueError(f"rank {rank} has already written its share of {folder}; let that be committed first")
    kinds = dict(zip(boxes.KINDS, (params, *(moments or ())), strict=False))
    files: dict[str, dict[str, Leaf]] = {}
    rows = []
    for kind, pieces in kinds.items():
        for piece in [p for p in pieces if p.value.numel()]:
            name, value = "/".join(piece.path), piece.value.detach().cpu()
            rows.append((kind, name, piece.shape, piece.box, boxes.crc_of(value)))
            files.setdefault(boxes.file_of(kind, rank), {})[boxes.key_of(kind, name, piece.box)] = Leaf.of(value)
    sums = {}
    for file, leaves in files.items():
        with checkpoint.appearing(into / file) as part:
            sums[file] = leaf.write(part, leaves, (), lambda size: None)
    with checkpoint.appearing(into / _sidecar(rank)) as part:
        part.write_text(json.dumps({"rank": rank, "sums": sums, "rows": rows}))


def commit(
    folder: Path,
    world: int,
    manifest: checkpoint.Manifest,
    tokenizer: bytes,
    limit: float,
    attempt: str = "",
) -> None:
    """Wait for the shares of all ranks, check that they are exactly the model, and let the checkpoint appear.

    It replaces a checkpoint of that name, as `checkpoint.appearing` does. limit: seconds to wait. TimeoutError names
    the ranks without a share. ValueError names each hole, overlap, and file or tensor that does not belong.
    """
    into = _collected(folder, attempt)
    shares = _wait(folder, into, world, limit)
    index = _index(folder, manifest, shares)
    sums = {file: digest for share in shares for file, digest in share.sums.items()}
    with checkpoint.appearing(folder) as part:
        into.rename(part)
        sidecars = {_sidecar(share.rank) for share in shares}
        odd = sorted({path.name for path in part.iterdir()} ^ {*sums, *sidecars})
        if odd:
            raise ValueError(f"{folder} is not committed: {', '.join(odd)} of its shares is missing, or no part of one")
        for name in sidecars:
            (part / name).unlink()
        (part / boxes.INDEX).write_text(boxes.dump_index(index))
        checkpoint.seal(part, manifest, tokenizer, sums)


def _wait(folder: Path, into: Path, world: int, limit: float) -> list[_Share]:
    until, missing = time.monotonic() + limit, list(range(world))
    while missing := [rank for rank in missing if not (into / _sidecar(rank)).is_file()]:
        if time.monotonic() > until:
            names = ", ".join(map(str, missing))
            raise TimeoutError(f"{folder} is not committed: no share of ranks {names} of {world} after {limit:g} s")
        time.sleep(PERIOD)
    return [_Share(**json.loads((into / _sidecar(rank)).read_text())) for rank in range(world)]


def _index(folder: Path, manifest: checkpoint.Manifest, shares: Sequence[_Share]) -> boxes.Index:
    """The index of all shares. ValueError if they are not exactly the tensors of the manifest's model."""
    where = f"{folder} is not committed"
    want = {"/".join(path): p.shape for path, p in specs.leaves(checkpoint.spec_of(manifest))}
    moments = any(row[0] != "params" for share in shares for row in share.rows)
    found = {kind: {name: [] for name in want} for kind in boxes.KINDS[: None if moments else 1]}
    for share in shares:
        for kind, name, shape, box, crc in share.rows:
            if tuple(shape) != want.get(name):
                model = f"which is {want[name]}" if name in want else "which the model lacks"
                raise ValueError(f"{where}: rank {share.rank} wrote {name} of shape {tuple(shape)}, {model}")
            found[kind][name].append((share.rank, box, crc))
    tilings: dict[str, boxes.Tiling] = {}  # 512 ranks write a million boxes, but tensors are cut in few ways
    index: dict[str, dict[str, Entry]] = {kind: {} for kind in found}
    for kind, name in itertools.product(found, want):
        rows = found[kind][name]
        like = str((want[name], [(rank, box) for rank, box, _ in rows]))
        if like not in tilings:
            parts = [(boxes.file_of(kind, rank), box) for rank, box, _ in rows]
            boxes.check_tiles(f"{where}: {kind} of {name}", boxes.whole(want[name]), parts)
            tilings[like] = boxes.tiling(want[name], [(rank, box) for rank, box, _ in rows])
        index[kind][name] = Entry(tilings[like], [crc for _, _, crc in rows])
    return index


def copied(pieces: Sequence[Piece]) -> list[Piece]:
    """The same boxes with values copied to the CPU, for a job that runs while training changes the originals."""
    return [replace(p, value=p.value.detach().to("cpu", copy=True)) for p in pieces]


class Background:
    """Runs one job at a time in a thread, such as writing a checkpoint. As a context it waits for the last job.

    No one else may write to the job's tensors, see `copied`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._name, self._error = "", None

    def start(self, name: str, job: Callable[[], None]) -> None:
        """Wait for the previous job, then start this one. Raises what `join` raises."""
        self.join()
        self._name, self._thread = name, threading.Thread(target=self._run, args=(job,), name=name)
        self._thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        """Wait for the job, if there is one. OSError or RuntimeError with its name if it failed; raised once."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise (OSError if isinstance(error, OSError) else RuntimeError)(f"{self._name}: {error}") from error

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the job. An error of the `with` block is raised in any case, and the job's is written to stderr."""
        try:
            self.join()
        except (OSError, RuntimeError) as failure:
            if error is None:
                raise
            print(f"error: {failure}", file=sys.stderr)
