"""Memory-mapped files of tensors: safetensors, torch.save (.bin, .pt, .pth) and TorchScript, told apart by content.

No pickle is executed: torch's weights_only reader reads those of torch.save, torchscript.py those of TorchScript.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from zlib_ng import zlib_ng

from llava_fn import fields
from llava_fn.checkpoint import sums, torchscript
from llava_fn.checkpoint.torchscript import DANGER, Unreadable

# Without it the kernel refuses to map a file that is larger than the machine's memory. Python names it from 3.13 on.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, itself pickled
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit, here for pickles and code too
# What the readers below raise for a damaged file.
DAMAGED = (
    SafetensorError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, OSError, ArithmeticError,
    AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, struct.error,
)  # fmt: skip

# What Megatron's checkpoints name beside tensors: its arguments, its enums, and numpy's random state.
INERT = {
    "argparse.Namespace", "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
}  # fmt: skip
INERT_PACKAGES = ("megatron.", "mindspeed.", "mindspeed_mm.")

# Each row is one kind of weights. Of its files the first one that exists is read.
KINDS = (
    ("model.safetensors", "pytorch_model.bin"),
    ("adapter_model.safetensors", "adapter_model.bin"),
    ("non_lora_trainables.safetensors", "non_lora_trainables.bin"),
    ("mm_projector.safetensors", "mm_projector.bin"),
)
# What trainers leave beside the weights.
LEFTOVERS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*")


@dataclass(frozen=True)
class Archive:
    """The tensors of one file, memory-mapped: a page is read when a number on it is used.

    Never write to the tensors, and leave the file as it is while they are in use. A file of torch's legacy format
    cannot be mapped: it is in memory as a whole.
    """

    path: Path
    tensors: dict[str, Tensor]  # names as in the file; nested dicts joined by "/"
    pages: mmap.mmap | None = field(default=None, repr=False)
    crcs: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False)  # first byte of a storage -> size, CRC

    def release(self) -> None:
        """Free the memory of the pages that were read. The tensors stay valid: pages are read again when used."""
        if self.pages is not None:
            self.pages.madvise(mmap.MADV_DONTNEED)

    def check(self, t: Tensor) -> None:
        """ValueError if the storage of a tensor of the file is damaged, by the sum that torch.save writes beside it.

        Each storage is read and checked once. safetensors and torch's legacy format have no sums.
        """
        if self.pages is None or not self.crcs:
            return
        first = t.untyped_storage().data_ptr() - self._address
        size, crc = self.crcs.get(first, (0, 0))
        if size and zlib_ng.crc32(memoryview(self.pages)[first : first + size]) != crc:
            names = ", ".join(name for name, own in self.tensors.items() if _same_storage(own, t))
            raise ValueError(f"{self.path} is damaged: the CRC-32 of {names} is not the one in it; get the file again")
        self.crcs.pop(first, None)

    @property
    def _address(self) -> int:
        return torch.frombuffer(self.pages, dtype=torch.uint8).data_ptr()

    def find(self, t: Tensor) -> int | None:
        """The byte of the file at which a contiguous tensor begins, or None if the file does not hold it as it is."""
        if self.pages is None or not t.is_contiguous():
            return None
        first = t.data_ptr() - self._address
        return first if 0 <= first <= len(self.pages) - t.nbytes else None


def open_download(path: Path) -> Archive:
    """`open_archive` of a file that is held to the SHA-256 beside it, if there is one (see sums.py)."""
    archive = open_archive(path)
    sums.check(path, sums.beside(path))
    return archive


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def open_archive(path: Path) -> Archive:
    """The tensors of a file, whose kind is told by its content, never by its name.

    safetensors, TorchScript archives and zip archives of torch.save are mapped; torch.save's legacy format is loaded
    into memory. Everything but tensors is left out: numbers, texts, lists with their content, and attributes of
    TorchScript modules that are neither parameters nor buffers. ValueError for another kind of file, a truncated file,
    a pickle that would run code, and tensors that are sparse, quantized or without a name.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a file of weights")
    with path.open("rb") as f:
        head = f.read(32)
    size = f"{path} ({path.stat().st_size} bytes)"
    try:
        if head.startswith(ZIP):
            return _open_zip(path)
        if head.startswith(LEGACY):
            return Archive(path, _legacy(path))
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
            return _open_safetensors(path)
    except Unreadable as error:
        raise ValueError(f"{path} {error}") from error
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{size} is truncated or damaged ({reason}); get the file again") from error
    raise ValueError(f"{size} {_stranger(head)}")


