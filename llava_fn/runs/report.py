"""The files of a run for a reader: metrics.jsonl, loss.png and samples.html."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import resource
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from tensordict import TensorDict

from llava_fn import optim, spec, tree
from llava_fn.config import Optim
from llava_fn.parallel.zero import Zero
from llava_fn.runs.answers import Answers


def memory(device: torch.device) -> float:
    """Peak memory in GiB: of the accelerator if there is one, else of this process."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.get_device_module(device).max_memory_allocated(device) / 2**30


def read_metrics(path: Path, until: float = math.inf) -> list[dict]:
    """The rows of a JSON-lines file up to step `until`. A last line that a kill cut short is dropped."""
    rows = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n") and (row := json.loads(line))["step"] <= until:
            rows.append(row)
    return rows


def write(path: Path, text: str) -> None:
    """Replace a file atomically: a process killed on the way leaves the old one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.rename(path)


def rewind(path: Path, step: int) -> None:
    """Drop the rows after `step`, and those of step 0: a resumed run writes them again."""
    write(path, "".join(json.dumps(row) + "\n" for row in read_metrics(path, step) if row["step"]))


def append(path: Path, row: Mapping) -> None:
    """Add one row to a JSON-lines file."""
    with path.open("a") as f:
        f.write(json.dumps(row) + "\n")


def plot_loss(folder: Path, until: int) -> None:
    """Draw a run's loss.png up to update `until`: the loss, its running mean, that of held-out records, the rate."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl", until) if "loss" in row]
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    smooth = []
    for loss in losses:
        smooth.append(0.95 * smooth[-1] + 0.05 * loss if smooth else loss)
    figure = Figure(figsize=(8, 5), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    top.plot(steps, losses, color="0.8", label="loss")
    top.plot(steps, smooth, color="C0", label="running mean")
    held = [(r["step"], r["heldout_loss"]) for r in rows if "heldout_loss" in r]
    if held:
        top.plot(*zip(*held, strict=True), color="C2", marker="o", markersize=3, label="held-out records")
    top.set(ylabel="nats per labelled token", yscale="log")
    top.legend()
    bottom.plot(steps, [r["lr"] for r in rows], color="C1")
    bottom.set(xlabel="update", ylabel="learning rate")
    figure.savefig(folder / "loss.png", dpi=120)


STYLE = """body{font:15px system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse}
td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ddd}img{width:64px;image-rendering:pixelated}
.right{color:#17692b}.wrong{color:#a11}"""


def _picture(pixels: torch.Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def samples_page(found: Answers, what: str, path: Path) -> None:
    """A page of held-out images and questions, each with the truth and the model's answer. what: is answered."""
    rows = "".join(
        f"<tr><td>{_image(row.picture)}<td>{html.escape(row.question)}<td>{html.escape(row.truth)}"
        f'<td class="{"right" if row.truth == row.answer else "wrong"}">{html.escape(row.answer)}\n'
        for row in found.rows
    )
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>Held-out {what}</title><style>{STYLE}</style>\n'
        f"<h1>Held-out {what}</h1><p>{headline(found, what)}\n"
        f"<table><tr><th>image<th>question<th>truth<th>model\n{rows}</table>\n",
        encoding="utf-8",
    )


def _image(pixels: torch.Tensor | None) -> str:
    return "" if pixels is None else f'<img alt="" src="data:image/png;base64,{_picture(pixels)}">'


def show(found: Answers, what: str, folder: Path) -> None:
    """Write all answers to folder/samples.html; print some of them, and the result. what: "captions" or "answers"."""
    samples_page(found, what, folder / "samples.html")
    for row in found.rows[:: max(1, len(found.rows) // 12)]:
        right = row.truth == row.answer
        print(f"  {'right' if right else 'WRONG'}  {row.truth}" + ("" if right else f"  |  {row.answer}"))
    print(headline(found, what))
    print(f"all of them: {folder / 'samples.html'}; loss: {folder / 'loss.png'}")


def headline(found: Answers, what: str) -> str:
    """The result in one sentence."""
    wrong = "" if found.shuffled is None else f" with the right image, {found.shuffled:.3f} with another one"
    return (
        f"{found.exact:.1%} of {len(found.rows)} held-out {what} are right to the letter; "
        f"{found.nll:.3f} nats per token{wrong}."
    )


def groups(c: Optim, params: TensorDict, zero: Zero) -> str:
    """What is trained, by part, peak rate and weight decay, with counts of numbers; a line each.

    ValueError names a pattern of the rates or decays that matches nothing that is trained.
    """
    optim.check(c, tree.paths(params))
    rows: dict[tuple[str, float, float], int] = {}
    for path, p in zip(tree.paths(params), zero.params(params), strict=True):
        key = (path[0], c.rate(path), c.decay(path, len(p.shape)))
        rows[key] = rows.get(key, 0) + spec.count({"": p})
    lines = [f"  {part:<9} {n:>13,}  lr {lr:g}  weight decay {decay:g}" for (part, lr, decay), n in rows.items()]
    return "trained:\n" + "\n".join(lines)
