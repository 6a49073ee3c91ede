"""Tiny TSVs of the four kinds, the same for the same arguments, with the oddities of the real files and some more."""

import base64
import csv
import io
from pathlib import Path

from PIL import Image

ROWS = 7


def png(seed: int) -> bytes:
    """A picture of its own for each seed."""
    img, out = Image.new("RGB", (20 + seed % 5, 16), (37 * seed % 256, 91 * seed % 256, 13 * seed % 256)), io.BytesIO()
    img.putpixel((seed % 20, seed % 16), (255, 255, 255))
    img.save(out, "PNG")
    return out.getvalue()


def b64(seed: int) -> str:
    return base64.b64encode(png(seed)).decode()


def write(path: Path, rows: list[dict], quoting: int = csv.QUOTE_ALL) -> Path:
    """A file as pandas writes it."""
    with path.open("w", encoding="utf-8", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]), delimiter="\t", quoting=quoting, lineterminator="\n", restval="")
        out.writeheader()
        out.writerows(rows)
    return path


def ai2d(folder: Path, n: int = ROWS) -> Path:
    """Two questions to a diagram, the second by reference; options that type guessing would lose."""
    options = [("None", "NA", "007", "=1+1"), ("a star", "the moon", "a planet", ""), ("14", "0.5", "1e3", "True")]
    rows = []
    for j in range(n):
        index = 100 * (j // 2) + j % 2
        image = b64(j // 2) if j % 2 == 0 else str(index - 1)
        question = ['What is "A"?', "Which\tone\nof these?", "What does <image> show?"][j % 3]
        cells = dict(zip("ABCD", options[j % 3], strict=True))
        rows.append({
            "index": index, "question": question, **cells, "answer": "ABC"[j % 3],
            "category": ["atoms", "foodWebs"][j % 2], "abcLabel": "False", "image_path": f"{index}.png", "image": image,
        })  # fmt: skip
    return write(folder / "AI2D_TEST.tsv", rows)


GOLDS = ["12", "[2011, 2015]", "-3.5", "0", "45%", "1,234", "Yes"]


def chartqa(folder: Path, n: int = ROWS) -> Path:
    """Golds of every kind: lists, negative, zero, percent, commas, words."""
    rows = [
        {"index": j, "question": f"How many in {2000 + j}?", "answer": GOLDS[j % 7],
         "split": ["test_human", "test_augmented"][j % 2], "image": b64(10 + j)}
        for j in range(n)
    ]  # fmt: skip
    return write(folder / "ChartQA_TEST.tsv", rows)


def docvqa(folder: Path, n: int = ROWS) -> Path:
    """Lists of accepted strings; three questions to a page."""
    accepted = [["ITC Limited", "itc limited"], ["$1,000"], ["O'Neil", 'the "end"'], ["1/2/98"]]
    rows = [
        {"index": j, "question": "What is the name of the company" + "?" * (j + 1), "answer": str(accepted[j % 4]),
         "split": "val", "image": b64(30 + j // 3)}
        for j in range(n)
    ]  # fmt: skip
    return write(folder / "DocVQA_VAL.tsv", rows)


def mmmu(folder: Path, n: int = ROWS) -> Path:
    """Open questions, two images, nine options, options that are pictures, a hint, Chinese, and code in a cell."""
    nine = {letter: f"option {letter}" for letter in "ABCDEFGHI"}
    kinds = [
        {"question": "Which of <image 1> and <image 2>?", "A": "<image 1>", "B": "<image 2>", "answer": "B",
         "image": str([b64(50), b64(51)]), "image_path": "['one.png', 'two.png']"},
        {"question": "How long is it in m?", "answer": "['8.4', '8.40']", "image": b64(52), "image_path": "a.png"},
        {"question": "__import__('os').system('touch hacked')", **nine, "answer": "I", "image": str([b64(53)])},
        {"question": "\u8fd9\u662f\u4ec0\u4e48?", "A": "\u732b", "B": "\u72d7", "answer": "A", "hint": "\u770b",
         "image": b64(54)},
        {"question": "Pick.", "A": "12", "B": "12.5", "hint": "Look twice.", "answer": "A", "image": b64(55)},
    ]  # fmt: skip
    places = [("Art & Design", "Music"), ("Science", "Physics"), ("Business", "Finance")]
    columns = ["question", *nine, "answer", "hint"]
    rows = []
    for j in range(n):
        kind, (category, subject) = kinds[j % 5], places[j % 3]
        rows.append(
            {"index": j + 1, "id": f"{['dev', 'validation'][j % 2]}_{subject}_{j}"}
            | {name: kind.get(name, "") for name in columns}
            | {"category": category, "l2-category": subject, "split": ["dev", "validation"][j % 2]}
            | {"image_path": kind.get("image_path", f"{j}.png"), "image": kind["image"]}
        )
    return write(folder / "MMMU_DEV_VAL.tsv", rows)


ALL = {"choice": ai2d, "chartqa": chartqa, "docvqa": docvqa, "mmmu": mmmu}


def answers(path: Path, column: str) -> list[str]:
    """One column, as Python's csv module reads it."""
    with path.open(encoding="utf-8", newline="") as f:
        return [row[column] for row in csv.DictReader(f, delimiter="\t")]
