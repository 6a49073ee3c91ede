"""Scores of a model on AI2D, ChartQA, DocVQA and MMMU, from the TSVs of VLMEvalKit.

    python recipes/evaluate.py --weights llava-1.5-7b-hf --data AI2D_TEST.tsv MMMU_DEV_VAL.tsv --out results
    torchrun --nproc-per-node 8 recipes/evaluate.py --weights llava-1.5-7b-hf --data DocVQA_VAL.tsv --out results

Stop it at any instant; the same command goes on, with any number of processes, and ends with the same answers, scores
and spreadsheets. Only the times that the HTML report shows differ. A row that cannot be answered is named, counts as
wrong, and makes the exit status 1; the next run tries it again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_fn.evaluate.options import Evaluate
from llava_fn.launch import cli

if TYPE_CHECKING:
    from llava_fn.evaluate.task import Assignment
    from llava_fn.evaluate.tsv import Table
    from llava_fn.parallel.mesh import Axis


def answer(c: Evaluate, tables: Sequence[Table], axis: Axis) -> list[Assignment]:
    """Answer what has no answer yet; the processes of the axis share it. Returns an assignment for each file.

    Processes wait for each other before the first and after the last answer, and not in between.
    """
    from llava_fn.evaluate import folder, run
    from llava_fn.evaluate.task import backlog, begin, open_assignment, settings
    from llava_fn.generate import assistant
    from llava_fn.launch import processes

    weights = assistant.open_weights(c.model.weights)
    if axis.rank == 0:
        begin(c, tables, settings(c, weights, folder.fingerprint(c.model.weights)))
    processes.meet(axis)

    tasks = [open_assignment(c.folder(table.dataset.name), table) for table in tables]
    placement = assistant.Placement.of(c.model)
    model = assistant.place(weights, tasks[0].settings.style.form, placement, c.model.context)
    if warning := assistant.warning(model):
        print(warning, file=sys.stderr)
    backlogs = [backlog(task, model) for task in tasks]
    processes.meet(axis)  # nobody writes before everybody has read

    for task, rest in zip(tasks, backlogs, strict=True):
        batches = run.batches(rest.queries, task.settings, c.batch, axis.size)[axis.rank :: axis.size]
        if not batches:
            continue
        with folder.create(task.folder, axis.rank, axis.size) as file, rest.progress() as progress:
            start, ready = time.monotonic(), run.ahead(task.table, model, batches, c.workers)
            for predictions in run.answer(model, ready, task.settings.decoding):
                folder.write(file, predictions, task.keys)
                if axis.rank == 0:
                    rest.show(progress, start)
    if axis.rank == 0:
        for rest in backlogs:
            rest.wait()
    processes.meet(axis)
    return tasks


def main(c: Evaluate) -> None:
    """Answer, score, write. ValueError at the end if rows have no answer."""
    # imports stand where they are used: torch takes seconds, and --help does without
    from llava_fn.evaluate import folder
    from llava_fn.evaluate.finish import check_failed, finish
    from llava_fn.evaluate.task import dry_run, open_assignment, read_tables
    from llava_fn.launch.device import pick_device
    from llava_fn.launch.processes import replicas

    if c.dry_run:
        dry_run(c, read_tables(c))
        return
    with replicas(pick_device(c.model.device)) as axis:
        tables = read_tables(c)
        for table in tables if c.compare else ():
            folder.read_provenance(c.other_folder(table.dataset.name))  # a missing run is named before the work
        if c.score_only:
            tasks = [open_assignment(c.folder(table.dataset.name), table) for table in tables]
        else:
            tasks = answer(c, tables, axis)
        failed = [line for task in tasks for line in finish(c, task)] if axis.rank == 0 else []
    check_failed(failed)


def interruptible(c: Evaluate) -> None:
    """`main`, with a word to the person who stops it."""
    try:
        main(c)
    except KeyboardInterrupt:
        print(f"\nstopped; {c.out} keeps every answer, and the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli.run(interruptible, cli.command(Evaluate, __doc__))
