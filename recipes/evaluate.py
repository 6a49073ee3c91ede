"""Scores of a model on AI2D, ChartQA, DocVQA and MMMU, from the TSVs of VLMEvalKit.

    python recipes/evaluate.py --weights llava-1.5-7b-hf --data AI2D_TEST.tsv MMMU_DEV_VAL.tsv --out results
    torchrun --nproc-per-node 8 recipes/evaluate.py --weights llava-1.5-7b-hf --data DocVQA_VAL.tsv --out results

Stop it at any instant; the same command goes on, with any number of processes, and ends with the same files. A row that
cannot be answered is named, counts as wrong, and makes the exit status 1; the next run tries it again.
"""

from __future__ import annotations

import glob
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llava_fn.data.tokenizer import open_tokenizer
from llava_fn.evaluate import folder, prompts, results, run, score, tally, tsv
from llava_fn.evaluate.folder import Manifest, Settings
from llava_fn.evaluate.records import Kind
from llava_fn.evaluate.run import Asked
from llava_fn.evaluate.tally import Summary
from llava_fn.evaluate.tsv import Table
from llava_fn.generate import assistant, options
from llava_fn.generate.assistant import Assistant, Placement
from llava_fn.generate.options import Decoding, Form
from llava_fn.launch import cli, processes
from llava_fn.launch.device import environment, pick_device
from llava_fn.parallel.mesh import Axis
from llava_fn.runs.progress import Progress
from llava_fn.weights import model
from llava_fn.weights.source import Weights

POLL = 0.5  # seconds between two looks at what the other processes have done
RESULTS = (".xlsx", ".html", "_acc.csv", "_acc_partial.csv", "_summary.json", "_cut.json")
DRY_ROWS = 3  # whose prompts a dry run shows
SHOWN = 20  # rows without an answer that an error lists


def _names(kind: Kind) -> object:
    """How --help shows the rules that a kind has."""
    return tyro.conf.arg(metavar=f"{{{','.join(score.RULES[kind])}}}")


@dataclass(frozen=True)
class Rules:
    """By which rules each kind of question is scored; see llava_fn/evaluate/score.py."""

    choice: Annotated[str, _names("choice")] = score.RULES["choice"][0]
    chartqa: Annotated[str, _names("chartqa")] = score.RULES["chartqa"][0]
    docvqa: Annotated[str, _names("docvqa")] = score.RULES["docvqa"][0]
    mmmu: Annotated[str, _names("mmmu")] = score.RULES["mmmu"][0]

    def __post_init__(self) -> None:
        for kind in score.RULES:
            score.check_rules(kind, self.of(kind))

    def of(self, kind: Kind) -> str:
        """Those for a kind."""
        return getattr(self, kind)


@dataclass(frozen=True)
class Evaluate:
    """Which model answers which questions, and what becomes of it."""

    model: Annotated[options.ModelOptions, tyro.conf.arg(name="")]
    data: tuple[Path, ...]  # TSVs
    out: Path = Path("results")
    name: str = ""  # of the model, in the names of files; that of its folder, unless given
    template: prompts.Name = "vlmevalkit"  # of the prompt: VLMEvalKit's, LLaVA's, or that of the weights
    tokens: int = 512  # of an answer at most; 512 was VLMEvalKit's when it published LLaVA-1.5's scores
    batch: int = 8  # questions at a time
    workers: int = 2  # threads that read images ahead
    rules: Rules = Rules()
    limit: int | None = None  # only the first rows; the results are marked as partial
    indices: tuple[str, ...] = ()  # only these rows; the results are marked as partial
    score_only: bool = False  # score the answers that are there; the weights are not opened
    compare: str = ""  # with another run: its --name, or, if it is not in --out, its --out/--name
    allow_partial: bool = False  # write results, marked as partial, though rows have no answer yet
    fresh: bool = False  # move an earlier run of this name aside and begin anew
    dry_run: bool = False  # show prompts and numbers of tokens, and answer nothing

    def __post_init__(self) -> None:
        for name in ("batch", "workers", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1")
        if not self.data or not self.model.weights:
            raise ValueError("give --weights and --data, each with a file or folder at least")
        if self.fresh and self.score_only:
            raise ValueError("--fresh would move the answers aside that --score-only scores; leave one out")
        if Path(self.label).name != self.label:
            raise ValueError(f"name={self.label!r}: a part of file names cannot be a path; give another --name")

    @property
    def label(self) -> str:
        """The model's name in the names of files."""
        path = self.model.weights[0].resolve()
        return self.name or (path.stem if path.is_file() else path.name)

    def place(self, table: Table) -> Path:
        """The folder of the answers to a file."""
        return self.out / f"{self.label}_{table.dataset.name}"


def read(c: Evaluate) -> list[Table]:
    """The files, or the rows of them that are asked for. ValueError if two of them have one name."""
    tables = [tsv.open_table(path) for path in c.data]
    names = [t.dataset.name for t in tables]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"two files are called {', '.join(twice)}; evaluate them with different --out")
    for table in tables:
        for note in table.notes:
            print(f"note: {note}", file=sys.stderr)
    return [t.part(c.indices, c.limit) for t in tables]


