"""The files of a result, read back as others read them."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import openpyxl
import pandas
import pytest
import tables
import tsvs
from tables import said, table

from llava_fn.evaluate import results, score, tally, tsv
from llava_fn.evaluate.intervals import wilson
from llava_fn.evaluate.records import Dataset, Prediction

HOSTILE = [
    "=1+1", "+1", "-1", "@SUM(A1)", '=HYPERLINK("http://x.y","z")', "{=1}", "http://x.y", "mailto:a@b.c", "internal:A1",
    "_x000B_", "\\x0b", "007", "1e5", "True", "None", "NA", "", " lead ", "a\tb\nc",
    "'quoted\"", "<script>alert(1)</script>", "caf\u00e9 \u65e5\u672c \U0001f389",
]  # fmt: skip


def write(out, t, texts, partial=False, model="m", rules=None, **about):
    return tables.write(out, model, t, said(*texts), rules or score.RULES[t.dataset.kind][0], about, partial)


def sheet(path, name="predictions"):
    return pandas.read_excel(path, sheet_name=name, dtype=str, keep_default_na=False)


def accuracies(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


MCQ = [
    {"A": "x", "B": "y", "answer": "A", "split": "validation", "category": "Science", "l2-category": "Physics"},
    {"A": "x", "B": "y", "answer": "B", "split": "dev", "category": "Business", "l2-category": "Finance"},
    {"A": "x", "B": "y", "answer": "A", "split": "validation", "category": "Art & Design", "l2-category": "Music"},
    {"A": "", "B": "", "answer": "12", "split": "validation", "category": "Science", "l2-category": "Chemistry"},
]


@pytest.fixture(scope="module")
def mmmu(tmp_path_factory):
    out = tmp_path_factory.mktemp("mmmu")
    return out, write(out, table("mmmu", MCQ, "MMMU_DEV_VAL"), ["A", "A", "?", ValueError("too long")], seed="7")


def test_accuracies_of_choices_are_fractions_a_row_a_split_in_the_peers_columns(mmmu):
    lines = (mmmu[0] / "m_MMMU_DEV_VAL_acc.csv").read_text().splitlines()
    assert lines[0] == '"split","Overall","Chemistry","Finance","Music","Physics","Art & Design","Business","Science"'
    assert lines[1] == f'"validation","{1 / 3!r}","0.0","","0.0","1.0","0.0","","0.5"'
    assert lines[2:] == ['"dev","0.0","","0.0","","","","0.0",""']
    frame = pandas.read_csv(mmmu[0] / "m_MMMU_DEV_VAL_acc.csv")
    assert frame["Overall"].tolist() == [1 / 3, 0.0] and frame["Finance"].isna().tolist() == [True, False]


def test_the_headline_of_mmmu_is_its_validation_split(mmmu):
    s = mmmu[1]
    assert (s.headline.name, s.headline.mean, s.headline.n) == ("validation", 1 / 3, 3)
    assert (s.headline.unparsed, s.headline.failed, s.overall.mean) == (1, 1, 0.25)
    assert str(s) == (
        f"MMMU_DEV_VAL: 33.33 % (validation; 95 % interval {100 * wilson(1 / 3, 3).low:.2f} to "
        f"{100 * wilson(1 / 3, 3).high:.2f}; 3 rows; 1 unparsed, 1 failed)"
    )


def test_the_summary_has_percent_bounds_and_counts_for_every_split_subject_and_discipline(mmmu):
    got = json.loads((mmmu[0] / "m_MMMU_DEV_VAL_summary.json").read_text())
    low, high = (round(100 * bound, 4) for bound in (wilson(1 / 3, 3).low, wilson(1 / 3, 3).high))
    figures = {"score": 33.3333, "interval": [low, high], "method": "wilson", "n": 3, "unparsed": 1, "failed": 1}
    assert got["headline"] == {"of": "validation", **figures, "ungraded": 0}
    assert got["splits"]["validation"] == {**figures, "ungraded": 0} and got["splits"]["dev"]["score"] == 0
    assert list(got["groups"]["l2-category"]["validation"]) == ["Chemistry", "Music", "Physics"]
    assert got["groups"]["category"]["validation"]["Science"]["failed"] == 1
    assert got["groups"]["category"]["dev"]["Business"]["n"] == 1
    assert (got["rows"], got["missing"], got["partial"], got["unit"]) == (4, 0, False, "percent")
    assert got["rules"] == "vlmevalkit-2024" and got["about"] == {"seed": "7"}


def test_the_sheet_has_the_columns_of_the_tsv_and_what_became_of_each_row(mmmu):
    got = sheet(mmmu[0] / "m_MMMU_DEV_VAL.xlsx")
    ours = ["prediction", "extracted", "score", "hit", "why", "status"]
    assert list(got) == ["index", "question", "A", "B", "answer", "split", "category", "l2-category", *ours]
    assert got["prediction"].tolist() == ["A", "A", "?", ""] and got["extracted"].tolist() == ["A", "A", "Z", ""]
    assert got["hit"].tolist() == ["1", "0", "0", "0"] and got["status"].tolist() == ["ok", "ok", "ok", "failed"]
    assert got["why"][3] == "no answer: too long" and all(got["why"])
    book = openpyxl.load_workbook(mmmu[0] / "m_MMMU_DEV_VAL.xlsx")
    assert book.sheetnames == ["predictions", "accuracy"]
    assert sheet(mmmu[0] / "m_MMMU_DEV_VAL.xlsx", "accuracy")["Overall"].tolist() == [repr(1 / 3), "0.0"]


def test_accuracies_of_others_are_percent_in_one_row_splits_as_they_first_appear(tmp_path):
    rows = [{"answer": "5", "split": split} for split in ("test_human", "test_augmented", "test_human", "test_human")]
    s = write(tmp_path, table("chartqa", rows), ["5", "6", "5.2", "$5."])
    assert (tmp_path / "m_FILE_acc.csv").read_text() == (
        f'"test_human","test_augmented","Overall"\n"{100 * (2 / 3)!r}","0.0","50.0"\n'
    )
    got = sheet(tmp_path / "m_FILE.xlsx")
    assert got["score_lenient"].tolist() == ["1", "0", "1", "1"] and s.overall.lenient == 0.75
    summary = json.loads((tmp_path / "m_FILE_summary.json").read_text())
    assert summary["overall"]["lenient (a diagnosis)"] == 75 and summary["overall"]["score"] == 50


def test_without_splits_others_have_overall_and_sorted_categories(tmp_path):
    rows = [{"answer": "['abcd']", "category": c} for c in ("z", "a", "z")]
    s = write(tmp_path, table("docvqa", rows), ["abcd", "abxx", "axxx"])
    assert (tmp_path / "m_FILE_acc.csv").read_text() == '"Overall","a","z"\n"50.0","50.0","50.0"\n'
    assert s.overall.interval.method == "wilson" and s.overall.lenient is None


def test_categories_are_sorted_whatever_the_order_of_rows():
    names = [chr(ord("z") - j) for j in range(20)]
    t = table("choice", [{"A": "x", "B": "y", "answer": "A", "category": c} for c in names])
    rows = tally.score_rows(t.dataset, t.questions, said(*["A"] * 20), "vlmevalkit-2024")
    assert [x.name for x in tally.by_group(t.dataset, rows, "category")] == sorted(names)


def test_without_splits_choices_have_the_one_called_none(tmp_path):
    rows = [{"A": "x", "B": "y", "answer": "A", "category": c} for c in ("b", "a", "")]
    write(tmp_path, table("choice", rows), ["A", "B", "A"])
    assert accuracies(tmp_path / "m_FILE_acc.csv") == [
        {"split": "none", "Overall": repr(2 / 3), "a": "0.0", "b": "1.0", "none": "1.0"}
    ]


def test_a_category_that_is_called_like_another_column_keeps_its_figures(tmp_path):
    rows = [{"A": "x", "B": "y", "answer": "A", "l2-category": "Other", "category": c} for c in ("Other", "Overall")]
    write(tmp_path, table("mmmu", rows), ["A", "B"])
    assert accuracies(tmp_path / "m_FILE_acc.csv") == [{
        "split": "none", "Overall": "0.5", "Other": "0.5", "Other (category)": "1.0", "Overall (category)": "0.0",
    }]  # fmt: skip


def test_every_text_is_a_text_in_the_spreadsheet_and_none_is_a_formula(tmp_path):
    rows = [{"answer": "x", "note": text, "=cmd": text, "prediction": text} for text in HOSTILE]
    write(tmp_path, table("docvqa", rows), HOSTILE)
    cells = openpyxl.load_workbook(tmp_path / "m_FILE.xlsx")["predictions"]
    names = [c.value for c in cells[1]]
    assert names[2:6] == ["answer", "note", "=cmd", "prediction (TSV)"]
    for row, text in zip(cells.iter_rows(min_row=2), HOSTILE, strict=True):
        assert {c.data_type for c in row if c.value is not None} == {"s"} and all(c.hyperlink is None for c in row)
        for name in ("note", "=cmd", "prediction (TSV)", "prediction"):
            assert (row[names.index(name)].value or "") == text
    got = sheet(tmp_path / "m_FILE.xlsx")
    assert got["note"].tolist() == got["prediction"].tolist() == HOSTILE


def test_a_name_in_the_csv_cannot_be_a_formula(tmp_path):
    names = ["=1+1", "+a", "-b", "@c", "\td", 'e"f', "g,h", "i\nj"]
    write(tmp_path, table("choice", [{"A": "x", "B": "y", "answer": "A", "category": c} for c in names]), ["A"] * 8)
    (row,) = accuracies(tmp_path / "m_FILE_acc.csv")
    assert set(row) == {"split", "Overall", "'=1+1", "'+a", "'-b", "'@c", "'\td", 'e"f', "g,h", "i\nj"}


def test_what_a_spreadsheet_cannot_hold_is_shown_escaped(tmp_path):
    odd = ["a\x0bb", "\x00", "a\rb", "\ufffe", "\ud800x", "_x000B_"]
    write(tmp_path, table("docvqa", [{"answer": "x", "note": text} for text in odd]), odd)
    want = ["a_x000B_b", "_x0000_", "a_x000D_b", "_xFFFE_", "\\ud800x", "_x000B_"]
    assert sheet(tmp_path / "m_FILE.xlsx")["note"].tolist() == want
    json.loads((tmp_path / "m_FILE_summary.json").read_text())


def test_a_long_cell_is_cut_with_a_mark_and_whole_in_a_file_beside(tmp_path):
    long, pairs, fits = "word " * 8000, "\U0001f389" * 20_000, "x" * 32_767
    t = table("docvqa", [{"answer": "x", "note": text} for text in ("short", pairs, fits)])
    write(tmp_path, t, ["short", long, "y"])
    got, aside = sheet(tmp_path / "m_FILE.xlsx"), tmp_path / "m_FILE_cut.json"
    mark = " [cut here: {} characters in all; m_FILE_cut.json has them]"
    assert got["prediction"][1].endswith(mark.format(40_000)) and long.startswith(got["prediction"][1][:32_000])
    assert got["note"][1].endswith(mark.format(20_000)) and got["note"][2] == fits
    assert all(len(text.encode("utf-16-le")) // 2 <= 32_767 for text in got["note"])
    assert json.loads(aside.read_text()) == {"1": {"note": pairs, "prediction": long, "extracted": long.strip()}}
    write(tmp_path, t, ["a", "b", "c"])
    assert json.loads(aside.read_text()) == {"1": {"note": pairs}}
    write(tmp_path, table("docvqa", [{"answer": "x"}]), ["x"])
    assert not aside.exists()


def test_equal_answers_give_equal_bytes_however_long_they_took(tmp_path):
    t = table("docvqa", [{"answer": "abcd", "images": j // 2, "split": "val"} for j in range(80)])
    texts = ["abxd" if j % 3 else "abcd" for j in range(80)]
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        answers = {k: replace(p, seconds=seconds) for k, p in reversed(said(*texts).items())}
        tables.write(tmp_path / name, "m", t, answers, "anls", {}, False)
    names = {"m_FILE.xlsx", "m_FILE_acc.csv", "m_FILE_summary.json"}
    told = openpyxl.load_workbook(tmp_path / "a" / "m_FILE.xlsx").properties
    assert {told.created, told.modified} == {results.CREATED}  # and not the time of writing
    assert names <= {p.name for p in (tmp_path / "a").iterdir()}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_partial_result_has_no_file_that_a_script_takes_for_the_score(tmp_path):
    t = table("chartqa", [{"answer": "5"}] * 3)
    with pytest.raises(ValueError, match="file.tsv: 2 rows have no answer yet, the first of index 1"):
        write(tmp_path, t, ["5"])
    write(tmp_path, t, ["5", "5", "6"])
    assert (tmp_path / "m_FILE_acc.csv").exists()
    s = write(tmp_path, t, [None, "5"], partial=True)
    assert not (tmp_path / "m_FILE_acc.csv").exists() and s.overall.n == 1 and s.overall.mean == 1
    assert (tmp_path / "m_FILE_acc_partial.csv").read_text() == '"Overall"\n"100.0"\n'
    assert openpyxl.load_workbook(tmp_path / "m_FILE.xlsx").sheetnames == ["predictions", "accuracy (partial)"]
    assert sheet(tmp_path / "m_FILE.xlsx")["status"].tolist() == ["missing", "ok", "missing"]
    summary = json.loads((tmp_path / "m_FILE_summary.json").read_text())
    assert summary["partial"] and summary["missing"] == 2 and "(partial)" in str(s)
    write(tmp_path, t, ["5", "5", "6"])
    assert not (tmp_path / "m_FILE_acc_partial.csv").exists() and (tmp_path / "m_FILE_acc.csv").exists()
    with pytest.raises(ValueError, match="none of its rows has an answer yet"):
        write(tmp_path, t, [], partial=True)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), results.replacing(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"] and path.read_text() == "old"
    with pytest.raises(OSError, match="b.csv cannot be written"), results.replacing(tmp_path / "a.csv" / "b.csv"):
        pass


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(results.os, "fsync", lambda fd: done.append(results.os.fstat(fd).st_size))
    with results.replacing(tmp_path / "a.csv") as part:
        part.write_text("whole")
        monkeypatch.setattr(results.os, "replace", lambda one, other: done.append((one, other)))
    assert done == [5, (part, tmp_path / "a.csv")]


def test_a_split_called_validation_is_the_headline_of_mmmu_alone(tmp_path):
    rows = [{"answer": "x", "split": split} for split in ("validation", "test")]
    assert write(tmp_path, table("docvqa", rows), ["x", "y"]).headline.name == "Overall"


def test_unknown_rules_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="rules='anls'"):
        write(tmp_path, table("chartqa", [{"answer": "5"}]), ["5"], rules="anls")
    assert not list(tmp_path.iterdir())


def test_rows_without_a_usable_gold_are_counted(tmp_path):
    rows = [{"A": "x", "B": "y", "answer": answer} for answer in ("A", "E", "")]
    s = write(tmp_path, table("choice", rows), ["A", "B", "A"])
    assert s.overall.ungraded == 2 and s.overall.mean == 1 / 3 and "2 without a usable gold" in str(s)


def test_rows_that_share_their_pictures_widen_the_interval(tmp_path):
    alone = [{"A": "x", "B": "y", "answer": "A"} for _ in range(200)]
    shared = [row | {"images": j // 4} for j, row in enumerate(alone)]
    texts = ["A" if j // 4 % 3 else "B" for j in range(200)]
    one = write(tmp_path / "1", table("choice", alone), texts).overall.interval
    two = write(tmp_path / "2", table("choice", shared), texts).overall.interval
    assert (one.method, two.method) == ("wilson", "bootstrap")
    assert two.high - two.low == pytest.approx(2 * (one.high - one.low), rel=0.1)


@pytest.mark.parametrize("kind", tsvs.ALL)
def test_answers_that_are_the_golds_of_a_real_file_score_full_marks(kind, tmp_path):
    t = tsv.open_table(tsvs.ALL[kind](tmp_path))
    found = {q.index: Prediction(q.index, score.golds(q.cells["answer"])[0], 1, 0.1) for q in t.questions}
    if kind == "mmmu":  # VLMEvalKit's list of golds is one text
        found = {q.index: Prediction(q.index, q.cells["answer"], 1, 0.1) for q in t.questions}
    s = tables.write(tmp_path, "model", t, found, score.RULES[kind][0], {}, False)
    assert s.overall.mean == 1 and s.overall.unparsed == 0
    cells = sheet(tmp_path / f"model_{t.dataset.name}.xlsx")
    assert cells["question"].tolist() == tsvs.answers(t.dataset.path, "question")
    assert (tmp_path / f"model_{t.dataset.name}_acc.csv").exists()


def test_the_tables_of_a_split_that_is_not_there_are_empty():
    assert tally.tally(Dataset("x", "choice", Path("x"), ()), "x", []) is None
