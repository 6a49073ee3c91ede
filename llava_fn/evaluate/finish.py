"""From answers to results: scores, their files, and the comparison with another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_fn.evaluate import folder, results, tally
from llava_fn.evaluate.options import Evaluate
from llava_fn.evaluate.records import Prediction
from llava_fn.evaluate.tally import Summary
from llava_fn.evaluate.task import Assignment, open_assignment

SHOWN = 20  # rows without an answer that an error lists


def finish(c: Evaluate, task: Assignment) -> list[str]:
    """Write the results of a file. Returns a line for each question that failed.

    ValueError if questions have no answer yet, unless partial results are allowed.
    """
    dataset, questions = task.table.dataset, task.table.questions
    answers = folder.read(task.folder, task.keys)
    missing = [q.index for q in questions if q.index not in answers]
    if missing and not c.allow_partial:
        raise ValueError(
            f"{task.folder}: {len(missing)} of {len(questions)} rows of the TSV have no answer yet (index "
            f"{', '.join(missing[:10])}{', ...' if missing[10:] else ''}); the same command without --score-only "
            "answers them, or --allow-partial leaves them out"
        )
    rules = c.rules.of(dataset.kind)
    summary = summarise(task, answers, c.label, rules)
    results.write(c.out, summary, task.table)
    print(summary)
    if c.compare:
        other = open_assignment(c.other_folder(dataset.name), task.table)
        other_answers = folder.read(other.folder, other.keys)
        other_summary = summarise(other, other_answers, Path(c.compare).name, rules)
        print(results.compare(c.out, summary, other_summary, task.table))
    failed = [p for q in questions if (p := answers.get(q.index)) and p.error]
    return [f"{dataset.name} index {p.index}: {p.error}" for p in failed]


def summarise(task: Assignment, answers: Mapping[str, Prediction], model: str, rules: str) -> Summary:
    """The scores of a run by some rules. model: its name in reports."""
    table = task.table
    rows = tally.score_rows(table.dataset, table.questions, answers, rules)
    return tally.summarise(model, table.dataset, rows, rules, _about(task), len(answers) < len(table.pictures))


def _about(task: Assignment) -> dict[str, str]:
    """What reports say of how the answers were made; nothing in it depends on how many processes there were."""
    s = task.settings
    return {
        "weights": s.weights, "template": s.style.name, "decoding": f"greedy, at most {s.decoding.tokens} tokens",
        "context": str(s.context), "dtype": s.dtype + (f", {s.quantise}" if s.quantise else ""),
        "data": task.table.sha256, "notes": "; ".join(task.table.notes),
        "versions": ", ".join(f"{name} {version}" for name, version in task.provenance.versions.items()),
    }  # fmt: skip


def check_failed(failed: Sequence[str]) -> None:
    """ValueError that names the questions that failed, if there are any. failed: a line for each."""
    if failed:
        more = f"\n  and {len(failed) - SHOWN} more; the spreadsheets name them all" if len(failed) > SHOWN else ""
        shown = "".join(f"\n  {line}" for line in failed[:SHOWN])
        raise ValueError(f"{len(failed)} rows have no answer and count as wrong:{shown}{more}")
