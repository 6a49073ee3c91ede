"""LLaVA's data sets: from records to batches, in worker processes, in an order that follows from the seed.

    sources -> order(seed, epoch) -> the records of a step -> prepared by workers -> Step

A checkpoint need not save the position in the data: the records of step t follow from the seed and t, whatever the
number of workers. A record that cannot be used is never replaced: it stops the run, or is skipped and listed.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llava_fn.batch import IMAGE, Batch, Sample, collate
from llava_fn.data import image, index, lengths, schema, text
from llava_fn.data.options import Data, Source
from llava_fn.data.templates import template_of
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.data.workers import mapped
from llava_fn.errors import BadRecord, TooLong
from llava_fn.files import digest

Bad = tuple[str, str]  # name and reason of a record that cannot be used
LENGTHS = 1024  # records that a worker process measures at a time


def check_share(samples: int, accumulate: int, world: int, tp: int) -> None:
    """ValueError if an update has fewer samples than micro-batches. world: number of processes."""
    parts = world // tp * accumulate
    if parts > 1 and samples < parts:
        most = samples // (world // tp)
        other = f"lower accumulate to at most {most}" if most else "start fewer processes, or raise tp"
        raise ValueError(
            f"data.samples={samples} of an update cannot be shared out to {parts} micro-batches "
            f"({world} processes / tp={tp} x accumulate={accumulate}); raise it to at least {parts}, or {other}"
        )


@dataclass(frozen=True)
class Record:
    """One record, and the file that it comes from."""

    name: str  # in errors: file, position and id
    images: Path
    value: dict


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """The records of a file, each parsed when it is asked for.

    spans: int64[n, 2], see index.py. size, changed: of the file, in bytes and nanoseconds. unread: see `unread`. It
    pickles, so that worker processes parse.
    """

    path: Path
    images: Path
    spans: np.ndarray
    size: int
    changed: int
    unread: Counter[str]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        start, stop = self.spans[i].tolist()
        with self.path.open("rb") as f:
            stat = os.fstat(f.fileno())
            if (stat.st_size, stat.st_mtime_ns) != (self.size, self.changed):
                raise ValueError(f"{self.path} has changed since the run began; start the run again")
            f.seek(start)
            value = json.loads(f.read(stop - start))
        return Record(_name(self.path, i % len(self), value), self.images, value)


@dataclass(frozen=True)
class Preparation:
    """What turns a record into a sample. It pickles, because worker processes hold it."""

    tokenizer: Tokenizer
    template: str
    compat: str | None
    image_mode: str
    image: int  # pixels per side
    patches: int  # per image
    max_tokens: int
    image_reading: str = "original"


def preparation(tokenizer: Tokenizer, image: int, patches: int, data: Data) -> Preparation:
    """The preparation that `data` asks for, for a tower that sees `image` pixels per side as `patches` tokens."""
    return Preparation(
        tokenizer, data.template, data.compat, data.image_mode, image, patches, data.max_tokens, data.image_reading
    )


@dataclass(frozen=True)
class Share:
    """The share of every update that a process prepares: number `rank` of `size`, on the data axis."""

    rank: int = 0
    size: int = 1
    multiple: int = 1  # a batch is padded to a multiple of so many tokens, so that the tensor axis can shard them


@dataclass(frozen=True)
class Step:
    """One process's batches of one update. bad: its records that could not be used."""

    step: int
    batches: tuple[Batch, ...]
    bad: tuple[Bad, ...]


def read(source: Source) -> Sequence[Record]:
    """All records of a data set. ValueError if the file is missing, empty or not LLaVA's, or the folder is missing.

    Of a list of objects, and of JSON lines, only the places are kept, some 16 bytes a record; a list of anything else
    is kept parsed.
    """
    if not source.records.is_file():
        raise ValueError(f"{source.records}: no such file; give the JSON or JSONL file of the data set")
    if not source.images.is_dir():
        raise ValueError(f"{source.images}: no such folder; give the folder that the images of {source.records} lie in")
    keys: Counter[str] = Counter()
    stat, places = source.records.stat(), index.spans(source.records, lambda value: keys.update(schema.unread(value)))
    if places is not None:
        return Records(source.records, source.images, places, stat.st_size, stat.st_mtime_ns, keys)
    if index.has_lines(source.records):
        deque(_lines(source.records), maxlen=0)  # a broken line is named before any is kept
        values = list(_lines(source.records))
    else:
        values = _json(source.records, 0, _utf8(f"{source.records}", source.records.read_bytes()))
    if not isinstance(values, list) or not values:
        raise ValueError(f"{source.records}: not a list with at least one record{_inside(values)}")
    return [Record(_name(source.records, i, v), source.images, v) for i, v in enumerate(values)]


