"""A data set on one page: its figures, histograms, and small pictures of its oddest images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llava_fn.data.check import ImageFacts
from llava_fn.data.options import Data
from llava_fn.data.survey import KINDS, Survey
from llava_fn.runs import page

SIDE = 200  # pixels of a picture's longer side
MOST = 200  # bad records that are listed


def survey_page(s: Survey, found: Mapping, name: str, data: Data) -> str:
    """The page. found: the summary of `s`; name: of the data set."""
    bars = []
    if s.tokens:
        whole = page.histogram("Length of records", "tokens", s.tokens)
        bars = [whole, page.histogram("Turns of records", "turns", s.turns)]
    odd = [(kind, s.kinds[kind], _pictures(s, kind)) for kind in KINDS if kind in s.odd]
    return page.render(
        "runs/survey.html", f=found, name=name, histograms=bars, odd=odd, most=MOST, limit=data.max_tokens,
        template=data.template, image_mode=data.image_mode,
    )  # fmt: skip


def _pictures(s: Survey, kind: str) -> list[tuple[ImageFacts, str]]:
    """The oddest images of a kind, the oddest first."""
    looks = [look for _, _, look in sorted(s.odd[kind], key=lambda row: row[:2], reverse=True)]
    return [(look, page.small(Path(look.path).read_bytes(), SIDE)) for look in looks]
