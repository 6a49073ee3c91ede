"""The files of a result. Each file appears whole, or the earlier one stays:

    out/MODEL_DATASET.xlsx           a row a question: the TSV's columns but image, answer and score; accuracies
    out/MODEL_DATASET_acc.csv        the peers' table of accuracies: their columns and units, always commas, all quoted
    out/MODEL_DATASET_summary.json   percent with 95 % intervals, and counts of answers without a usable score
    out/MODEL_DATASET.html           the report, see `page`; MODEL_DATASET_vs_OTHER.html for two runs

For the same answers all of them are the same to the byte, but the report: it shows how long answers took. A result of
some rows only has _acc_partial.csv in place of _acc.csv, and says "partial" in the others, so that no script takes it
for the score.

In the spreadsheet every cell is text: "=1+1" is no formula, "007" no number and "http://..." no link. It cannot hold
everything. Control characters are written as Excel escapes them, _x000B_, and halves of surrogate pairs as \\ud800. A
cell of over 32,767 characters is cut and says so, and the whole text stands in MODEL_DATASET_cut.json.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import xlsxwriter
from xlsxwriter.exceptions import FileCreateError
from xlsxwriter.worksheet import Worksheet

from llava_fn.evaluate import compare as comparing
from llava_fn.evaluate import page, tally
from llava_fn.evaluate.compare import Comparison
from llava_fn.evaluate.tally import Scored, Summary
from llava_fn.evaluate.tsv import Table

COLUMNS = ("prediction", "extracted", "score", "hit", "why", "status")
LONGEST = 32_767  # UTF-16 units that a cell holds
ENDINGS = (".xlsx", ".html", "_acc.csv", "_acc_partial.csv", "_summary.json", "_cut.json")
CREATED = datetime(2000, 1, 1)  # the same in every file, or no two were alike
TEXT_ONLY = {"strings_to_formulas": False, "strings_to_urls": False, "strings_to_numbers": False}
_HALVES = re.compile("[\ud800-\udfff]")
_FORMULA = re.compile(r"[=+\-@\t\r]")  # how a cell begins that a spreadsheet may take for a formula


def write(out: Path, s: Summary, table: Table) -> None:
    """Write all files of a result. table: with the questions of the summary.

    ValueError if rows have no prediction and the result is not partial; OSError if a file cannot be written.
    """
    missing = [row.question.index for row in s.rows if row.prediction is None]
    if missing and not s.partial:
        raise ValueError(
            f"{s.dataset.path}: {len(missing)} rows have no answer yet, the first of index {missing[0]}; finish "
            "the run, or ask for a partial result"
        )
    stem = f"{s.model}_{s.dataset.name}"
    _write_tables(out, stem, s)
    _write_text(out / f"{stem}.html", page.report(s, table))


def files(out: Path, stem: str) -> list[Path]:
    """Where the files of a result stand or may stand, pages of comparisons included. stem: MODEL_DATASET."""
    return [*(out / (stem + ending) for ending in ENDINGS), *out.glob(f"{glob.escape(stem)}_vs_*.html")]


def compare(out: Path, one: Summary, other: Summary, table: Table) -> Comparison:
    """Write the page of two runs, out/MODEL_DATASET_vs_OTHER.html, and return what it says. table: of both.

    ValueError if they are not to be compared, see `compare.compare`; OSError if the file cannot be written.
    """
    c = comparing.compare(one, other)
    _write_text(out / f"{one.model}_{one.dataset.name}_vs_{other.model}.html", page.comparison(c, table))
    return c


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def _write_tables(out: Path, stem: str, s: Summary) -> None:
    stale, fresh = ("_acc.csv", "_acc_partial.csv") if s.partial else ("_acc_partial.csv", "_acc.csv")
    whole: dict[str, dict[str, str]] = {}
    with replacing(out / f"{stem}.xlsx") as part:
        _write_xlsx(part, s, f"{stem}_cut.json", whole)
    texts = {
        f"{stem}{fresh}": accuracy_csv(tally.accuracy(s)),
        f"{stem}_summary.json": json.dumps(tally.plain(s), indent=1, ensure_ascii=False) + "\n",
        f"{stem}_cut.json": json.dumps(whole, indent=1) + "\n" if whole else "",
    }
    for name, text in texts.items():
        if text:
            _write_text(out / name, text)
    for name in [f"{stem}{stale}", *(name for name, text in texts.items() if not text)]:
        (out / name).unlink(missing_ok=True)  # of an earlier result, which these files replace


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; at the end it becomes `path`, at once, or leaves the old one.

    OSError names the file if it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, FileCreateError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        if part.exists():
            part.unlink()


def accuracy_csv(rows: Sequence[Mapping[str, str]]) -> str:
    """Comma, every cell in quotes, lines end in \\n. A name that begins like a formula gets an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([map(_no_formula, line) for line in ([*rows[0]], *(row.values() for row in rows))])
    return out.getvalue()


