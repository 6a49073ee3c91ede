"""The Chinese pages say what the English ones do: the same commands, and tables with the same codes, links and numbers.

The tables of docs/npu.md follow the code: the variables launch/ascend.py, the ops npu_contract/limits.py.
"""

import re
import sys
from collections import Counter

from pages import ROOT, lines

from llava_fn.launch.ascend import ASCEND_VARIABLES

sys.path.append(str(ROOT / "tests/kernels/npu_contract"))

from calls import calls  # noqa: E402
from limits import CARDS, LIMITS, Limit  # noqa: E402

NPU, NPU_ZH = ((ROOT / f"docs/npu{end}.md").read_text() for end in ("", ".zh"))


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells of each table."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [[re.split(r"(?<!\\)\|", row.strip("|")) for row in table.splitlines()] for table in found]


def facts(cell: str) -> Counter[str]:
    """What does not depend on the language: codes, links, numbers."""
    return Counter(re.findall(r"`[^`]+`|\]\([^)]+\)|\d+(?:[.,]\d+)*(?:\.post\d+)?", cell))


def fences(text: str) -> list[str]:
    return re.findall(r"^```.*?^```", text, re.M | re.S)


def test_both_pages_about_npus_have_the_same_commands_and_tables():
    assert fences(NPU) == fences(NPU_ZH) and len(fences(NPU)) > 5
    ours, theirs = tables(NPU), tables(NPU_ZH)
    assert [[len(row) for row in table] for table in ours] == [[len(row) for row in table] for table in theirs]
    for table, other in zip(ours, theirs, strict=True):
        for row, translated in zip(table[1:], other[1:], strict=True):
            assert list(map(facts, row)) == list(map(facts, translated)), (row, translated)
    assert re.findall(r"\]\((?!#)[^)]+\)", NPU)[1:] == re.findall(r"\]\((?!#)[^)]+\)", NPU_ZH)[1:]
    assert NPU.count("\n## ") == NPU_ZH.count("\n## ")


def test_the_chinese_readme_has_commands_of_the_readme_and_its_table_of_versions():
    assert set(lines("README.zh.md")) <= set(lines("README.md")) and len(lines("README.zh.md")) > 9
    readme = (ROOT / "README.zh.md").read_text()
    (table,), (translated, *_) = tables(readme), tables(NPU_ZH)
    assert table == translated
    assert all(
        (ROOT / path).exists()
        for path in re.findall(r"\]\((?!http)([^)#]+)", readme + (ROOT / "README.md").read_text())
    )


def test_the_table_of_variables_is_that_of_the_code():
    (table,) = (table for table in tables(NPU) if "variable" in table[0][0])
    cells = [
        [cell.strip().replace("\\|", "|").replace("&lt;", "<").replace("&gt;", ">") for cell in row] for row in table
    ]
    rows = {row[0]: row for row in cells[2:]}
    assert list(rows) == [f"`{v.name}`" for v in ASCEND_VARIABLES]
    for v in ASCEND_VARIABLES:
        _, _, legal, default, meaning = rows[f"`{v.name}`"]
        assert (legal, default) == (v.legal, v.default) and meaning.startswith(v.meaning), v.name
    assert sum(row[1] == "yes" for row in rows.values()) == 9  # of MindSpeed-MM's guide


def of_docs(x: Limit) -> str:
    """The row of an op."""
    page = x.source.rpartition("/")[2].removesuffix(".md").removeprefix("torch_npu-").partition("%26")[0]
    checked = "without memory" + ", and emulated" * ("emulation" in x.reach)
    cells = [f"`{x.op}`", x.contract, ", ".join(x.cards[c] for c in CARDS), f"[{page}]({x.source})", x.risk, checked]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def test_the_table_of_ops_is_that_of_their_limits():
    missing = [x for x in LIMITS.values() if of_docs(x) not in NPU]
    assert not missing, "docs/npu.md, and translated docs/npu.zh.md, need:\n" + "\n".join(map(of_docs, missing))
    (table,) = (table for table in tables(NPU) if table[0][0] == " op ")
    assert [row[0].strip(" `") for row in table[2:]] == list(LIMITS)
    assert {f"npu::{call.op}" for call in calls()} <= set(LIMITS)