def _stranger(head: bytes) -> str:
    if head.startswith(fields.POINTER):
        return f"{fields.IS_POINTER} (git lfs pull)"
    if not head:
        return "is empty; get the file again"
    if head.lstrip().startswith(b"<"):
        return "is a web page, not weights; get the file again, logged in if its site asks for that"
    if head.startswith(b"\x80"):
        return f"is a pickle that torch.save did not write: {DANGER}"
    return "is neither safetensors, torch.save's nor TorchScript, or is damaged; get the file again or convert it"


def _map(path: Path) -> mmap.mmap:
    # Private and writable, since torch warns of memory that it could not write to.
    with path.open("rb") as f:
        try:
            return mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise Unreadable(f"cannot be mapped into memory: {error}; lift the limits on this process") from error


def _view(pages: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    """`count` numbers from byte `offset` on; torch.frombuffer refuses none."""
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)


def _open_safetensors(path: Path) -> Archive:
    # Its numpy side maps the file read-only; torch's would fail on one larger than the memory.
    with safe_open(path, framework="numpy"), path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    header.pop("__metadata__", None)
    odd = sorted(f"{name} is {row['dtype']}" for name, row in header.items() if row["dtype"] not in DTYPES)
    if odd:
        raise Unreadable(f"holds types of numbers that torch lacks: {', '.join(odd)}; convert the file")
    pages, tensors = _map(path), {}
    for name, row in header.items():
        first = 8 + length + row["data_offsets"][0]
        tensors[name] = _view(pages, DTYPES[row["dtype"]], math.prod(row["shape"]), first).view(row["shape"])
    return Archive(path, tensors, pages)


@dataclass(frozen=True)
class _Zip:
    path: Path
    pages: mmap.mmap
    file: zipfile.ZipFile
    root: str  # the folder that everything is in
    storages: dict[str, tuple[int, int]]  # key -> first byte, number of bytes
    crcs: dict[int, tuple[int, int]]  # first byte -> number of bytes, CRC-32

    def holds(self, member: str) -> bool:
        return f"{self.root}/{member}" in self.file.namelist()

    def read(self, member: str) -> bytes:
        with self.file.open(f"{self.root}/{member}") as f:
            return f.read(LONGEST_HEADER)  # given no size, a member is unpacked as a whole, whatever it claims

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """One storage as a flat tensor. ValueError if its size is not the one in the pickle."""
        offset, size = self.storages[key]
        if size != count * dtype.itemsize:
            raise ValueError(f"storage {key} is {size} bytes long, not {count} x {dtype.itemsize}")
        return _view(self.pages, dtype, count, offset)


def _open_zip(path: Path) -> Archive:
    with zipfile.ZipFile(path) as file:
        archive = _index(path, file)
        # torch.load tells them apart in the same way
        found = _torchscript(archive) if archive.holds("constants.pkl") else _saved(archive)
        return Archive(path, _unique(found), archive.pages, archive.crcs)


