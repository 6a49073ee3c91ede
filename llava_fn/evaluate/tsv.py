"""The TSVs of VLMEvalKit, read in one pass: every cell is a text, nothing is guessed, and nothing is ever run as code.

A file has a header and one row a question. A cell may stand in double quotes, and may then hold tabs, line ends and,
doubled, quotes. Only an empty cell is missing: "None", "NA", "007" and "=1+1" are what they are. The column image holds
the base64 of an image file, a list of them ("['...', '...']"), or, up to 64 characters, the index of the row whose
images it shares; where there is no such column, image_path names a file, or lists several, in the TSV's folder.
Images are checked but not kept: `Table` holds their places in the file, and `Table.images` reads them again.
Source: vlmeval/dataset/image_base.py.
Differs: a row without an image, which VLMEvalKit leaves out, is an error, as is every other row that cannot be used.
"""

from __future__ import annotations

import ast
import base64
import errno
import hashlib
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from llava_fn.evaluate.records import Dataset, Kind, Question
from llava_fn.files import digest

KNOWN: Mapping[str, Kind] = MappingProxyType({
    "AI2D_TEST": "choice", "ChartQA_TEST": "chartqa", "DocVQA_VAL": "docvqa", "MMMU_DEV_VAL": "mmmu",
})  # fmt: skip
MD5 = MappingProxyType(
    {
        "AI2D_TEST": "0f593e0d1c7df9a3d69bf1f947e71975",
        "ChartQA_TEST": "c902e0aa9be5582a7aad6dcf52734b42",
        "DocVQA_VAL": "d5ee77e1926ff10690d469c56b73eabf",
        "MMMU_DEV_VAL": "585e8ad75e73f75dcad265dfd0417d64",
    }
)  # of the files that VLMEvalKit downloads
REFERENCE = 64  # characters up to which an image cell is the index of another row
SHOWN = 10  # problems that an error lists
LONGEST_LIST = 100_000  # characters of a list of paths
LONGEST_REASON = 500  # characters of a problem that are shown
WINDOW = 2**25  # bytes of the mapped file that are read before its pages are released


@dataclass(frozen=True)
class Span:
    """The base64 of one image: bytes of the TSV."""

    start: int
    stop: int


@dataclass(frozen=True)
class Table:
    """A TSV that has been read. sha256: of its bytes. notes: for the user.

    pictures: index -> the places of its images, in order.
    """

    dataset: Dataset
    questions: list[Question]
    sha256: str
    notes: tuple[str, ...] = ()
    pictures: Mapping[str, tuple[Span | Path, ...]] = field(default_factory=dict, repr=False)

    def images(self, question: Question) -> list[bytes]:
        """The bytes of its image files. ValueError if they have changed since the TSV was read."""
        content = [_read(self.dataset.path, place) for place in self.pictures[question.index]]
        if _digest(content) != question.images:
            raise ValueError(f"{self.dataset.path}: the images of index {question.index} have changed meanwhile")
        return content

    def part(self, indices: Sequence[str] = (), limit: int | None = None) -> Table:
        """The table with these questions only (none: all), in the file's order, and only the first `limit` of them.

        ValueError names an index that the file lacks.
        """
        present = {q.index for q in self.questions}
        unknown = [index for index in indices if index not in present]
        if unknown:
            raise ValueError(f"{self.dataset.path} has no index {', '.join(unknown)}")
        wanted = set(indices) or present
        return replace(self, questions=[q for q in self.questions if q.index in wanted][:limit])


def _read(path: Path, place: Span | Path) -> bytes:
    if isinstance(place, Path):
        if place.exists() and not place.is_file():  # of a pipe or a device there may be no end
            raise OSError(errno.EINVAL, "a directory or a device, and no file", str(place))
        return place.read_bytes()
    with path.open("rb") as f:
        f.seek(place.start)
        return base64.b64decode(f.read(place.stop - place.start), validate=True)


def _digest(images: Sequence[bytes]) -> str:
    """A digest of the digests of all images, so that no two lists of images share it."""
    return hashlib.sha256(b"".join(hashlib.sha256(x).digest() for x in images)).hexdigest()


def open_table(path: Path, kind: Kind | None = None) -> Table:
    """Read a TSV. kind: of its questions; found from its name or its columns, unless given.

    ValueError names the file and, with row, line and index, each row that cannot be used: a wrong number of cells, no
    index or the index of another row, no image, no base64, a reference to no row or in a circle, a missing file, bytes
    that are not UTF-8, or a quote that never ends.
    """
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path}: no such file, or an empty one; give a TSV with a header")
    with path.open("rb") as f, ThreadPoolExecutor(2) as pool:
        name = next((n for n in KNOWN if n.lower() == path.stem.lower()), path.stem)
        algorithms = ("sha256", "md5") if name in MD5 else ("sha256",)
        digests = [pool.submit(digest, path, algorithm) for algorithm in algorithms]
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            columns, rows = _parse(path, data)
        sha256, *md5 = [d.result() for d in digests]
    questions = [Question(j, row.cells["index"], row.cells, row.images) for j, row in enumerate(rows)]
    kind = kind or KNOWN.get(name) or _kind(columns, questions)
    notes = [f"{path.name} is not the file that VLMEvalKit publishes: its md5 is {m}" for m in md5 if m != MD5[name]]
    dataset = Dataset(name, kind, path, tuple(c for c in columns if c != "image"))
    return Table(dataset, questions, sha256, tuple(notes), {row.cells["index"]: row.places for row in rows})


