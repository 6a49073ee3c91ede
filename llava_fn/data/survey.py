"""What a whole data set is like: the figures of its records added up, and its oddest images."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from llava_fn.data.check import Figures, ImageFacts
from llava_fn.data.options import Data
from llava_fn.data.records import Record

ODD = 6  # images of a kind that are shown
EXAMPLES = 5  # of records that are the same
RATIO = 3.0  # of the sides of an image of an extreme shape
HUGE = 2**24  # pixels
KINDS = ("extreme shape", "tiny", "huge", "one colour", "rotated", "transparent")


@dataclass
class Survey:
    """Sums over records, a chunk at a time, in memory of some 150 bytes a record and 100 an image.

    size: pixels per side that the model sees; a tiny image has a shorter side below a quarter of them. The images are
    files: one that several records name is counted once.
    """

    size: int
    tokens: array[int] = field(default_factory=lambda: array("l"))  # of each record that can be used
    targets: array[int] = field(default_factory=lambda: array("l"))
    turns: array[int] = field(default_factory=lambda: array("l"))
    images: array[int] = field(default_factory=lambda: array("l"))
    count: int = 0  # records, bad ones too
    bad: list[str] = field(default_factory=list)  # reasons
    long: int = 0  # bad records that have too many tokens, and nothing else
    marks: Counter[str] = field(default_factory=Counter)  # of other tools -> records
    twins: list[tuple[int, int]] = field(default_factory=list)  # numbers of records that are the same
    same_images: list[tuple[str, str]] = field(default_factory=list)  # paths of files with the same content
    kinds: Counter[str] = field(default_factory=Counter)  # of odd images
    odd: dict[str, list[tuple[float, int, ImageFacts]]] = field(default_factory=dict)  # kind -> the oddest
    _records: dict[int, int] = field(default_factory=dict)
    _contents: dict[int, str] = field(default_factory=dict)
    _paths: set[str] = field(default_factory=set)

    @property
    def files(self) -> int:
        """Image files that the records name."""
        return len(self._paths)

    def add(self, chunk: Iterable[Figures]) -> None:
        """Add the figures of the next records."""
        for x in chunk:
            self._one(x, self.count)
            self.count += 1

    def _one(self, x: Figures, number: int) -> None:
        if x.error:
            self.bad.append(x.error)
            self.long += x.long
            return
        for values, value in ((self.tokens, x.tokens), (self.targets, x.targets), (self.turns, x.turns)):
            values.append(value)
        self.images.append(len(x.images))
        self.marks.update(x.marks)
        if (first := self._records.setdefault(x.digest, number)) != number:
            self.twins.append((first, number))
        for look in x.images:
            if look.path not in self._paths:
                self._paths.add(look.path)
                self._image(look)

    def _image(self, look: ImageFacts) -> None:
        if (first := self._contents.setdefault(look.digest, look.path)) != look.path:
            self.same_images.append((first, look.path))
        short, long = sorted((look.width, look.height))
        odd = dict.fromkeys(look.notes, 0.0)
        odd |= {"extreme shape": long / short} if long > RATIO * short else {}
        odd |= {"tiny": float(-short)} if 4 * short < self.size else {}
        odd |= {"huge": float(short * long)} if short * long > HUGE else {}
        self.kinds.update(odd.keys())
        for kind, degree in odd.items():
            kept = self.odd.setdefault(kind, [])
            (heapq.heappush if len(kept) < ODD else heapq.heappushpop)(kept, (degree, -len(self._paths), look))


@dataclass(frozen=True)
class Estimate:
    """What training on a data set takes. hours: None if no rate is known."""

    updates: int
    tokens: int
    hours: float | None


def estimate(s: Survey, data: Data, rate: float) -> Estimate:
    """Of the records that can be used, for the epochs and updates of `data`. rate: tokens a second; 0: unknown.

    With a token budget the number of updates is what full ones need, some percent below the true one.
    """
    tokens, whole = sum(s.tokens), len(s.tokens)
    size = tokens / data.tokens if data.tokens else whole / data.samples
    seen = round(tokens * data.epochs)
    return Estimate(ceil(ceil(size) * data.epochs), seen, seen / rate / 3600 if rate else None)


def summary(s: Survey, records: Sequence[Record], unread: Mapping[str, int], e: Estimate) -> dict:
    """All of it as JSON holds it. records: those that were surveyed, to name some."""
    whole = max(1, len(s.tokens))
    return {
        "records": s.count, "usable": len(s.tokens), "bad": s.bad, "too_long": s.long, "unread_keys": dict(unread),
        "foreign_marks": dict(s.marks.most_common()),
        "same_records": [[records[i].name, records[j].name] for i, j in s.twins[:EXAMPLES]],
        "same_records_count": len(s.twins), "same_images": s.same_images[:EXAMPLES],
        "same_images_count": len(s.same_images), "image_files": s.files,
        "odd_images": {kind: s.kinds[kind] for kind in KINDS},
        "text_only_share": sum(n == 0 for n in s.images) / whole,
        "several_images_share": sum(n > 1 for n in s.images) / whole,
        "tokens": histogram(s.tokens), "turns": histogram(s.turns), "tokens_sum": sum(s.tokens),
        "targets_sum": sum(s.targets),
        "estimate": {"updates": e.updates, "tokens": e.tokens, "hours": e.hours},
    }  # fmt: skip


def histogram(values: Sequence[int], bins: int = 12) -> list[tuple[int, int, int]]:
    """(lowest, highest, count) of bars of equal width."""
    if not values:
        return []
    least, most = min(values), max(values)
    width = max(1, -(-(most - least + 1) // bins))
    counts = Counter((n - least) // width for n in values)
    return [(least + j * width, least + (j + 1) * width - 1, counts[j]) for j in range(max(counts) + 1)]


def text(found: Mapping) -> str:
    """The summary for a terminal, without the bad records."""
    f, e = found, found["estimate"]
    lines = [f"{f['usable']} of {f['records']} records are fine"]
    lines += [f"{f['too_long']} of the others have too many tokens, and are else fine"] if f["too_long"] else []
    if f["usable"]:
        lines += ["tokens of a record, image positions included:", *_bars(f["tokens"]), "turns of a record:"]
        lines += _bars(f["turns"])
        lines.append(f"{f['targets_sum']} of {f['tokens_sum']} tokens are targets")
        lines.append(f"{f['text_only_share']:.1%} are text alone, {f['several_images_share']:.1%} have several images")
        hours = "" if e["hours"] is None else f", {e['hours']:.1f} hours at the given rate"
        lines.append(f"training: {e['updates']} updates, {e['tokens']} tokens{hours}")
    odd = ", ".join(f"{n} {kind}" for kind, n in f["odd_images"].items() if n)
    lines.append(f"{f['image_files']} image files" + (f": {odd}" if odd else ""))
    for what, counts in (("keys that are set and change nothing", f["unread_keys"]),
                         ("marks of other tools, which are text here", f["foreign_marks"])):  # fmt: skip
        if counts:
            lines.append(f"{what}: " + ", ".join(f"{name} ({n} records)" for name, n in counts.items()))
    for what in ("records", "images"):
        if n := f[f"same_{what}_count"]:
            pairs = "; ".join(f"{a} = {b}" for a, b in f[f"same_{what}"])
            lines.append(f"{n} {what} are copies of others: {pairs}{'; ...' if n > EXAMPLES else ''}")
    return "\n".join(lines)


def _bars(rows: Sequence[tuple[int, int, int]]) -> list[str]:
    most = max(n for _, _, n in rows)
    return [f"{low:>6}-{high:<6} {n:>8} {'#' * round(50 * n / most)}" for low, high, n in rows]
