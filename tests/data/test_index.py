"""Records found by their places in a file, against a parser of the whole file."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fn.data import index
from llava_fn.data import records as data
from llava_fn.data.options import Data, Source

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
    assert index.spans(tmp_path / "a.json") is None


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
    monkeypatch.setattr(data, "_length", lambda *_: pytest.fail("measured again"))
    assert np.array_equal(data.schedule(records, options, how, tmp_path / "run").lengths, one.lengths)
    other = [data.read(Source(emojis / "heldout.json", emojis))]
    with pytest.raises(pytest.fail.Exception, match="measured again"):  # other records have other lengths
        data.schedule(
            other, Data((Source(emojis / "heldout.json", emojis),), tokens=60, workers=0), how, tmp_path / "run"
        )


def test_lengths_from_worker_processes_are_those_of_one(emojis, how, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LENGTHS", 5)
    options = [Data((Source(emojis / "train.json", emojis),), tokens=60, workers=n) for n in (0, 2)]
    one, two = (data.schedule([data.read(o.sources[0])], o, how).lengths for o in options)
    assert np.array_equal(one, two) and len(one) == 12