def settings(c: Evaluate, source: Weights, weights: str) -> Settings:
    """What the answers of this command depend on. weights: fingerprint."""
    own = assistant.form_of(source) if c.template == "own" else Form("", "")
    style = prompts.style(c.template, own)
    precision = Placement.of(c.model).precision
    return Settings(weights, style, Decoding(c.tokens), c.model.context, precision, c.model.quantise)


def begin(c: Evaluate, tables: Sequence[Table], s: Settings) -> None:
    """Open the folders of the runs, on one process."""
    place = environment(pick_device(c.model.device))
    versions = {"python": place["python"]} | {k: v for k, v in place["packages"].items() if v}
    for table in tables:
        at = c.place(table)
        old = [*(c.out / (at.name + end) for end in RESULTS), *c.out.glob(f"{glob.escape(at.name)}_vs_*.html")]
        if c.fresh and (aside := folder.move_aside(at, old)):
            print(f"note: the earlier run is now {aside}", file=sys.stderr)
        d = table.dataset
        data = {"name": d.name, "sha256": table.sha256, "rows": len(table.pictures)}
        for note in folder.begin(at, Manifest(s, data, versions)):
            print(f"note: {note}", file=sys.stderr)


@dataclass(frozen=True)
class Work:
    """What is left of a file. lines: that all processes had written before."""

    table: Table
    keys: dict[str, str]
    left: list[Asked]
    lines: int


def left(c: Evaluate, table: Table, s: Settings, a: Assistant) -> Work:
    """The questions that have no answer yet; errors are tried again."""
    cut = run.parts(table, s)
    keys = run.keys(table, s, cut)
    lines, have = folder.count(c.place(table)), folder.read(c.place(table), keys)
    asked = run.ask(table, s, cut, a.tokenizer, a.model.vision.patches)
    open_ = [x for x in asked if x.question.index not in have or have[x.question.index].error]
    return Work(table, keys, open_, lines)


def answer(c: Evaluate, w: Work, s: Settings, a: Assistant, axis: Axis) -> None:
    """This process's share, written as it comes."""
    mine = run.batches(w.left, s, c.batch, axis.size)[axis.rank :: axis.size]
    if not mine:
        return
    at = c.place(w.table)
    with folder.create(at, axis.rank, axis.size) as file, _progress(w) as progress:
        began = time.monotonic()
        for said in run.answer(a, run.ahead(w.table, a, mine, c.workers), s.decoding):
            folder.write(file, said, w.keys)
            if axis.rank == 0:
                _show(w, at, progress, began)


def _progress(w: Work) -> Progress:
    return Progress(len(w.table.questions) - len(w.left), len(w.table.questions))


def _show(w: Work, at: Path, progress: Progress, began: float) -> int:
    """Say how far all processes are. Returns how many answers they have given."""
    new = folder.count(at) - w.lines
    rate = new / max(time.monotonic() - began, 1e-9)
    progress.show(progress.start + new, f"{w.table.dataset.name} {rate:.1f} answers/s")
    return new


def wait(c: Evaluate, w: Work) -> None:
    """Show how far the other processes are, until they have answered all."""
    began, new = time.monotonic(), folder.count(c.place(w.table)) - w.lines
    if new == len(w.left):
        return
    with _progress(w) as progress:
        while _show(w, c.place(w.table), progress, began) < len(w.left):
            time.sleep(POLL)


def predict(c: Evaluate, tables: Sequence[Table], axis: Axis) -> list[dict[str, str]]:
    """Answer what has no answer yet. Returns the keys of each file's answers, by index.

    Processes meet before the first and after the last answer, and not in between.
    """
    source = assistant.open_weights(c.model.weights)
    if axis.rank == 0:
        begin(c, tables, settings(c, source, folder.fingerprint(c.model.weights)))
    processes.meet(axis)
    s = folder.read_manifest(c.place(tables[0])).settings
    a = assistant.place(source, s.style.form, Placement.of(c.model), c.model.context)
    print(assistant.warning(a), end="\n" if assistant.warning(a) else "", file=sys.stderr)
    work = [left(c, table, s, a) for table in tables]
    processes.meet(axis)  # nobody writes before everybody has read
    for w in work:
        answer(c, w, s, a, axis)
    if axis.rank == 0:
        for w in work:
            wait(c, w)
    processes.meet(axis)
    return [w.keys for w in work]


