"""The pages of the server's cache: what holds them, and what a prompt finds in them. All of it on the host.

An answer gets all pages that its prompt and its tokens can fill when it is admitted: it never waits for one later, and
none is taken from it. It shares the whole pages of the longest prefix that another row has in common with it, and gets
a copy of the one in which they part; on a CPU, whose attention wants the pages of a row one behind the other, a copy of
all of them. The rows of finished answers keep their pages as long as no answer needs them; the row that was used
longest ago loses them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_fn.generate.conversation import Key, common_prefix

KEPT = 128  # rows of finished answers, each of which is compared with every new prompt


@dataclass(frozen=True)
class Stored:
    """Positions in the cache: their keys, and the pages that they are in or will be."""

    keys: tuple[Key, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """What an answer gets. common: positions that its pages hold when the pages `copied` are: from each to each."""

    pages: tuple[int, ...]
    common: int
    copied: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Pages:
    """Pages 1 .. count of `size` tokens; page 0 is for rows without an answer.

    shares: whether rows share pages. kept: rows of finished answers, in the order of their last use.
    """

    size: int
    count: int
    shares: bool
    kept: tuple[Stored, ...] = ()

    def needed(self, tokens: int) -> int:
        """The number of pages for so many tokens."""
        return -(-tokens // self.size)

    def fits(self, running: Sequence[Stored], tokens: int, common: int, source: Stored) -> bool:
        """Whether so many positions have room beside what is running. common, source: what is `best` for them."""
        shared = self._shared(common, source)
        held = {*shared, *(page for row in running for page in row.pages)}
        return self.needed(tokens) - len(shared) <= self.count - len(held)

    def _shared(self, common: int, source: Stored) -> tuple[int, ...]:
        return source.pages[: common // self.size if self.shares else 0]

    def best(self, running: Sequence[Stored], keys: Sequence[Key]) -> tuple[int, Stored]:
        """The length of the longest prefix that any row has in common with these keys, and that row."""
        rows = [(common_prefix(keys, row.keys), row) for row in (*running, *self.kept)]
        return max(rows, key=lambda item: item[0], default=(0, Stored((), ())))

    def claim(self, running: Sequence[Stored], keys: Sequence[Key], tokens: int) -> tuple[Pages, Claim]:
        """Pages for so many positions, which `fits`. Rows of finished answers go as far as their pages are needed.

        keys: of the positions that need not be computed where a row has them.
        """
        common, source = self.best(running, keys)
        shared = self._shared(common, source)
        kept = sorted(self.kept, key=lambda row: row is source)  # which is used now
        own = self.needed(tokens) - len(shared)
        held = {*shared, *(page for row in running for page in row.pages)}
        while len(free := self._free(held, kept)) < own:
            del kept[0]
        run = next(
            (free[i : i + own] for i in range(len(free) - own + 1) if free[i + own - 1] - free[i] < own), free[:own]
        )
        pages, copied = (*shared, *run), slice(len(shared), self.needed(common))
        return replace(self, kept=tuple(kept)), Claim(pages, common, (source.pages[copied], pages[copied]))

    def _free(self, held: set[int], kept: Sequence[Stored]) -> list[int]:
        held = held.union(*(row.pages for row in kept))
        return [page for page in range(1, self.count + 1) if page not in held]

    def keep(self, row: Stored) -> Pages:
        """With the row of an answer that has ended, instead of rows that hold nothing else."""
        row = replace(row, pages=row.pages[: self.needed(len(row.keys))])
        others = [other for other in self.kept if other.keys != row.keys[: len(other.keys)]]
        return replace(self, kept=(*others, row)[-KEPT:]) if row.keys else self

    def figures(self, running: Sequence[Stored]) -> dict[str, int]:
        """The numbers of pages in all, and of those that running and that finished answers hold."""
        busy = {page for row in running for page in row.pages}
        kept = {page for row in self.kept for page in row.pages} - busy
        return {"pages": self.count, "busy_pages": len(busy), "kept_pages": len(kept)}
