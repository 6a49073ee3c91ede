"""The files of a run for a reader: metrics.jsonl, loss.png and samples.html."""

from __future__ import annotations

import base64
import html
import io
import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from llava_fn.batch import Sample
from llava_fn.runs.captions import Captions


def memory(device: torch.device) -> float:
    """Peak memory in GiB: of the accelerator if there is one, else of this process."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.get_device_module(device).max_memory_allocated(device) / 2**30


def read_metrics(path: Path, until: int) -> list[dict]:
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
    """Drop the rows after `step`: a resumed run computes them again."""
    write(path, "".join(json.dumps(row) + "\n" for row in read_metrics(path, step)))


def append(path: Path, row: Mapping) -> None:
    """Add one row to a JSON-lines file."""
    with path.open("a") as f:
        f.write(json.dumps(row) + "\n")


def plot_loss(folder: Path, until: int) -> None:
    """Draw a run's loss.png up to update `until`: the loss, its running mean, and the learning rate below."""
    rows = read_metrics(folder / "metrics.jsonl", until)
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    smooth = []
    for loss in losses:
        smooth.append(0.95 * smooth[-1] + 0.05 * loss if smooth else loss)
    figure = Figure(figsize=(8, 5), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    top.plot(steps, losses, color="0.8", label="loss")
    top.plot(steps, smooth, color="C0", label="running mean")
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


def samples_page(captions: Captions, samples: Sequence[Sample], path: Path) -> None:
    """A page of held-out images, each with the truth and the model's answer."""
    rows = "".join(
        f'<tr><td><img alt="" src="data:image/png;base64,{_picture(sample.pixels[0])}"><td>{html.escape(truth)}'
        f'<td class="{"right" if truth == answer else "wrong"}">{html.escape(answer)}\n'
        for sample, truth, answer in zip(samples, captions.truth, captions.answers, strict=True)
    )
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>Held-out captions</title><style>{STYLE}</style>\n'
        f"<h1>Held-out captions</h1><p>{headline(captions)}\n"
        f"<table><tr><th>image<th>truth<th>model\n{rows}</table>\n",
        encoding="utf-8",
    )


def show(captions: Captions, samples: Sequence[Sample], folder: Path) -> None:
    """Write all captions to folder/samples.html; print some of them, and the result."""
    samples_page(captions, samples, folder / "samples.html")
    for truth, answer in list(zip(captions.truth, captions.answers, strict=True))[:: max(1, len(samples) // 12)]:
        print(f"  {'right' if truth == answer else 'WRONG'}  {truth}" + ("" if truth == answer else f"  |  {answer}"))
    print(headline(captions))
    print(f"all of them: {folder / 'samples.html'}; loss: {folder / 'loss.png'}")


def headline(captions: Captions) -> str:
    """The result in one sentence."""
    return (
        f"{captions.exact:.1%} of {len(captions.truth)} held-out captions are right to the letter; "
        f"{captions.nll:.3f} nats per token with the right image, {captions.shuffled:.3f} with another one."
    )