def _index(path: Path, file: zipfile.ZipFile) -> _Zip:
    names = file.namelist()
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    roots = [name.removesuffix("/data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1 or twice:
        why = f"holds {', '.join(twice)} twice" if twice else "is a zip archive of something else"
        raise Unreadable(f"{why}; give a file that torch.save or torch.jit.save wrote")
    prefix = f"{roots[0]}/data/"
    members = [info for info in file.infolist() if info.filename.startswith(prefix)]
    # TorchScript's code is compressed, and nothing else: no other member can unpack to more than the file holds
    code = f"{roots[0]}/code/"
    packed = [
        info.filename for info in file.infolist()
        if (info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size)
        and not (info.filename.startswith(code) and info.file_size <= LONGEST_HEADER)
    ]  # fmt: skip
    if packed:
        raise Unreadable(f"is compressed ({packed[0]} is); torch.load it and torch.save it again")
    if not any(info.CRC for info in file.infolist()):
        raise Unreadable(
            "was saved without sums (torch.serialization.set_crc32_options(False)), so that damage to it cannot be "
            "seen; torch.load it with weights_only=True, and torch.save it again"
        )
    with path.open("rb") as raw:  # not through the map, where each header would read megabytes around it
        spans = [(info, *_span(raw, info)) for info in members]
    storages = {info.filename.removeprefix(prefix): (first, size) for info, first, size in spans}
    crcs = {first: (size, info.CRC) for info, first, size in spans if size}
    archive = _Zip(path, _map(path), file, roots[0], storages, crcs)
    if archive.holds("byteorder") and archive.read("byteorder").decode() != sys.byteorder:
        raise Unreadable("was saved on a machine of the other byte order; save it again on one of this")
    return archive


def _span(raw: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte and number of bytes of a stored member. BadZipFile if it does not begin where the archive says."""
    raw.seek(info.header_offset)
    header = raw.read(30)
    if len(header) < 30 or not header.startswith(ZIP):
        raise zipfile.BadZipFile(f"no member of the archive begins at byte {info.header_offset}")
    # The name and the padding follow. torch checks that the member ends within the file.
    return info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26)), info.file_size


def _torchscript(archive: _Zip) -> list[tuple[str, Tensor]]:
    names: dict[str, set[str]] = {}
    for member in archive.file.namelist():
        match = re.fullmatch(re.escape(archive.root) + r"/code/(__torch__.*)\.py", member)
        if match:
            code = archive.read(member.removeprefix(f"{archive.root}/"))
            names |= torchscript.declared(match[1].replace("/", "."), code.decode())
    return torchscript.tensors(archive.read("data.pkl"), names, archive.storage)


class _Bounded(io.BufferedReader):
    """A file that sets no memory aside for more bytes than it has left, whatever a pickle claims of its texts."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _load(path: Path, device: str) -> Any:
    with _Bounded(path) as raw:  # given a path, torch.load goes by the file's name
        try:
            return torch.load(raw, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise Unreadable(_unread(error)) from error


class _Inert:
    """Stands in for an object that is not needed: takes any arguments and any state, and keeps nothing."""

    def __new__(cls, *_: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _saved(archive: _Zip) -> list[tuple[str, Tensor]]:
    """The tensors of a zip archive of torch.save, mapped at the offsets that torch reports."""
    archive.read("data.pkl")  # torch does not check its sum
    with _Bounded(archive.path) as raw:
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(raw)
        except pickle.UnpicklingError as error:
            raise Unreadable(_unread(error)) from error
    refused = sorted(name for name in unsafe if not (name in INERT or name.startswith(INERT_PACKAGES)))
    if refused:
        raise Unreadable(f"names {', '.join(refused)}: {DANGER}")
    with torch.serialization.safe_globals([(_Inert, name) for name in unsafe]):
        content = _load(archive.path, "meta")
    _check_order(archive)
    keys = {first: key for key, (first, size) in archive.storages.items()}
    return [(name, _mapped(archive, keys, name, t)) for name, t in _leaves(content)]


def _unread(error: Exception) -> str:
    """Why torch.load refused, without its advice to turn weights_only off."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"names {named[1]}: {DANGER}"
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    return f"is damaged, or its pickle does more than name tensors ({reason}); get these weights as safetensors"


def _check_order(archive: _Zip) -> None:
    """Unreadable if storages are in another order than torch writes: from format 1 on it computes their offsets."""
    if not archive.holds(".format_version"):
        return
    keys = sorted(archive.storages, key=archive.storages.__getitem__)
    if keys != [str(i) for i in range(len(keys))]:
        raise Unreadable("was packed anew, in another order; torch.load it and torch.save it again")


def _mapped(archive: _Zip, keys: Mapping[int, str], name: str, meta: Tensor) -> Tensor:
    if meta.layout != torch.strided or meta.is_quantized or meta.is_nested or meta.is_conj() or meta.is_neg():
        raise Unreadable(f"holds {name} sparse, quantized, nested or lazily conjugated; save it dense")
    storage = meta.untyped_storage()
    first = getattr(storage, "_checkpoint_offset", -1)
    try:
        flat = archive.storage(keys[first], meta.dtype, storage.nbytes() // meta.dtype.itemsize)
    except (LookupError, ValueError) as error:
        raise Unreadable(
            f"does not hold {name} where torch says ({error}); torch.load it and torch.save it again"
        ) from error
    return torch.as_strided(flat, meta.shape, meta.stride(), meta.storage_offset())


def _legacy(path: Path) -> dict[str, Tensor]:
    return _unique(_leaves(_load(path, "cpu")))


def _leaves(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dicts, with its name. Unreadable if it is no dict, or a dict holds itself."""
    if not isinstance(content, dict):
        raise Unreadable(f"holds a {type(content).__name__}, not a dict of tensors; save its state_dict()")
    levels: list[tuple[str, dict, tuple[int, ...]]] = [("", content, (id(content),))]
    while levels:
        prefix, level, above = levels.pop()
        for key, value in level.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value.detach()
            elif isinstance(value, dict):
                if id(value) in above:
                    raise Unreadable(f"holds {prefix}{key}, which holds itself; save the state_dict() of a model")
                levels.append((f"{prefix}{key}/", value, (*above, id(value))))


def _unique(found: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, t in found:
        if name in tensors:
            raise Unreadable(f"holds two tensors that are both called {name}; rename one and save it again")
        tensors[name] = t
    return tensors


def open_folder(folder: Path) -> list[Archive]:
    """The files of a folder in Hugging Face's layout that hold its weights.

    Each is held to the SHA-256 beside it, if there is one (sums.py).
    If there is an index (*.safetensors.index.json, else *.bin.index.json): the files that it names. Else the files of
    `KINDS`, of which a folder may hold several; else every *.safetensors; else every *.bin and *.pt that is no
    trainer's leftover (`LEFTOVERS`, which are never opened). ValueError if there is nothing to read or more than one
    index, and one that lists every mismatch between index and files, and every tensor that two files hold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds the weights")
    for pattern in ("*.safetensors.index.json", "*.bin.index.json"):
        indices = sorted(folder.glob(pattern))
        if len(indices) > 1:
            names = ", ".join(path.name for path in indices)
            raise ValueError(f"{folder} holds several indices of its weights: {names}; keep one")
        if indices:
            return _open_indexed(indices[0])
    archives = [open_download(path) for path in _weights(folder)]
    _check_once(archives)
    return archives


def _weights(folder: Path) -> list[Path]:
    kinds = [[folder / name for name in kind if (folder / name).is_file()] for kind in KINDS]
    first = [paths[0] for paths in kinds if paths]
    if first:
        return first
    others = [path for path in sorted(folder.iterdir()) if not any(path.match(pattern) for pattern in LEFTOVERS)]
    found = [p for p in others if p.suffix == ".safetensors"] or [p for p in others if p.suffix in (".bin", ".pt")]
    if not found:
        names = ", ".join(name for kind in KINDS for name in kind)
        raise ValueError(
            f"{folder} holds no weights: no *.index.json, none of {names}, and no other *.safetensors, *.bin or *.pt; "
            "fetch them into it"
        )
    return found


def _check_once(archives: Iterable[Archive]) -> None:
    where: dict[str, Path] = {}
    twice = []
    for archive in archives:
        twice += [f"{n} in {where[n]} and {archive.path}" for n in archive.tensors if n in where]
        where |= dict.fromkeys(archive.tensors, archive.path)
    if twice:
        raise ValueError(f"{len(twice)} tensors are in two files: {'; '.join(twice)}; keep one of the files")


def _open_indexed(index: Path) -> list[Archive]:
    files = _weight_map(index)
    names = sorted(set(files.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(f"{index} names files that are missing: {', '.join(absent)}; fetch them into its folder")
    archives = [open_download(index.parent / name) for name in names]
    _check_once(archives)
    held = {name: archive.path.name for archive in archives for name in archive.tensors}
    wrong = [f"{n} is not in {f} but in {held.get(n, 'none')}" for n, f in files.items() if held.get(n) != f]
    wrong += [f"{n} is in {f} but not in the index" for n, f in held.items() if n not in files]
    if wrong:
        raise ValueError(f"{index} and its files differ: {'; '.join(wrong)}; fetch the folder again")
    return archives


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, in the folder of the index."""
    files = fields.load(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} is no index: it has no weight_map that names a tensor; fetch it again")
    outside = sorted(str(f) for f in files.values() if not isinstance(f, str) or f in ("", "..") or Path(f).name != f)
    if outside:
        some = ", ".join(name[:100] for name in outside[:5])
        raise ValueError(f"{index} names {some}; its files have to be in its own folder")
    return files
