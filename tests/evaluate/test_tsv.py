"""Reading TSVs: every cell as it is, images wherever they may be, and every row that cannot be used by its name."""

import base64
import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tsvs
from hypothesis import given
from hypothesis import strategies as st

from llava_fn.evaluate import tsv

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=tsvs.ALL)
def kind(request):
    return request.param


def small(path, quoting=csv.QUOTE_ALL, **columns):
    """A file of these columns; those that every file needs are filled in."""
    n = max(len(values) for values in columns.values() if values is not None)
    rest = {"index": range(n), "question": ["q"] * n, "answer": ["a"] * n, "image": [tsvs.b64(j) for j in range(n)]}
    every = rest | columns
    rows = [{name: values[j] for name, values in every.items() if values is not None} for j in range(n)]
    return tsvs.write(path / "x.tsv", rows, quoting)


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
def test_cells_are_those_that_the_csv_module_reads(kind, tmp_path, quoting):
    path = tsvs.ALL[kind](tmp_path)
    with path.open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    table = tsv.open_table(tsvs.write(path, rows, quoting))
    assert [dict(q.cells) for q in table.questions] == [{k: v for k, v in r.items() if k != "image"} for r in rows]
    assert [q.index for q in table.questions] == [r["index"] for r in rows]
    assert [q.row for q in table.questions] == list(range(tsvs.ROWS))
    assert table.dataset.columns == tuple(k for k in rows[0] if k != "image") and table.dataset.kind == kind


CELL = st.text(st.sampled_from('ab"\t\n,;\r \u00e9=0'), max_size=6)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=4), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_any_text_survives(tmp_path_factory, cells, quoting):
    columns = {"question": [q for q, _ in cells], "answer": [a for _, a in cells]}
    path = small(tmp_path_factory.mktemp("t"), quoting, **columns)
    got = tsv.open_table(path).questions
    assert [(q.cells["question"], q.cells["answer"]) for q in got] == cells


@pytest.mark.parametrize("cell", ["None", "NA", "N/A", "null", "nan", "007", "=1+1", "True", "1e3", " x ", "@cmd"])
def test_nothing_is_taken_for_anything_but_text(tmp_path, cell):
    (q,) = tsv.open_table(small(tmp_path, A=[cell], B=[""], C=["c"])).questions
    assert q.cells["A"] == cell and q.options == {"A": cell, "C": "c"}


def test_code_in_a_cell_stays_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "__import__('os').system('touch hacked')"
    for columns in ({"answer": [code]}, {"question": [f"[{code}]"]}):
        assert code in str(tsv.open_table(small(tmp_path, **columns)).questions[0].cells)
    for cell in (f"[{code}]", f"['a', {code}]"):
        with pytest.raises(ValueError, match="base64"):
            tsv.open_table(small(tmp_path, image=[cell]))
        with pytest.raises(ValueError, match="no list of names"):
            tsv.open_table(small(tmp_path, image=None, image_path=[cell]))
    assert not (tmp_path / "hacked").exists()


def test_images_come_from_base64_from_lists_and_from_other_rows(tmp_path):
    single, two, json_like = tsvs.b64(0), str([tsvs.b64(1), tsvs.b64(2)]), f'["{tsvs.b64(3)}",  "{tsvs.b64(1)}"]'
    cells = [single, two, json_like, "0", "3", str([tsvs.b64(0)])]
    for quoting in (csv.QUOTE_ALL, csv.QUOTE_MINIMAL):
        table = tsv.open_table(small(tmp_path, quoting, image=cells))
        want = [[0], [1, 2], [3, 1], [0], [0], [0]]
        assert [table.images(q) for q in table.questions] == [[tsvs.png(j) for j in js] for js in want]
        same = [q.images for q in table.questions]
        assert same[0] == same[3] == same[4] == same[5] and len(set(same)) == 3


def test_up_to_64_characters_are_the_index_of_another_row(tmp_path):
    for length in (1, 63, 64):
        table = tsv.open_table(small(tmp_path, index=["x" * length, "1"], image=[tsvs.b64(0), "x" * length]))
        assert table.images(table.questions[1]) == [tsvs.png(0)]
    with pytest.raises(ValueError, match="its image is no base64"):
        tsv.open_table(small(tmp_path, index=["x" * 65, "1"], image=[tsvs.b64(0), "x" * 65]))