def _inside(values: object) -> str:
    """Where in an object the records seem to be, as the end of a message."""
    lists = [key for key, value in values.items() if isinstance(value, list)] if isinstance(values, dict) else []
    return f"; write the list in {' or '.join(map(repr, lists))} to a file of its own" if lists else ""


def unread(sources: Iterable[Sequence[Record]]) -> Counter[str]:
    """The keys of records that are set and change nothing, with the number of records that have each; see schema.py."""
    out: Counter[str] = Counter()
    for source in sources:
        out += source.unread if isinstance(source, Records) else _unread(r.value for r in source)
    return out


def _unread(values: Iterable[object]) -> Counter[str]:
    return Counter(key for value in values for key in schema.unread(value))


def unread_line(sources: Iterable[Sequence[Record]]) -> str:
    """What `unread` finds, for the log; empty if it finds nothing."""
    found = ", ".join(f"{key} ({count} records)" for key, count in unread(sources).most_common())
    return f"keys of records that are set and change nothing: {found}" if found else ""


def _utf8(where: str, content: bytes) -> str:
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error}); write it as UTF-8") from error


def _json(path: Path, line: int, content: str):
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting as deep
        raise ValueError(f"{path}, from line {line + 1} on: {error}") from error


def _lines(path: Path) -> Iterator[Any]:
    """The values of JSON lines, one line in memory at a time."""
    number = 0
    with path.open("rb") as f:
        for content in f:
            for line in _utf8(f"{path}, line {number + 1}", content).removesuffix("\n").split("\n"):
                if line.strip():
                    yield _json(path, number, line)
                number += 1


def _name(path: Path, i: int, value: object) -> str:
    label = value.get("id") if isinstance(value, dict) else None
    return f"{path.name}[{i}]" + (f" id {label}" if label is not None else "")


def fingerprint(sources: Sequence[Source]) -> list[dict]:
    """Each file's SHA-256 and weight, which must be the same when a run is resumed."""
    return [{"records": s.records.name, "sha256": digest(s.records), "weight": s.weight} for s in sources]


def encode(record: Record, preparation: Preparation) -> text.Encoded:
    """Tokens and targets, with every position of an image. BadRecord, with the record's name, if it is unusable."""
    try:
        turns = text.turns_of(record.value)
        template = text.template_for(record.value, template_of(preparation.template), preparation.compat)
        short = text.encode(turns, template, preparation.tokenizer, preparation.compat)  # one IMAGE an image
        ids, supervised = [], []
        for token, target in zip(short.ids, short.supervised, strict=True):
            times = preparation.patches if token == IMAGE else 1
            ids += [token] * times
            supervised += [target] * times
        limit = preparation.max_tokens
        if len(ids) > limit:
            raise TooLong(f"{len(ids)} tokens, more than max_tokens={limit}; shorten it or raise the limit")
    except BadRecord as error:
        raise type(error)(f"{record.name}: {error}") from error
    return text.Encoded(ids, supervised)


def sample(record: Record, preparation: Preparation, encoded: text.Encoded | None = None) -> Sample:
    """The record in tokens, with its images decoded. BadRecord, with the record's name, if text or image is unusable.

    encoded: the result of `encode`, if the caller has it.
    """
    encoded, side = encoded or encode(record, preparation), preparation.image
    try:
        paths = [record.images / name for name in text.images_of(record.value)]
        opened = [image.open_image(p, reading=preparation.image_reading) for p in paths]
        pixels = [image.to_pixels(x, side, preparation.image_mode, str(p)) for x, p in zip(opened, paths, strict=True)]
    except BadRecord as error:
        raise BadRecord(f"{record.name}: {error}") from error
    stacked = torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side, dtype=torch.uint8)
    return Sample(record.name, tuple(encoded.ids), tuple(encoded.supervised), stacked)


def usable(records: Iterable[Record], preparation: Preparation) -> tuple[list[Sample], list[Bad]]:
    """The records in tokens, with their images decoded, and those that cannot be used."""
    good, bad = [], []
    for record in records:
        try:
            good.append(sample(record, preparation))
        except BadRecord as error:
            bad.append((record.name, str(error)))
    return good, bad


def held_out(records: Iterable[Record], preparation: Preparation, on_bad_record: str) -> tuple[list[Sample], list[Bad]]:
    """`usable` of held-out records. BadRecord as of `tolerate`."""
    good, bad = usable(records, preparation)
    tolerate("held-out records", bad, on_bad_record, len(good))
    return good, bad


