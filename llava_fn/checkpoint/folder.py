"""Checkpoints: a folder of safetensors, a JSON manifest and SHA256SUMS, which appears whole or not at all.

    000100/params.safetensors   the leaves that this run trains, or a whole model
    000100/optim.safetensors    AdamW's moments, if they were saved
    000100/unused.safetensors   tensors of a converted model that LLaVA never reads, kept for a later export
    000100/tokenizer.model      the sentencepiece model that the ids belong to
    000100/manifest.json        model, image mode, template, step, recipe; the base: path and fingerprint
    000100/SHA256SUMS           of all other files; `sha256sum -c SHA256SUMS` checks them too

A checkpoint that several processes wrote holds boxes instead of the first two files, see boxes.py and shares.py.

A folder is written under a temporary name, flushed to the disk, and renamed. Nothing in it is ever pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tensordict import TensorDict

from llava_fn import fields, llava, lora, tree
from llava_fn import spec as specs
from llava_fn.checkpoint import boxes
from llava_fn.config import Llava, Lora, plain, structure
from llava_fn.files import digest

SUMS = "SHA256SUMS"
SHOWN = 20  # tensors that an error lists
TEMPORARY = ".part-"  # prefix of a folder that was never finished, or is being removed
ASIDE = ".old-"  # prefix of a whole checkpoint while another one takes its place


@dataclass(frozen=True)
class Base:
    """The checkpoint that holds the parameters which a run did not train."""

    path: str
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    model: Llava
    parts: tuple[str, ...]  # of the model that this checkpoint holds: vision, llama/blocks/3, lora, ...
    image_mode: str
    template: str
    compat: str | None
    step: int = 0
    base: Base | None = None
    recipe: dict | None = None  # the fields of the run's config that its numbers depend on
    data: list | None = None  # fingerprints of the records' files
    lora: Lora | None = None  # of the part `lora`
    image_reading: str = "original"  # see data/options.py
    format: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: what its small files say, and a reader of its tensors. All of it is verified, see `verified`.

    verified: whether all files have been hashed. If not, a file of tensors is hashed, or a box checked by its CRC, when
    it is read.
    """

    folder: Path
    manifest: Manifest
    tokenizer: bytes
    fingerprint: str
    tensors: boxes.Reader
    verified: bool

    @cached_property
    def base(self) -> Checkpoint | None:
        """The checkpoint that holds the parts which this one lacks. ValueError as of `find_base`."""
        base = self.manifest.base
        return open_checkpoint(find_base(base, self.folder), self.verified) if base else None

    def chain(self) -> list[Checkpoint]:
        """This checkpoint, its base, the base's base, and so on."""
        return [self, *(self.base.chain() if self.base else [])]

    def holder(self, path: tree.Path) -> Checkpoint | None:
        """The checkpoint that holds a parameter: this one, else its base, else None."""
        return self if specs.under(path, self.manifest.parts) else self.base and self.base.holder(path)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory."""

    manifest: Manifest
    params: TensorDict
    moments: tuple[TensorDict, TensorDict] | None
    tokenizer: bytes


def _sum(path: Path) -> str:
    return digest(path) if path.is_file() else "no file"


def sums(folder: Path, digests: Mapping[str, str] = MappingProxyType({})) -> str:
    """The text of SHA256SUMS for a folder. digests: file name -> hex, of files that need not be hashed again."""
    paths = sorted(p for p in folder.iterdir() if p.name != SUMS)
    return "".join(f"{digests.get(p.name) or _sum(p)}  {p.name}\n" for p in paths)


def fingerprint(folder: Path) -> str:
    """One digest for the whole checkpoint: that of its SHA256SUMS."""
    return digest(folder / SUMS)


def verify(folder: Path) -> None:
    """ValueError naming each file that is missing, added or changed since the checkpoint was written."""
    sums = _listed(folder)
    _check(folder, sums, sums)


def _check(folder: Path, sums: Mapping[str, str], files: Iterable[str]) -> None:
    changed = [name for name in files if _sum(folder / name) != sums[name]]
    if changed:
        raise _damaged(folder, changed)


def _damaged(folder: Path, files: Iterable[str]) -> ValueError:
    names = ", ".join(ascii(name)[1:-1] for name in files)
    return ValueError(f"{folder} is damaged: {SUMS} does not agree with {names}; use another checkpoint")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(params: TensorDict) -> dict[str, torch.Tensor]:
    return {"/".join(k): v.contiguous() for k, v in zip(tree.paths(params), tree.values(params), strict=True)}


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` to write a file or folder to. At the end it is renamed to `target`.

    A `target` that exists is replaced. OSError naming it if the disk is full. An error or an interrupt leaves nothing
    behind. A process killed at any instant leaves the old target or the new one, and perhaps temporary ones, which the
    next attempt or `clean` removes.
    """
    part, aside = target.with_name(TEMPORARY + target.name), target.with_name(ASIDE + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _discard(part)
        yield part
        for path in (*part.iterdir(), part) if part.is_dir() else (part,):
            _flush(path)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
        _discard(part)
        raise OSError(f"could not write {target} ({free / 2**20:.0f} MiB free): {error}") from error
    except BaseException:
        _discard(part)
        raise
    if target.exists():
        target.rename(aside)
    parent = os.open(target.parent, os.O_RDONLY)  # now: rank 0 may move a folder of shares once the last has appeared
    try:
        part.rename(target)
        os.fsync(parent)
    finally:
        os.close(parent)
    remove(aside)


def _discard(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def save(
    folder: Path,
    manifest: Manifest,
    params: TensorDict,
    moments: tuple[TensorDict, TensorDict] | None,
    tokenizer: bytes,
) -> None:
    """Write a checkpoint to `folder`, replacing one of that name, as `appearing` does."""
    with appearing(folder) as part:
        part.mkdir()
        save_file(_flat(params), part / "params.safetensors")
        if moments is not None:
            first, second = map(_flat, moments)
            both = {f"first/{k}": v for k, v in first.items()} | {f"second/{k}": v for k, v in second.items()}
            save_file(both, part / "optim.safetensors")
        seal(part, manifest, tokenizer)


def seal(part: Path, manifest: Manifest, tokenizer: bytes, digests: Mapping[str, str] = MappingProxyType({})) -> None:
    """Make a folder of tensors a checkpoint: write tokenizer, manifest and sums. digests: as in `sums`."""
    (part / "tokenizer.model").write_bytes(tokenizer)
    (part / "manifest.json").write_text(json.dumps(plain(manifest), indent=1) + "\n")
    (part / SUMS).write_text(sums(part, digests))


def remove(folder: Path) -> None:
    """Delete a checkpoint or a file, if it exists. It is renamed first, so that no half of it keeps its name."""
    if folder.exists():
        gone = folder.with_name(TEMPORARY + folder.name)
        folder.rename(gone)
        gone.unlink() if gone.is_file() else shutil.rmtree(gone)


def clean(runs: Path) -> None:
    """Remove unfinished folders that a killed process left beside the checkpoints, and restore what it set aside."""
    for part in runs.glob(TEMPORARY + "*"):
        shutil.rmtree(part)
    for aside in runs.glob(ASIDE + "*"):
        folder = aside.with_name(aside.name.removeprefix(ASIDE))
        remove(aside) if folder.exists() else aside.rename(folder)


def steps(runs: Path) -> list[int]:
    """The steps that have a checkpoint in this folder, in rising order."""
    return sorted(int(p.name) for p in runs.glob("[0-9]*") if p.name.isdigit())


def at(runs: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return runs / f"{step:06d}"


def newest(path: Path) -> Path:
    """The newest checkpoint of a run folder; any other path unchanged. ValueError if the run has saved none."""
    if not (path / "checkpoints").is_dir():
        return path
    found = steps(path / "checkpoints")
    if not found:
        raise ValueError(f"{path} is a run that has saved no checkpoint yet; let it train on, or name another folder")
    return at(path / "checkpoints", found[-1])


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a checkpoint, perhaps a damaged one; other people's folders may have a SHA256SUMS too."""
    listed = path / SUMS
    return listed.is_file() and ((path / "manifest.json").exists() or b"  manifest.json" in listed.read_bytes())


def read_manifest(folder: Path) -> Manifest:
    """The manifest, unverified. ValueError names a field that this version does not have."""
    values = fields.load(folder / "manifest.json")
    try:
        return structure(Manifest, values)
    except ValueError as error:
        raise ValueError(f"{folder / 'manifest.json'}: {error}") from error


def spec_of(manifest: Manifest) -> specs.Spec:
    """The parameters that a checkpoint holds."""
    return specs.only(lora.extended(llava.spec(manifest.model), manifest.lora), manifest.parts)


def open_checkpoint(folder: Path, verified: bool = False) -> Checkpoint:
    """Any checkpoint, whoever wrote it. The tensors stay in their files until they are read.

    verified: hash all files now; else the small ones now, and the tensors when they are read. ValueError names each
    file that is missing, added or damaged, and each tensor that the model of the manifest lacks or wants.
    """
    sums = _listed(folder)
    _check(folder, sums, [name for name in sums if verified or not name.endswith(".safetensors")])
    manifest, sharded = read_manifest(folder), boxes.INDEX in sums
    index = boxes.read_index(folder / boxes.INDEX) if sharded else boxes.index_of_whole(folder)
    want = {"/".join(path): p.shape for path, p in specs.leaves(spec_of(manifest))}
    for kind in sorted({"params", *index}):
        have = {name: entry.tiling.shape for name, entry in index.get(kind, {}).items()}
        missing, extra = sorted(want.keys() - have), sorted(have.keys() - want)
        if missing or extra:
            some = f"missing {missing[:SHOWN]}, unexpected {extra[:SHOWN]}"
            raise ValueError(
                f"{folder} does not fit its manifest: {kind}: {some}, {len(missing)} and {len(extra)} in all"
            )
        wrong = [f"{name} is {have[name]}, not {want[name]}" for name in want if have[name] != want[name]]
        if wrong:
            raise ValueError(f"{folder} does not fit its manifest: {kind}: {'; '.join(wrong)}")
    reader = boxes.Reader(folder, index, {} if sharded or verified else sums)
    words = (folder / "tokenizer.model").read_bytes()
    return Checkpoint(folder, manifest, words, fingerprint(folder), reader, verified)


def _listed(folder: Path) -> dict[str, str]:
    """File -> SHA-256, from SHA256SUMS. ValueError names files that are missing or added; their content is not read."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no {SUMS}")
    lines = (folder / SUMS).read_bytes().decode("utf-8", "replace").split("\n")[:-1]  # each ends with a newline
    sums = {row[-1]: row[0] for row in (line.split("  ", 1) for line in lines)}
    odd = sorted(sums.keys() ^ {p.name for p in folder.iterdir() if p.name != SUMS})
    if odd:
        raise _damaged(folder, odd)
    return sums


def load(folder: Path, moments: bool = False, device: torch.device = torch.device("cpu")) -> Snapshot:
    """Read and verify a checkpoint; `moments`: with AdamW's moments. ValueError if it is damaged or lacks them."""
    opened = open_checkpoint(folder, verified=True)
    if moments and "first" not in opened.tensors.index:
        raise ValueError(f"{folder} was saved without optimizer state; resume it with --saving.no-load-optim")

    def take(kind: str) -> TensorDict:
        # a reader for each kind: many ranks wrote more files than a process may have open
        reader = dataclasses.replace(opened.tensors, opened={})
        return specs.build(spec_of(opened.manifest), lambda path, _: reader.read(kind, path).to(device))

    pair = (take("first"), take("second")) if moments else None
    return Snapshot(opened.manifest, take("params"), pair, opened.tokenizer)


def load_model(folder: Path, device: torch.device = torch.device("cpu")) -> Snapshot:
    """A checkpoint with the missing parts from its base. ValueError if the base is gone or has changed."""
    own = load(folder, device=device)
    if own.manifest.base is None:
        return own
    base = load_model(find_base(own.manifest.base, folder), device).params
    _, rest = tree.split(base, lambda path: specs.under(path, own.manifest.parts))
    return dataclasses.replace(own, params=tree.merge(rest, own.params))


def find_base(base: Base, folder: Path) -> Path:
    """Where the base of the checkpoint in `folder` is now; its fingerprint proves it.

    Looked for where it was, and where it is if it was moved or copied together with the run: at the last components of
    its path, from each folder above the run. ValueError if it is not there, or another checkpoint is in its place.
    """
    path = Path(base.path)
    beside = (up.joinpath(*path.parts[-n:]) for up in folder.resolve().parents for n in range(1, len(path.parts)))
    there = (place for place in chain([path], beside) if (place / SUMS).is_file())
    found = next((place for place in there if fingerprint(place) == base.fingerprint), None)
    if found is None and (path / SUMS).is_file():
        raise ValueError(f"the base {path} is not the one that was trained on: its {SUMS} has changed")
    if found is None:
        raise ValueError(f"the base {path} is gone; put it back, or name it where it is now, before the run")
    if found != path:
        print(f"the base {path} is now {found}", file=sys.stderr)
    return found
