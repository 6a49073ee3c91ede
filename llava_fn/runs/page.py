"""What pages of results share: how a template becomes one file without any other, small pictures, histograms.

head.html begins every page; page.css and page.html have the style and the parts in common.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib import resources

import jinja2
import numpy as np
from PIL import Image, UnidentifiedImageError

SIDE = 800  # pixels of a picture's longer side at most: the print of a page can be read
BINS = 24


def render(template: str, /, **values: object) -> str:
    """A template of this package, by its path in it, with these values. Texts in them are escaped."""
    load = jinja2.FunctionLoader(lambda name: resources.files("llava_fn").joinpath(name).read_text(encoding="utf-8"))
    undefined = jinja2.StrictUndefined
    env = jinja2.Environment(loader=load, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True)
    return env.get_template(template).render(**values)


def small(content: bytes, side: int = SIDE) -> str:
    """A JPEG on white of at most `side` pixels, as a data URL; empty if the content cannot be opened."""
    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a JPEG need not be decoded in full
            image.thumbnail((side, side))
            paper = Image.new("RGBA", image.size, "white")
            paper.alpha_composite(image.convert("RGBA"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError):
        return ""  # the page says so in its place
    paper.convert("RGB").save(out, "JPEG", quality=60, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def histogram(title: str, unit: str, values: Sequence[float]) -> dict:
    """Bars of equal width up to the 99th percentile; the last holds all that is longer, too."""
    x = np.array(values, dtype=float)
    whole = unit in ("tokens", "turns")
    top = float(np.quantile(x, 0.99))
    width = max(1.0, np.ceil((top + 1) / BINS)) if whole else max(top / BINS, 1e-9)
    bins = int(min(BINS, top // width + 1))
    counts = np.bincount(np.minimum(x // width, bins - 1).astype(int), minlength=bins)
    ends = [(j * width, (j + 1) * width - (1 if whole else 0)) for j in range(bins)]
    names = [f"{a:.3g} to {b:.3g}" if a != b else f"{a:.3g}" for a, b in ends]
    names[-1] = f"{ends[-1][0]:.3g} or more"
    median, high = (float(np.quantile(x, q)) for q in (0.5, 0.9))
    return {
        "title": title, "unit": unit, "median": f"{median:.3g}", "high": f"{high:.3g}", "longest": f"{x.max():.3g}",
        "bars": list(zip(names, counts.tolist(), (100 * counts / counts.max()).round(2).tolist(), strict=True)),
        "ticks": ["0", f"{bins * width / 2:.3g}", f"{bins * width:.3g}"],
    }  # fmt: skip