def tolerate(what: str, bad: Sequence[Bad], on_bad_record: str, usable: int = 1) -> None:
    """BadRecord lists the records that cannot be used, if such may not be skipped or if none is left.

    what: the records that they are of. usable: how many can be used.
    """
    if bad and (on_bad_record == "error" or not usable):
        advice = "none is left; mend the data set"
        if on_bad_record == "error":
            advice = 'mend the data set, or run with on_bad_record="skip" to leave them out and list them'
        reasons = "".join(f"\n  {reason}" for _, reason in bad)
        raise BadRecord(f"{what}: {len(bad)} bad records; {advice}{reasons}")


@lru_cache(maxsize=2)
def order(sizes: tuple[int, ...], weights: tuple[float, ...], seed: int, epoch: int) -> np.ndarray:
    """The records of one epoch, int64[n], numbered through all sources. It depends on the arguments alone.

    A weight of 2.5 shows each record of a source twice and half of them, drawn for this epoch, a third time.
    """
    parts, start = [], 0
    for j, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        whole, some = int(weight), round((weight - int(weight)) * size)
        drawn = np.random.default_rng([seed, epoch, j]).permutation(size)[:some]
        parts += [start + np.arange(size)] * whole + [start + drawn]
        start += size
    return np.random.default_rng([seed, epoch]).permutation(np.concatenate(parts))


def cuts(lengths: np.ndarray, budget: int) -> list[int]:
    """Boundaries [0, ..., n] of updates that hold as many samples as fit the token budget.

    lengths: tokens of each sample; one above the budget is an update of its own.
    """
    ends, sums = [0], np.concatenate([[0], np.cumsum(lengths)])
    while ends[-1] < len(lengths):
        fit = int(np.searchsorted(sums, sums[ends[-1]] + budget, side="right")) - 1
        ends.append(max(fit, ends[-1] + 1))
    return ends


@dataclass(frozen=True)
class Schedule:
    """The records of each update."""

    sizes: tuple[int, ...]
    data: Data
    lengths: np.ndarray | None  # tokens of every record, if updates are cut by tokens

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The updates of one epoch: the numbers of their records. The last may be smaller (HF: drop_last=False)."""
        rows = order(self.sizes, tuple(s.weight for s in self.data.sources), self.data.seed, epoch)
        ends = list(range(0, len(rows), self.data.samples)) + [len(rows)]
        if self.lengths is not None:
            ends = cuts(self.lengths[rows], self.data.tokens)
        return [rows[a:b] for a, b in zip(ends, ends[1:], strict=False)]

    def steps(self) -> int:
        """Updates in `epochs` epochs, rounded up."""
        whole, part = divmod(self.data.epochs, 1)
        full = sum(len(self.epoch(e)) for e in range(int(whole)))
        return full + (int(np.ceil(part * len(self.epoch(int(whole))))) if part else 0)

    def updates(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, numbers of its records) from update number start + 1 on, without end."""
        done = 0
        for epoch in count():
            for rows in self.epoch(epoch):
                done += 1
                if done > start:
                    yield done, rows


def pick(records: Sequence[Sequence[Record]], number: int) -> Record:
    """The record of a number, counted through all sources."""
    for source in records:
        if number < len(source):
            return source[number]
        number -= len(source)
    raise IndexError(f"there is no record {number} behind the last one")


def schedule(
    records: Sequence[Sequence[Record]], data: Data, preparation: Preparation, cache: Path | None = None
) -> Schedule:
    """The schedule of a run. A token budget measures every record first. ValueError if no record is ever shown.

    cache: a folder that keeps the lengths for the next start; see lengths.py. ValueError names a record longer than the
    token budget. A bad record stops here only under on_bad_record="error".
    """
    sizes = tuple(len(r) for r in records)
    if not any(round(s.weight * n) for s, n in zip(data.sources, sizes, strict=True)):
        raise ValueError("the data set is empty: no source with records and a weight above 0")
    tokens = None
    if data.tokens:
        tokens = _measured(records, data, preparation, cache)
        worst = int(tokens.argmax())
        if tokens[worst] > data.tokens:
            raise ValueError(
                f"{pick(records, worst).name} has {tokens[worst]} tokens, more than the budget of "
                f"tokens={data.tokens} an update; raise the budget"
            )
    return Schedule(sizes, data, tokens)


