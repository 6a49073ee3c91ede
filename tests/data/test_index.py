"""Records found by their places in a file, against a parser of the whole file."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fn.data import index
from llava_fn.data import records as data
from llava_fn.data.options import Data, Source
from llava_fn.runs import validation
from llava_fn.runs.options import Heldout

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('"\\{}[],:é\n ab', max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\{}[]a', max_size=4), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.text('"\\{}[]a', max_size=4), VALUES, max_size=4), min_size=1, max_size=6)
FORMS = {"json": ({}, "a.json"), "indented": ({"indent": 2}, "a.json"), "ascii": ({"ensure_ascii": False}, "a.json"),
         "lines": ({}, "a.jsonl")}  # fmt: skip


@pytest.mark.parametrize("chunk", [7, 64, 2**20])
@pytest.mark.parametrize("form", FORMS)
def test_every_record_is_that_of_a_parser_of_the_whole(form, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", chunk)
    how, name = FORMS[form]

    @settings(max_examples=40)
    @given(RECORDS)
    def check(values):
        path = tmp_path / name
        if form == "lines":
            text = "\r\n\n".join(json.dumps(v, **how) for v in values)
        else:
            text = f" {json.dumps(values, **how)}\n"
        path.write_text(text, encoding="utf-8")
        read = data.read(Source(path, tmp_path))
        assert isinstance(read, data.Records)
        assert [r.value for r in read] == values and len(read) == len(values)
        assert [r.name for r in read[:2]] == [r.name for r in data.read(Source(path, tmp_path))][:2]
        assert read[-1].value == values[-1]

    check()


@pytest.mark.parametrize(
    "text",
    ["[{}] x", "[{},]", "[{} {}]", "[{}, 3]", "{}", "[]", "[{}", '[{"a": 1}, {"a" 2}]', '[{"a": "]}]', "x[{}]",
     '[{"a": 01}]', "\ufeff[{}]", "[[{}]]", '[{"a": \x01}]'],
)  # fmt: skip
def test_what_is_no_list_of_objects_is_left_to_the_parser(text, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert index.spans(tmp_path / "a.json", lambda value: None) is None


def parsed(path):
    """The values of a parser of the whole file, or the place and reason of its error."""
    text = path.read_text(encoding="utf-8")
    lines = list(enumerate(text.split("\n"))) if path.suffix == ".jsonl" else [(0, text)]
    values = []
    for number, line in lines:
        try:
            if path.suffix == ".json" or line.strip():
                values.append(json.loads(line))
        except json.JSONDecodeError as error:
            return f"{path}, line {number + error.lineno}, column {error.colno}: {error.msg}"
    values = values if path.suffix == ".jsonl" else values[0]
    return values if isinstance(values, list) and values else f"{path}: not a list with at least one record"


def outcome(path):
    try:
        return [r.value for r in data.read(Source(path, path.parent))]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("chunk", [7, 2**20])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_broken_anywhere_is_named_as_by_a_parser_of_the_whole(form, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", chunk)
    how, name = FORMS[form]

    @settings(max_examples=60)
    @given(RECORDS, st.integers(0, 2**16), st.sampled_from(["", *'"\\{}[],:1 \n\x0c\ufeffé']), st.integers(0, 2))
    def check(values, place, put, dropped):
        text = "\n".join(json.dumps(v, **how) for v in values) if form == "lines" else json.dumps(values, **how)
        place %= len(text) + 1
        path = tmp_path / name
        path.write_text(text[:place] + put + text[place + dropped :], encoding="utf-8")
        assert outcome(path) == parsed(path)

    check()


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.json", b'[{"id": 1},\n {"id": 2},\n]', "a.json, line 3, column 1: Expecting value"),
        ("a.json", b'[{"id": 1},\n {"id": 2}', "a.json, line 2, column 11: Expecting ',' delimiter"),
        ("a.json", b'\xef\xbb\xbf[{"id": 1}]', "a.json, line 1, column 1: Unexpected UTF-8 BOM"),
        ("a.jsonl", b'\xef\xbb\xbf{"id": 1}\n', "a.jsonl, line 1, column 1: Unexpected UTF-8 BOM"),
        ("a.jsonl", b'{"id": 1}\r\n\r\n{"id": 2\r\n', "a.jsonl, line 3, column 9: Expecting ',' delimiter"),
        ("a.jsonl", b'{"id": 1}\n{"id": "caf\xe9"}\n', "a.jsonl, line 2: not UTF-8 text"),
        ("a.jsonl", b'{"id": 1}\n{"id": 2} {"id": 3}', "a.jsonl, line 2, column 11: Extra data"),
        ("a.jsonl", b'{"id": 1}\r\n \t\r\n\n {"id": 2} \r\n', [{"id": 1}, {"id": 2}]),
        ("a.jsonl", b'{"id": 1}\r{"id": 2}\r', [{"id": 1}, {"id": 2}]),
        ("a.json", b'\r\n[\r\n  {"id": "]}"}\r\n]\r\n', [{"id": "]}"}]),
    ],
)
def test_files_as_users_bring_them(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    found = outcome(tmp_path / name)
    assert found.startswith(f"{tmp_path}/{expected}") if isinstance(expected, str) else found == expected


def test_a_broken_line_is_named_without_the_lines_before_it_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 2**12)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"id": str(i), "turns": [{}] * 9}) for i in range(10_000)] + ["{"]))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="a.jsonl, line 10001, column 2"):
            data.read(Source(path, tmp_path))
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size
    finally:
        tracemalloc.stop()


def test_a_list_with_other_things_than_objects_is_still_read(tmp_path):
    (tmp_path / "a.json").write_text('[{"id": 1}, 3, "x"]')
    read = data.read(Source(tmp_path / "a.json", tmp_path))
    assert [r.value for r in read] == [{"id": 1}, 3, "x"] and read[0].name == "a.json[0] id 1"


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1}]')
    read = data.read(Source(path, tmp_path))
    again = pickle.loads(pickle.dumps(read))  # as worker processes get it
    assert again[0].value == {"id": 1}
    path.write_text('[{"id": 10}]')
    with pytest.raises(ValueError, match="a.json has changed since the run began; start the run again"):
        again[0]


def test_lengths_are_kept_for_the_next_start(emojis, how, tmp_path, monkeypatch):
    options = Data((Source(emojis / "train.json", emojis),), tokens=60, workers=0)
    records = [data.read(options.sources[0])]
    one = data.schedule(records, options, how, tmp_path / "run")
    (kept,) = (tmp_path / "run").glob("lengths-*.npy")
    assert np.array_equal(np.load(kept), one.lengths)
    monkeypatch.setattr(data, "_length", lambda *_: 1 / 0)
    assert np.array_equal(data.schedule(records, options, how, tmp_path / "run").lengths, one.lengths)
    other = [data.read(Source(emojis / "heldout.json", emojis))]
    with pytest.raises(ZeroDivisionError):  # other records have other lengths
        data.schedule(
            other, Data((Source(emojis / "heldout.json", emojis),), tokens=60, workers=0), how, tmp_path / "run"
        )


def test_lengths_from_worker_processes_are_those_of_one(emojis, how, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LENGTHS", 5)
    options = [Data((Source(emojis / "train.json", emojis),), tokens=60, workers=n) for n in (0, 2)]
    one, two = (data.schedule([data.read(o.sources[0])], o, how).lengths for o in options)
    assert np.array_equal(one, two) and len(one) == 12


def measured(source, how, folder, **fields):
    options = Data((source,), tokens=60, workers=0, **fields)
    return data.schedule([data.read(source)], options, how, folder).lengths


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "is broken"),
        (lambda path: path.write_bytes(b""), "is broken"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no lengths"), "is broken"),
        (lambda path: np.save(path, np.ones(3, np.int64)), "is broken (int64[3] instead of int64[12])"),
        (lambda path: np.save(path, np.ones(12)), "is broken (float64[12] instead of int64[12])"),
        (lambda path: np.save(path, np.full(12, 65)), "(tokens from 65 to 65, where a record has at most 64)"),
        (lambda path: np.save(path, np.full(12, -1)), "is broken (tokens from -1 to -1"),
        (lambda path: path.rename(path.with_name("lengths-0.npy")), "is of other records, another tokenizer or"),
    ],
)  # fmt: skip
def test_lengths_that_do_not_hold_are_measured_again_and_that_is_said(harm, said, emojis, how, tmp_path, capfd):
    source = Source(emojis / "train.json", emojis)
    first = measured(source, how, tmp_path)
    assert "measured again" not in capfd.readouterr().err
    (path,) = tmp_path.glob("lengths-*.npy")
    harm(path)
    assert np.array_equal(measured(source, how, tmp_path), first) and np.array_equal(np.load(path), first)
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line and str(tmp_path) in line and line.endswith("; the tokens of each record are measured again")
    measured(source, how, tmp_path)
    assert not capfd.readouterr().err


def test_lengths_are_those_of_the_records_that_the_seed_leaves(emojis, how, tmp_path):
    source = Source(emojis / "train.json", emojis)
    for seed in range(4):
        options = Data((source,), tokens=60, workers=0, seed=seed)
        train, _ = validation.divided([data.read(source)], Heldout(share=0.25), seed)
        kept = [data.schedule(train, options, how, folder).lengths for folder in (tmp_path, None)]
        assert np.array_equal(*kept)
