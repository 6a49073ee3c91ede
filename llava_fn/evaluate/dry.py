"""A dry run: some prompts, and how long all of them are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from llava_fn.data.tokenizer import open_tokenizer
from llava_fn.evaluate import prompts, run, task
from llava_fn.evaluate.options import Evaluate
from llava_fn.evaluate.tsv import Table
from llava_fn.generate import assistant
from llava_fn.weights import model

ROWS = 3  # whose prompts are shown


def show(c: Evaluate, tables: Sequence[Table]) -> None:
    """Print some prompts and how long all are; of the weights only the config and the tokenizer are used."""
    weights = assistant.open_weights(c.model.weights)
    s, patches = task.settings(c, weights, ""), model.config(weights).vision.patches
    assert weights.tokenizer is not None  # open_weights has checked it
    tokenizer = open_tokenizer(weights.tokenizer)
    for table in tables:
        cut = run.parts(table, s)
        queries = run.queries(table, s, cut, tokenizer, patches)
        print(f"{table.dataset.name}: {len(queries)} rows of kind {table.dataset.kind}")
        for x in queries[:ROWS]:
            print(f"--- index {x.question.index}, {x.size} tokens, {x.images} images of {patches}")
            print(prompts.shown(cut[x.question.index]) + "|")
        sizes = [x.size for x in queries]
        over = [x.question.index for x in queries if x.size >= s.context]
        print(f"--- tokens from {min(sizes)} to {max(sizes)}, median {statistics.median(sizes):g}")
        print(f"--- over the context of {s.context}: {', '.join(over) or 'none'}")