def keys_of(at: Path, table: Table) -> dict[str, str]:
    """Those of the answers to a file, with the settings that its run had."""
    s = folder.read_manifest(at).settings
    return run.keys(table, s, run.parts(table, s))


def finish(c: Evaluate, table: Table, keys: Mapping[str, str]) -> list[str]:
    """Write the results of a file. Returns a line for each question that has no answer. ValueError if it may not."""
    manifest, found = folder.read_manifest(c.place(table)), folder.read(c.place(table), keys)
    missing = [q.index for q in table.questions if q.index not in found]
    if missing and not c.allow_partial:
        raise ValueError(
            f"{c.place(table)}: {len(missing)} of {len(table.questions)} rows of the TSV have no answer yet (index "
            f"{', '.join(missing[:10])}{', ...' if missing[10:] else ''}); the same command without --score-only "
            "answers them, or --allow-partial leaves them out"
        )
    partial = len(found) < len(table.pictures)
    rules, about = c.rules.of(table.dataset.kind), _about(manifest, table)
    summary = results.write(c.out, c.label, table, found, rules, about, partial)
    print(summary)
    if c.compare:
        print(results.compare(c.out, summary, other(c, table), table))
    said = [found[q.index] for q in table.questions if q.index in found]
    return [f"{table.dataset.name} index {p.index}: {p.error}" for p in said if p.error]


def other(c: Evaluate, table: Table) -> Summary:
    """The run to compare with, scored anew by the same rules."""
    at = _other(c, table)
    manifest, found = folder.read_manifest(at), folder.read(at, keys_of(at, table))
    rules = c.rules.of(table.dataset.kind)
    rows = tally.score_rows(table.dataset, table.questions, found, rules)
    partial = len(found) < len(table.pictures)
    return tally.summarise(Path(c.compare).name, table.dataset, rows, rules, _about(manifest, table), partial)


def _other(c: Evaluate, table: Table) -> Path:
    at = Path(f"{c.compare}_{table.dataset.name}")
    return c.out / at if at.name == str(at) else at


def _about(manifest: Manifest, table: Table) -> dict[str, str]:
    """What reports say of how the answers were made; nothing in it depends on how many processes there were."""
    s = manifest.settings
    return {
        "weights": s.weights, "template": s.style.name, "decoding": f"greedy, at most {s.decoding.tokens} tokens",
        "context": str(s.context), "dtype": s.dtype + (f", {s.quantise}" if s.quantise else ""),
        "data": table.sha256, "notes": "; ".join(table.notes),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }  # fmt: skip


def dry_run(c: Evaluate, tables: Sequence[Table]) -> None:
    """Print some prompts and how long all are; of the weights only the config and the tokenizer are used."""
    source = assistant.open_weights(c.model.weights)
    s, patches = settings(c, source, ""), model.config(source).vision.patches
    tokenizer = open_tokenizer(source.tokenizer)
    for table in tables:
        cut = run.parts(table, s)
        asked = run.ask(table, s, cut, tokenizer, patches)
        print(f"{table.dataset.name}: {len(asked)} rows of kind {table.dataset.kind}")
        for x in asked[:DRY_ROWS]:
            print(f"--- index {x.question.index}, {x.size} tokens, {x.images} images of {patches}")
            print(prompts.shown(cut[x.question.index]) + "|")
        sizes = [x.size for x in asked]
        over = [x.question.index for x in asked if x.size >= s.context]
        print(f"--- tokens from {min(sizes)} to {max(sizes)}, median {statistics.median(sizes):g}")
        print(f"--- over the context of {s.context}: {', '.join(over) or 'none'}")


def main(c: Evaluate) -> None:
    """Answer, score, write. ValueError at the end if rows have no answer."""
    if c.dry_run:
        dry_run(c, read(c))
        return
    with processes.replicas(pick_device(c.model.device)) as axis:
        tables = read(c)
        for table in tables if c.compare else ():
            folder.read_manifest(_other(c, table))  # a mistake is told before the work, not after it
        known = [keys_of(c.place(t), t) for t in tables] if c.score_only else predict(c, tables, axis)
        both = zip(tables, known, strict=True) if axis.rank == 0 else ()
        failed = [line for table, its in both for line in finish(c, table, its)]
    if failed:
        more = f"\n  and {len(failed) - SHOWN} more; the spreadsheets name them all" if len(failed) > SHOWN else ""
        shown = "".join(f"\n  {line}" for line in failed[:SHOWN])
        raise ValueError(f"{len(failed)} rows have no answer and count as wrong:{shown}{more}")


def guarded(c: Evaluate) -> None:
    """`main`, and what a person should know who stops it."""
    try:
        main(c)
    except KeyboardInterrupt:
        print(f"\nstopped; {c.out} keeps every answer, and the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli.run(guarded, tyro.cli(Evaluate, description=__doc__))