def _measured(
    records: Sequence[Sequence[Record]], data: Data, preparation: Preparation, cache: Path | None
) -> np.ndarray:
    """Tokens of every record, int64[n], from the cache or from `data.workers` processes.

    What names the cache has all that decides them: the seed too, since it chooses the records that a run holds out.
    """
    count, p = sum(map(len, records)), preparation
    work = _Lengths(records, preparation, data.on_bad_record)
    what = [[digest(s.records) for s in data.sources], [len(r) for r in records], data.on_bad_record, data.seed]
    what += [p.template, p.compat, p.patches, p.max_tokens]
    key = hashlib.sha256(json.dumps(what).encode() + p.tokenizer.model).hexdigest()
    path = cache and cache / f"lengths-{key[:16]}.npy"
    if path and (old := lengths.kept(path, count, p.max_tokens)) is not None:
        return old
    chunks = [range(i, min(i + LENGTHS, count)) for i in range(0, count, LENGTHS)]
    out, done = np.empty(count, np.int64), 0
    wait = 0.1 if sys.stderr.isatty() else 10.0  # seconds between two lines
    with tqdm(total=count, unit=" records", desc="tokens of each record", mininterval=wait, delay=wait) as bar:
        for some in mapped(work, chunks, data.workers if count > LENGTHS else 0):
            out[done : done + len(some)] = some
            done += len(some)
            bar.update(len(some))
    if path:
        lengths.keep(path, out)
    return out


def longest(records: Sequence[Sequence[Record]], preparation: Preparation, most: int = 512) -> int:
    """Tokens of the longest of `most` records, evenly spread. A bad one, which the run names later, counts as none."""
    whole = sum(map(len, records))
    numbers = np.linspace(0, whole - 1, min(most, whole)).astype(int)
    return max(1, *_Lengths(records, preparation, "skip")(numbers.tolist()))


@dataclass(frozen=True)
class _Lengths:
    records: Sequence[Sequence[Record]]
    preparation: Preparation
    on_bad_record: str

    def __call__(self, numbers: Iterable[int]) -> list[int]:
        return [_length(pick(self.records, i), self.preparation, self.on_bad_record) for i in numbers]


def _length(record: Record, preparation: Preparation, on_bad_record: str) -> int:
    try:
        return len(encode(record, preparation).ids)
    except BadRecord:
        if on_bad_record == "error":
            raise
        return 0  # listed as skipped when its update comes


def balanced(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Bins of about equal cost: the numbers of each bin's items, in order.

    The dearest item left goes to the cheapest bin. It depends on the arguments alone. Source: Graham 1969 (LPT), whose
    dearest bin costs at most 4/3 of the best possible.
    """
    loads, out = [(0.0, j) for j in range(bins)], [[] for _ in range(bins)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, j = heapq.heappop(loads)
        out[j].append(i)
        heapq.heappush(loads, (load + costs[i], j))
    return [sorted(items) for items in out]


@dataclass(frozen=True)
class _Worker:
    records: Sequence[Sequence[Record]]
    preparation: Preparation
    accumulate: int
    share: Share

    def __call__(self, item: tuple[int, np.ndarray]) -> Step:
        step, numbers = item
        records = [pick(self.records, i) for i in numbers.tolist()]
        encoded = [self.encoded(r) for r in records]
        parts = balanced([_tokens(e) for e in encoded], self.share.size * self.accumulate)
        first = self.share.rank * self.accumulate
        batches, bad = [], []
        for part in parts[first : first + self.accumulate]:
            good = []
            for i in part:
                try:
                    good.append(self.sample(records[i], encoded[i]))
                except BadRecord as error:
                    bad.append((records[i].name, str(error)))
            if good or self.share.size > 1:  # all processes have the same number of batches
                batches.append(collate(good, self.share.multiple, self.preparation.image))
        return Step(step, tuple(batches), tuple(bad))

    def encoded(self, record: Record) -> text.Encoded | BadRecord:
        try:
            return encode(record, self.preparation)
        except BadRecord as error:
            return error

    def sample(self, record: Record, encoded: text.Encoded | BadRecord) -> Sample:
        if isinstance(encoded, BadRecord):
            raise encoded
        return sample(record, self.preparation, encoded)


def _tokens(encoded: text.Encoded | BadRecord) -> int:
    return 0 if isinstance(encoded, BadRecord) else len(encoded.ids)


def steps(
    records: Sequence[Sequence[Record]], schedule: Schedule, preparation: Preparation, start: int, stop: int,
    share: Share = Share(),
) -> Iterable[Step]:  # fmt: skip
    """Updates start + 1 to stop, in order, which `data.workers` processes prefetch.

    The samples of an update are balanced: each process and micro-batch has about as many tokens. The balance follows
    from the records alone. BadRecord if a record is unusable and the policy is "error". Where the policy is "skip", an
    update of which no record can be used has no batches on a process alone, and batches of padding on one of several.
    """
    data = schedule.data
    work = _Worker(records, preparation, data.accumulate, share)
    for step in mapped(work, islice(schedule.updates(start), stop - start), data.workers):
        tolerate(f"step {step.step}", step.bad, data.on_bad_record)
        yield step
