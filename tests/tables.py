"""Tables and answers without files, for tests of what is made of them."""

from dataclasses import dataclass
from pathlib import Path

import tsvs

from llava_fn.evaluate import results, tally
from llava_fn.evaluate.records import Dataset, Prediction, Question


@dataclass(frozen=True)
class Table:
    """What the results want of a table, without a file."""

    dataset: Dataset
    questions: list
    notes: tuple = ()

    def images(self, question):
        return [tsvs.png(int(question.row))]


def table(kind, rows, name="FILE"):
    """rows: cells of each; a cell "images" stands for the pictures."""
    columns = tuple(dict.fromkeys(("index", "question", *(c for row in rows for c in row if c != "images"))))
    questions = []
    for j, row in enumerate(rows):
        cells = {c: row.get(c, "") for c in columns} | {"index": str(j), "question": row.get("question", f"q{j}")}
        questions.append(Question(j, str(j), cells, str(row.get("images", j))))
    return Table(Dataset(name, kind, Path("file.tsv"), columns), questions)


def said(*texts):
    """Predictions of consecutive rows; None leaves a row out, and an exception fails it."""
    return {
        str(j): Prediction(str(j), "", 0, 1.0, str(x)) if isinstance(x, Exception) else Prediction(str(j), x, 3, 0.5)
        for j, x in enumerate(texts) if x is not None
    }  # fmt: skip


def summary(model, t, predictions, rules, about, partial):
    """The scores of predictions."""
    rows = tally.score_rows(t.dataset, t.questions, predictions, rules)
    return tally.summarise(model, t.dataset, rows, rules, about, partial)


def write(out, model, t, *answers):
    """Write the files of predictions, rules, about and partial. Returns their summary."""
    s = summary(model, t, *answers)
    results.write(out, s, t)
    return s