def _no_formula(cell: str) -> str:
    return "'" + cell if _FORMULA.match(cell) else cell


def header(s: Summary) -> list[str]:
    """Columns of the sheet of predictions. A column of the TSV that has the name of one of ours is marked."""
    ours = [*COLUMNS, "score_lenient"] if s.overall.lenient is not None else [*COLUMNS]
    return [f"{name} (TSV)" if name in ours else name for name in s.dataset.columns] + ours


def cells(s: Summary, row: Scored) -> list[str]:
    """A row of the sheet of predictions. Numbers are texts too; a row without a prediction has none."""
    x, p = row.score, row.prediction
    figures = [p.text, x.extracted, f"{x.score:.6g}", str(int(x.hit))] if p else [""] * 4
    lenient = [str(int(bool(row.lenient))) if p else ""] if s.overall.lenient is not None else []
    return [*(row.question.cells[name] for name in s.dataset.columns), *figures, x.why, row.status, *lenient]


def _write_xlsx(path: Path, s: Summary, aside: str, whole: dict[str, dict[str, str]]) -> None:
    """whole: gets the texts that were cut, by index and column."""
    names = header(s)
    with xlsxwriter.Workbook(str(path), TEXT_ONLY) as book:
        book.set_properties({"created": CREATED})
        sheet, bold = book.add_worksheet("predictions"), book.add_format({"bold": True})
        for column, name in enumerate(names):
            sheet.write_string(0, column, fitting(name, "")[0], bold)
        for j, row in enumerate(s.rows, 1):
            for column, text in enumerate(cells(s, row)):
                shown, cut = fitting(text, aside)
                sheet.write_string(j, column, shown)
                if cut:
                    whole.setdefault(row.question.index, {})[names[column]] = text
        sheet.freeze_panes(1, 0)
        sheet.autofilter(0, 0, len(s.rows), len(names) - 1)
        sheet.ignore_errors({"number_stored_as_text": "A1:XFD1048576"})
        _write_accuracy(book.add_worksheet("accuracy (partial)" if s.partial else "accuracy"), tally.accuracy(s), bold)


def _write_accuracy(sheet: Worksheet, rows: Sequence[Mapping[str, str]], bold) -> None:
    for column, name in enumerate(rows[0]):
        sheet.write_string(0, column, fitting(name, "")[0], bold)
        for j, row in enumerate(rows, 1):
            sheet.write_string(j, column, row[name])
    sheet.ignore_errors({"number_stored_as_text": "A1:XFD1048576"})


def fitting(text: str, aside: str) -> tuple[str, bool]:
    """A text as a cell can hold it, and whether it was cut. aside: the file that the mark of a cut names."""
    text = _HALVES.sub(lambda half: f"\\u{ord(half[0]):04x}", text)
    units = text.encode("utf-16-le")
    if len(units) <= 2 * LONGEST:
        return text, False
    mark = f" [cut here: {len(text)} characters in all; {aside} has them]"
    kept = units[: 2 * (LONGEST - len(mark))].decode("utf-16-le", errors="ignore")  # not half a pair at the end
    return kept + mark, True