def _kind(columns: Sequence[str], questions: Sequence[Question]) -> Kind:
    """MMMU has subjects, "choice" has options, and in DocVQA every answer is a list of texts."""
    if "l2-category" in columns:
        return "mmmu"
    if {"A", "B"} <= set(columns):
        return "choice"
    answers = [q.cells["answer"].strip() for q in questions]
    return "docvqa" if all(re.fullmatch(r"\[\s*['\"].*\]", a, re.S) for a in answers) else "chartqa"


@dataclass(frozen=True)
class _Row:
    number: int  # from 1, the header not counted
    offset: int  # byte at which it begins
    cells: Mapping[str, str]
    places: tuple[Span | Path, ...] = ()
    images: str = ""
    same: str = ""  # the index of the row whose images it shares

    @property
    def label(self) -> str:
        """Its name in errors."""
        return f"row {self.number} (index {_cut(self.cells['index'], 80)!r})"


def _parse(path: Path, data: mmap.mmap) -> tuple[list[str], list[_Row]]:
    lines, columns, rows = _lines(data), [], []
    wrong: list[tuple[int, str]] = []  # byte, what is wrong there
    try:
        columns = _columns(data, next(lines, []))
        rows = list(_rows(path, data, lines, columns, wrong))
        rows = rows if wrong else _resolve(rows, wrong)
        if not rows and not wrong:
            raise _BadCell(0, "there is no row below the header; give a file with questions")
    except _BadCell as error:
        wrong.append((error.offset, error.reason))
    if wrong:
        shown = "".join(f"\n  line {_line(data, at)}: {_cut(reason, LONGEST_REASON)}" for at, reason in wrong[:SHOWN])
        more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"{path} cannot be used; mend these rows:{shown}{more}")
    return columns, rows


def _cut(text: str, most: int) -> str:
    """What a person can read of a text, which may be a whole cell."""
    return text if len(text) <= most else f"{text[:most]}..."


class _BadCell(ValueError):
    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset, self.reason = offset, reason


def _line(data: mmap.mmap, offset: int) -> int:
    """The line of the file, from 1, that a byte is in."""
    return 1 + sum(data[i : min(i + WINDOW, offset)].count(b"\n") for i in range(0, offset, WINDOW))


def _lines(data: mmap.mmap) -> Iterator[list[Span]]:
    """The cells of each row, with their quotes; empty lines are left out."""
    at, row, size, window = 3 if data[:3] == b"\xef\xbb\xbf" else 0, [], len(data), 0
    while at < size or row:
        cell = _cell(data, at)
        row.append(cell)
        at = cell.stop + 1
        if data[cell.stop : at] == b"\t":
            continue
        if data[cell.stop : at] == b"\r":
            at += 1
        if len(row) > 1 or cell.start < cell.stop:
            yield row
        row = []
        if at - window > WINDOW:
            window = at
            data.madvise(mmap.MADV_DONTNEED)


def _cell(data: mmap.mmap, at: int) -> Span:
    """The cell that begins here, up to the tab or line end behind it, or the end of the file."""
    if data[at : at + 1] != b'"':
        line = data.find(b"\n", at)
        line = line if line >= 0 else len(data)
        tab = data.find(b"\t", at, line)
        if tab >= 0:
            return Span(at, tab)
        return Span(at, line - 1 if line > at and data[line - 1 : line] == b"\r" else line)
    stop = data.find(b'"', at + 1) + 1
    while stop and data[stop : stop + 1] == b'"':
        stop = data.find(b'"', stop + 1) + 1
    if not stop:
        raise _BadCell(at, "a quote begins here and never ends")
    if data[stop : stop + 1] not in (b"\t", b"\n", b"") and data[stop : stop + 2] != b"\r\n":
        raise _BadCell(stop, "text goes on behind the quote that ends a cell; double the quotes inside a cell")
    return Span(at, stop)


def _inside(data: mmap.mmap, cell: Span) -> Span:
    """The cell without its quotes."""
    quoted = data[cell.start : cell.start + 1] == b'"'
    return Span(cell.start + 1, cell.stop - 1) if quoted else cell


def _text(data: mmap.mmap, cell: Span) -> str:
    inside = _inside(data, cell)
    try:
        text = data[inside.start : inside.stop].decode()
    except UnicodeDecodeError as error:
        raise _BadCell(cell.start, f"not UTF-8 ({error}); write the file as UTF-8") from error
    return text if inside == cell else text.replace('""', '"')


