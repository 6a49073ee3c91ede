"""Values of an evaluation: a file, its questions, and the answers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

Kind = Literal["choice", "chartqa", "docvqa", "mmmu"]  # AI2D and unknown files with options are "choice"


@dataclass(frozen=True)
class Question:
    """One row of a TSV. cells: every column but image, as the file has it, "" where empty."""

    row: int  # from 0, in the file's order
    index: str  # cell of the column index
    cells: Mapping[str, str]
    images: str  # SHA-256 over the bytes of its images, in order: rows with equal value share their pictures

    @property
    def options(self) -> dict[str, str]:
        """Letter -> text, of the columns A to Z that are not empty, in order."""
        return {letter: self.cells[letter] for letter in ascii_uppercase if self.cells.get(letter)}


@dataclass(frozen=True)
class Prediction:
    """A model's answer. text: stripped. error: why there is no text, or ""."""

    index: str
    text: str
    tokens: int
    seconds: float  # its share of the batch's time
    error: str = ""


@dataclass(frozen=True)
class Dataset:
    """A file without its rows."""

    name: str  # "AI2D_TEST": the canonical spelling for the four known ones, else the file's stem
    kind: Kind
    path: Path
    columns: tuple[str, ...]  # in the file's order, image left out