def test_the_digest_is_of_the_whole_file(tmp_path):
    path = small(tmp_path, question=["long " * 50_000])
    table = tsv.open_table(path)
    assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and table.notes == ()


def test_images_are_told_apart_by_where_one_ends(tmp_path):
    a, b = (base64.b64encode(bytes(60) + x).decode() for x in (b"abc", b"def"))
    both, swapped = str([a, b]), str([b, a])
    joined = base64.b64encode(bytes(60) + b"abc" + bytes(60) + b"def").decode()
    assert len({q.images for q in tsv.open_table(small(tmp_path, image=[both, swapped, joined])).questions}) == 3


def test_files_are_found_beside_the_tsv(tmp_path):
    (tmp_path / "images").mkdir()
    for j in range(3):
        (tmp_path / f"images/it's {j}.png").write_bytes(tsvs.png(j))
    names = ["images/it's 0.png", str(["images/it's 1.png", "images/it's 2.png"])]
    table = tsv.open_table(small(tmp_path, image=None, image_path=names))
    assert [table.images(q) for q in table.questions] == [[tsvs.png(0)], [tsvs.png(1), tsvs.png(2)]]
    (tmp_path / "images/it's 0.png").write_bytes(tsvs.png(9))
    with pytest.raises(ValueError, match="images of index 0 have changed"):
        table.images(table.questions[0])


@pytest.mark.parametrize("name", tsv.KNOWN)
def test_both_spellings_of_a_name_mean_the_same(tmp_path, name):
    path = small(tmp_path, A=["x"], B=["y"])
    for spelling in (name, name.lower(), name.upper()):
        table = tsv.open_table(path.rename(tmp_path / f"{spelling}.tsv"))
        path = table.dataset.path
        assert (table.dataset.name, table.dataset.kind) == (name, tsv.KNOWN[name])
        assert "not the file that VLMEvalKit publishes" in table.notes[0]


@pytest.mark.parametrize("columns, kind", [
    ({"A": ["x"], "B": ["y"]}, "choice"),
    ({"A": ["x"], "B": ["y"], "l2-category": ["Music"]}, "mmmu"),
    ({"answer": ["['x', 'y']"]}, "docvqa"),
    ({"answer": ["[2011, 2015]"]}, "chartqa"),
    ({"answer": ["12"]}, "chartqa"),
])  # fmt: skip
def test_kind_of_an_unknown_file_is_told_from_its_columns(tmp_path, columns, kind):
    table = tsv.open_table(small(tmp_path, **columns))
    assert (table.dataset.name, table.dataset.kind, table.notes) == ("x", kind, ())


def raw(path, *rows, header="index\tquestion\tanswer\timage"):
    (path / "x.tsv").write_bytes("\n".join([header, *rows]).encode("latin-1"))
    return path / "x.tsv"