def _columns(data: mmap.mmap, header: Sequence[Span]) -> list[str]:
    columns = [_text(data, cell) for cell in header]
    twice = sorted({c for c in columns if columns.count(c) > 1})
    missing = [c for c in ("index", "question", "answer") if c not in columns]
    if "image" not in columns and "image_path" not in columns:
        missing.append("image (or image_path)")
    if twice or missing:
        found = (("lacks", missing), ("has twice", twice))
        problems = " and ".join(f"{what} {', '.join(names)}" for what, names in found if names)
        raise _BadCell(0, f"the header {problems}; its columns, between tabs, are {columns[:40]}")
    return columns


def _rows(
    path: Path, data: mmap.mmap, lines: Iterator[list[Span]], columns: Sequence[str], wrong: list[tuple[int, str]]
) -> Iterator[_Row]:
    numbers: dict[str, int] = {}  # of rows, by index
    for number, spans in enumerate(lines, 1):
        label = f"row {number}"
        try:
            row = _row(data, number, spans, columns)
            label = row.label
            if row.cells["index"] in numbers:
                raise _BadCell(row.offset, f"row {numbers[row.cells['index']]} has this index too")
            numbers[row.cells["index"]] = number
            yield _with_images(path, data, row, spans[columns.index("image")] if "image" in columns else None)
        except _BadCell as error:
            wrong.append((spans[0].start, f"{label}: {error.reason}"))


def _row(data: mmap.mmap, number: int, spans: Sequence[Span], columns: Sequence[str]) -> _Row:
    begin = spans[0].start
    if len(spans) != len(columns):
        raise _BadCell(begin, f"{len(spans)} cells, but the header has {len(columns)}")
    cells = {name: _text(data, span) for name, span in zip(columns, spans, strict=True) if name != "image"}
    if not cells["index"]:
        raise _BadCell(begin, "it has no index")
    return _Row(number, begin, cells)


def _with_images(path: Path, data: mmap.mmap, row: _Row, cell: Span | None) -> _Row:
    if cell is None:
        places = tuple(path.parent / name for name in _names(row))
        return replace(row, places=places, images=_digest([_content(row, lambda p=p: _read(path, p)) for p in places]))
    inside = _inside(data, cell)
    if inside.start == inside.stop:
        raise _BadCell(row.offset, "it has no image")
    if data[inside.start : inside.start + 1] == b"[" and data[inside.stop - 1 : inside.stop] == b"]":
        spans = tuple(_items(data[inside.start : inside.stop], inside.start))
        if any(span.start == span.stop for span in spans):
            raise _BadCell(row.offset, "an image of its list is empty")
    elif inside.stop - inside.start <= REFERENCE:
        return replace(row, same=_text(data, cell))
    else:
        spans = (inside,)
    return replace(row, places=spans, images=_digest([_content(row, lambda s=s: _base64(data, s)) for s in spans]))


def _base64(data: mmap.mmap, span: Span) -> bytes:
    return base64.b64decode(data[span.start : span.stop], validate=True)


def _content(row: _Row, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise _BadCell(row.offset, f"{error.filename} cannot be read ({error.strerror}); put the file there") from error
    except ValueError as error:
        raise _BadCell(row.offset, f"its image is no base64 ({error}); encode the bytes of an image file") from error


def _items(cell: bytes, start: int) -> Iterator[Span]:
    """The items of a list of base64, which holds no comma, no quote and no blank itself."""
    at = start + 1
    for item in cell[1:-1].split(b","):
        inside = item.strip().strip(b"'\"")
        begin = at + item.find(inside)
        yield Span(begin, begin + len(inside))
        at += len(item) + 1


def _names(row: _Row) -> list[str]:
    """The file names of image_path, of which several are written as a list of Python's."""
    cell = row.cells["image_path"]
    names: object = [cell] if cell else []
    if cell.startswith("[") and cell.endswith("]") and len(cell) <= LONGEST_LIST:
        try:
            names = ast.literal_eval(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise _BadCell(row.offset, f"its image_path is no list of names ({error})") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise _BadCell(row.offset, "its image_path names no image; give a name, or a list like ['a.png', 'b.png']")
    return names


def _resolve(rows: Sequence[_Row], wrong: list[tuple[int, str]]) -> list[_Row]:
    """The rows; those that refer to another row get its images."""
    by_index = {row.cells["index"]: row for row in rows}
    out = []
    for row in rows:
        end, seen = row, set()
        while end is not None and end.same and end.same not in seen:
            seen.add(end.same)
            end = by_index.get(end.same)
        if end is None or end.same:
            what = "leads in a circle" if end else "is no other row's index, and too short for an image"
            wrong.append((row.offset, f"{row.label}: its image {row.same!r} {what}"))
        else:
            out.append(replace(row, places=end.places, images=end.images))
    return out
