"""The rule for foreign JSON: what a table does not allow is refused by name and value, and nothing else is."""

import math

import pytest

from llava_fn.fields import (
    FREE,
    OTHER,
    REQUIRED,
    choice,
    flag,
    flaws,
    inside,
    integer,
    items,
    load,
    number,
    only,
    read,
    text,
    texts,
    whole,
)

TABLE = {
    "size": whole(3), "eps": number(1e-5), "name": text(None), "names": texts(None), "on": flag(False),
    "layer": integer(-2), "mode": choice("a", "b", default="a"), "act": only("silu", "swish"),
    "drop": only(0.0, default=0.1), "cache": FREE, "inner": inside({"r": whole(), "kind": only("x", None)}),
    "each": inside({OTHER: whole()}), "turns": items({"from": text(), "n": whole(1)}, []),
}  # fmt: skip
FINE = {"drop": 0.0}


def test_used_fields_come_with_the_defaults_of_those_that_are_missing():
    got = read(
        "f",
        FINE
        | {
            "size": 5,
            "cache": [7],
            "inner": {"r": 1},
            "each": {"a": 1},
            "new": None,
            "turns": [{"from": "x", "new": None}],
        },
        TABLE,
    )
    assert got == {"size": 5, "eps": 1e-5, "name": None, "names": None, "on": False, "layer": -2, "mode": "a",
                   "inner": {"r": 1}, "each": {"a": 1}, "turns": [{"from": "x", "n": 1}]}  # fmt: skip


REFUSED = [
    ({"a_field_from_nowhere": 7}, "a_field_from_nowhere=7; unknown; remove the field if"),
    ({"a_field_from_nowhere": False}, "a_field_from_nowhere=false; unknown"),
    ({"size": "3"}, 'size="3"; it must be a whole number above 0'),
    ({"size": None}, "size=null; it must be"), ({"size": True}, "size=true; it must"), ({"size": 0}, "size=0; it"),
    ({"size": 3.0}, "size=3.0; it must"), ({"size": [3]}, "size=[3]; it must"),
    ({"eps": math.nan}, "eps=NaN; it must be a number above 0"), ({"eps": math.inf}, "eps=Infinity; it must"),
    ({"eps": "1e-5"}, 'eps="1e-5"; it must'), ({"eps": True}, "eps=true; it must"),
    ({"name": 7}, "name=7; it must be a text"), ({"names": "a"}, 'names="a"; it must be a list of texts'),
    ({"names": [1]}, "names=[1]; it must be a list"), ({"on": 1}, "on=1; it must be true or false"),
    ({"on": None}, "on=null; it must"), ({"layer": [-2, -5]}, "layer=[-2, -5]; it must be one whole number"),
    ({"mode": "c"}, 'mode="c"; only "a" or "b" is supported'), ({"act": "gelu"}, 'act="gelu"; only "silu" or "swish"'),
    ({"act": None}, "act=null; only"), ({"drop": False}, "drop=false; only 0.0 is supported"),
    ({"inner": [1]}, "inner=[1]; it must be an object"), ({"inner": {}}, "inner.r is missing; it must be a whole"),
    ({"inner": {"r": 1, "x": 1}}, "inner.x=1; unknown"), ({"inner": {"r": None}}, "inner.r=null; it must"),
    ({"each": {"a": 1, "b": "2"}}, 'each.b="2"; it must be a whole number above 0'),
    ({"turns": {}}, "turns={}; it must be a list of objects"), ({"turns": [7]}, "turns[0] is 7; it must be an object"),
    ({"turns": [{"from": "x", "loss": 1}]}, "turns[0].loss=1; unknown"),
    ({"turns": [{}]}, "turns[0].from is missing"),
    ({"big": "x" * 999}, f'big="{"x" * 199} ... (1001 letters); unknown'),
]  # fmt: skip


@pytest.mark.parametrize("change, said", REFUSED, ids=lambda x: str(x)[:40])
def test_a_field_that_the_table_does_not_allow_is_refused_by_file_name_and_value(change, said):
    with pytest.raises(ValueError) as error:
        read("some/config.json", FINE | change, TABLE)
    assert str(error.value).startswith(f"some/config.json: {said}") and "\n" not in str(error.value)
    assert len(flaws(FINE | change, TABLE)) == 1


def test_a_missing_field_is_what_the_file_s_own_program_takes_for_it():
    assert flaws({}, TABLE) == ["drop is missing, which means 0.1; only 0.0 is supported"]
    assert flaws({}, {"r": whole(REQUIRED)}) == ["r is missing; it must be a whole number above 0"]


def test_all_flaws_are_in_one_error():
    assert len(flaws(FINE | {"size": 0, "new": 7, "inner": {"r": 0}}, TABLE)) == 3
    assert flaws([1], TABLE) == ["the file is [1]; it must be an object"]


def test_a_row_for_all_others_says_what_else_is_allowed():
    table = {"a": FREE, OTHER: only(None, False)}
    assert flaws({"b": None, "c": False}, table) == [] and flaws({"b": 7}, table) == [
        "b=7; only null or false is supported"
    ]


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"a": 1,\n "b": }', "config.json, line 2, column 7: Expecting value; mend the JSON"),
        (b'{"a": 1, "a": 2}', "config.json: one object has a twice; remove one"),
        (b"[1]", "config.json is not a JSON object"), (b"\xff{}", "config.json: 'utf-8' codec"),
        (b"[" * 100_000, "config.json: maximum recursion depth"), (b"", "config.json, line 1, column 1: Expecting"),
        (b'{"a": ' + b"1" * 5000 + b"}", "config.json: Exceeds the limit"),
    ],
    ids=lambda x: str(x[:20]),
)  # fmt: skip
def test_what_is_no_json_object_is_refused_by_its_place(content, said, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "config.json")