GOOD = f"0\tq\ta\t{tsvs.b64(0)}"
LONG = "x" * 65
BAD = {
    "one cell less": ([GOOD, "1\tq\ta"], r"line 3: row 2: 3 cells, but the header has 4"),
    "one cell more": ([GOOD + "\tx"], r"line 2: row 1: 5 cells"),
    "no index": ([f"\tq\ta\t{tsvs.b64(0)}"], "line 2: row 1: it has no index"),
    "index twice": (['"0"' + GOOD[1:], GOOD], r"line 3: row 2 \(index '0'\): row 1 has this index too"),
    "no image": (["0\tq\ta\t"], r"line 2: row 1 \(index '0'\): it has no image"),
    "bad base64": ([f"0\tq\ta\t{LONG}"], r"line 2: row 1 \(index '0'\): its image is no base64"),
    "bad base64 in a list": ([f"0\tq\ta\t['{tsvs.b64(0)}', '@@@']"], "line 2: row 1 .*no base64"),
    "empty list": (["0\tq\ta\t[]"], r"line 2: row 1 \(index '0'\): an image of its list is empty"),
    "empty in a list": ([f"0\tq\ta\t['{tsvs.b64(0)}', '']"], "line 2: row 1 .*an image of its list is empty"),
    "unknown row": (["0\tq\ta\t7"], r"line 2: row 1 \(index '0'\): its image '7' is no other row's index"),
    "circle": (["0\tq\ta\t1", "1\tq\ta\t0"], "line 3: row 2 .*leads in a circle"),
    "itself": (["0\tq\ta\t0"], "line 2: row 1 .*leads in a circle"),
    "open quote": ([GOOD, '1\t"q\ta\tx'], "line 3: a quote begins here and never ends"),
    "text behind a quote": ([GOOD, '1\t"q"x\ta\tx'], "line 3: text goes on behind the quote"),
    "not UTF-8": (["0\t\xff\ta\tx"], "line 2: row 1: not UTF-8"),
    "no rows": ([], "line 1: there is no row below the header"),
    "line in a cell": ([GOOD.replace("q", '"q\n\n"'), "1\tq"], "line 5: row 2: 2 cells"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_named(tmp_path, name):
    rows, said = BAD[name]
    with pytest.raises(ValueError, match=r"x\.tsv cannot be used; mend these rows:\n(.*\n)*  " + said):
        tsv.open_table(raw(tmp_path, *rows))


def test_all_bad_rows_are_counted_and_the_first_are_listed(tmp_path):
    with pytest.raises(ValueError, match=r"row 10: .*\n  and 5 more") as error:
        tsv.open_table(raw(tmp_path, *["1"] * 15))
    assert str(error.value).count("1 cells") == 10


@pytest.mark.parametrize(("header", "said"), [
    ("question\tanswer\timage", "lacks index; its"), ("index\tquestion\tanswer", r"lacks image \(or image_path\); its"),
    ("index\tindex\tquestion", r"lacks answer, image \(or image_path\) and has twice index; its"),
    ("index\tquestion\tanswer\timage\timage", "has twice image; its columns, between tabs, are"),
])  # fmt: skip
def test_a_header_that_lacks_a_column_is_refused(tmp_path, header, said):
    with pytest.raises(ValueError, match=f"line 1: the header {said}"):
        tsv.open_table(raw(tmp_path, GOOD, header=header))


def test_a_missing_file_of_an_image_names_its_row(tmp_path):
    with pytest.raises(ValueError, match=r"row 2 \(index '1'\): .*b.png cannot be read \(No such file"):
        (tmp_path / "a.png").write_bytes(tsvs.png(0))
        tsv.open_table(small(tmp_path, image=None, image_path=["a.png", "b.png"]))
    with pytest.raises(ValueError, match="row 1 .*image_path names no image"):
        tsv.open_table(small(tmp_path, image=None, image_path=[""]))
    for path in (tmp_path / "none.tsv", raw(tmp_path, header="")):
        with pytest.raises(ValueError, match="no such file, or an empty one"):
            tsv.open_table(path)


def test_line_ends_of_other_systems_blank_lines_and_a_byte_order_mark(tmp_path):
    path, plain = tsvs.ai2d(tmp_path), tsv.open_table(tsvs.ai2d(tmp_path))
    rows = [[*q.cells.values()] for q in plain.questions]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b'"\n"', b'"\r\n\n"') + b"\r\n")
    assert [[*q.cells.values()] for q in tsv.open_table(path).questions] == rows
    unquoted = f"index\tquestion\timage\tanswer\r\n0\tq\t{tsvs.b64(0)}\ta\r\n1\tq\t{tsvs.b64(0)}\t\r\n"
    path.write_bytes(unquoted.encode())
    assert [q.cells["answer"] for q in tsv.open_table(path).questions] == ["a", ""]


def test_a_part_of_a_table_keeps_its_order_and_its_references(tmp_path):
    table = tsv.open_table(tsvs.ai2d(tmp_path))
    part = table.part(["201", "1", "300"], 2)
    assert [(q.index, q.row) for q in part.questions] == [("1", 1), ("201", 5)]
    assert part.images(part.questions[0]) == [tsvs.png(0)]
    with pytest.raises(ValueError, match="has no index 8, x"):
        table.part(["1", "8", "x"])


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = small(tmp_path, image=[base64.b64encode(bytes(400_000)).decode()] * 200)
    assert path.stat().st_size > 100 * 2**20
    code = f"from llava_fn.evaluate import tsv; t = tsv.open_table(__import__('pathlib').Path({str(path)!r}))"
    shown = code + "; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # kB
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", shown], env=env, capture_output=True, text=True, check=True)
    assert 10 * 2**20 < int(done.stdout) * 1024 < 100 * 2**20
