"""The work on each file: its questions, the folder of their answers, and the questions that have no answer yet."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_fn.data.tokenizer import open_tokenizer
from llava_fn.evaluate import folder, prompts, results, run, tsv
from llava_fn.evaluate.folder import Provenance, Settings
from llava_fn.evaluate.options import Evaluate
from llava_fn.evaluate.prompts import Parts
from llava_fn.evaluate.run import Query
from llava_fn.evaluate.tsv import Table
from llava_fn.generate import assistant
from llava_fn.generate.assistant import Assistant, Placement
from llava_fn.generate.options import Decoding, Form
from llava_fn.launch.device import environment, pick_device
from llava_fn.runs.progress import Progress
from llava_fn.weights import model
from llava_fn.weights.source import Weights

DRY_ROWS = 3  # whose prompts a dry run shows
POLL = 0.5  # seconds between two looks at what the other processes have written


def read_tables(c: Evaluate) -> list[Table]:
    """The files, or the rows of them that are asked for. ValueError if two of them have one name."""
    tables = [tsv.open_table(path) for path in c.data]
    names = [t.dataset.name for t in tables]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"two files are called {', '.join(twice)}; evaluate them with different --out")
    for table in tables:
        _print_notes(table.notes)
    return [t.part(c.indices, c.limit) for t in tables]


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def settings(c: Evaluate, weights: Weights, fingerprint: str) -> Settings:
    """The settings that the answers of this command depend on. fingerprint: of the weights."""
    own = assistant.form_of(weights) if c.template == "own" else Form("", "")
    style = prompts.style(c.template, own)
    dtype = Placement.of(c.model).precision
    return Settings(fingerprint, style, Decoding(c.tokens), c.model.context, dtype, c.model.quantise)


def begin(c: Evaluate, tables: Sequence[Table], s: Settings) -> None:
    """Make the folders of the runs, or check the settings of those that are there. On rank 0 only."""
    place = environment(pick_device(c.model.device))
    versions = {"python": place["python"]} | {k: v for k, v in place["packages"].items() if v}
    for table in tables:
        dataset = table.dataset.name
        at = c.folder(dataset)
        if c.fresh and (aside := folder.move_aside(at, results.files(c.out, at.name))):
            _print_notes([f"the earlier run is now {aside}"])
        data = {"name": dataset, "sha256": table.sha256, "rows": len(table.pictures)}
        _print_notes(folder.begin(at, Provenance(s, data, versions)))


def dry_run(c: Evaluate, tables: Sequence[Table]) -> None:
    """Print some prompts, and how long all are. Of the weights only the config and the tokenizer are read."""
    weights = assistant.open_weights(c.model.weights)
    s, patches = settings(c, weights, ""), model.config(weights).vision.patches
    assert weights.tokenizer is not None  # open_weights has checked it
    tokenizer = open_tokenizer(weights.tokenizer)
    for table in tables:
        cut = run.parts(table, s)
        queries = run.queries(table, s, cut, tokenizer, patches)
        print(f"{table.dataset.name}: {len(queries)} rows of kind {table.dataset.kind}")
        for x in queries[:DRY_ROWS]:
            print(f"--- index {x.question.index}, {x.size} tokens, {x.images} images of {patches}")
            print(prompts.shown(cut[x.question.index]) + "|")
        sizes = [x.size for x in queries]
        over = [x.question.index for x in queries if x.size >= s.context]
        print(f"--- tokens from {min(sizes)} to {max(sizes)}, median {statistics.median(sizes):g}")
        print(f"--- over the context of {s.context}: {', '.join(over) or 'none'}")


@dataclass(frozen=True)
class Assignment:
    """A file, and the folder of its answers. prompts: index -> prompt; keys: index -> key of the answer."""

    table: Table
    folder: Path
    provenance: Provenance
    prompts: Mapping[str, Parts]
    keys: Mapping[str, str]

    @property
    def settings(self) -> Settings:
        """What the answers depend on."""
        return self.provenance.settings


def open_assignment(at: Path, table: Table) -> Assignment:
    """The assignment of a run that was begun in the folder `at`, with its settings. ValueError if none was."""
    provenance = folder.read_provenance(at)
    cut = run.parts(table, provenance.settings)
    return Assignment(table, at, provenance, cut, run.keys(table, provenance.settings, cut))


@dataclass(frozen=True)
class Backlog:
    """The questions of an assignment that have no answer yet. lines: number of lines that all processes had written."""

    task: Assignment
    queries: Sequence[Query]
    lines: int

    def progress(self) -> Progress:
        """A line on the screen for the answers of all processes."""
        count = len(self.task.table.questions)
        return Progress(count - len(self.queries), count)

    def show(self, progress: Progress, start: float) -> int:
        """Show and return how many answers all processes have written since. start: time.monotonic() at the start."""
        new = folder.count(self.task.folder) - self.lines
        rate = new / max(time.monotonic() - start, 1e-9)
        progress.show(progress.start + new, f"{self.task.table.dataset.name} {rate:.1f} answers/s")
        return new

    def wait(self) -> None:
        """Show how far the other processes are, until all questions are answered."""
        start = time.monotonic()
        if folder.count(self.task.folder) - self.lines == len(self.queries):
            return
        with self.progress() as progress:
            while self.show(progress, start) < len(self.queries):
                time.sleep(POLL)


def backlog(task: Assignment, a: Assistant) -> Backlog:
    """The questions of an assignment that have no answer yet. A question whose answer is an error is tried again."""
    lines, answers = folder.count(task.folder), folder.read(task.folder, task.keys)
    queries = run.queries(task.table, task.settings, task.prompts, a.tokenizer, a.config.vision.patches)
    answered = {index for index, prediction in answers.items() if not prediction.error}
    return Backlog(task, [x for x in queries if x.question.index not in answered], lines)
