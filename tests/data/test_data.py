"""Records to batches: files, order, cutting, the ragged layout, and what happens to records that cannot be used."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_fn.batch import IMAGE, Sample, collate
from llava_fn.data import records as data
from llava_fn.data.options import Data, Source
from llava_fn.errors import BadRecord

PATCHES = 4  # of the tiny model


def say(caption, image="images/1F44B.png", **more):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": caption}]
    return {"image": image, "conversations": turns, **more}


@pytest.fixture
def source(emojis, tmp_path):
    """Write records to a file beside the emoji images -> Source."""

    def make(values, name="some.json", weight=1.0):
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
        return Source(path, emojis, weight)

    return make


def run(source, how, start=0, stop=None, share=data.Share(), **fields):
    """The steps of one source, or of several."""
    sources = source if isinstance(source, tuple) else (source,)
    config = Data(sources, **{"workers": 0, "samples": 4, **fields})
    records = [data.read(s) for s in sources]
    schedule = data.schedule(records, config, how)
    return list(data.steps(records, schedule, how, start, schedule.steps() if stop is None else stop, share))


def names(steps):
    return [tuple(sorted(r for b in step.batches for r in b.records)) for step in steps]


def whole(emojis):
    return Source(emojis / "train.json", emojis)


def same(a: data.Step, b: data.Step) -> None:
    assert (a.step, a.bad, len(a.batches)) == (b.step, b.bad, len(b.batches))
    for x, y in zip(a.batches, b.batches, strict=True):
        assert x.records == y.records and x.stream.segments.keys == y.stream.segments.keys
        for name in ("ids", "pixels", "image_rows", "labelled", "targets"):
            assert torch.equal(getattr(x, name), getattr(y, name))


# Files.


def test_json_and_json_lines_give_the_same_records(source):
    values = [say("a line\u2028separator", id="x"), say("b"), say("c", id=7)]
    lines = "\n".join(json.dumps(v, ensure_ascii=False) for v in values)
    one, other = data.read(source(values)), data.read(source(lines + "\n\n", "some.jsonl"))
    assert [r.value for r in one] == [r.value for r in other] == values
    assert [r.name for r in one] == ["some.json[0] id x", "some.json[1]", "some.json[2] id 7"]
    assert [r.name for r in other] == ["some.jsonl[0] id x", "some.jsonl[1]", "some.jsonl[2] id 7"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", "[]", "a.json: not a list with at least one record"),
        ("a.json", '{"a": 1}', "a.json: not a list with at least one record"),
        ("a.jsonl", "\n", "a.jsonl: not a list with at least one record"),
        ("a.json", "", "a.json, line 1, column 1: Expecting value"),
        ("a.json", '[{},\n{"id" 3}]', "a.json, line 2, column 7: Expecting ':'"),
        ("a.jsonl", '{}\n\n{"id": 3', "a.jsonl, line 3, column 9: Expecting ',' delimiter"),
        ("a.jsonl", "[{}\n{}", "a.jsonl, line 1, column 4: Expecting ',' delimiter"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused_with_its_name_and_line(source, name, content, said):
    with pytest.raises(ValueError, match=said):
        data.read(source(content, name))


@pytest.mark.parametrize("name", ["some.json", "some.JSONL", "some.txt"])
def test_json_lines_are_known_by_their_content_and_a_list_too(source, name):
    values = [say("a"), say("b", model="x", image_id=3)]
    lines = data.read(source("\n" + "\n".join(map(json.dumps, values)), name))
    assert [r.value for r in lines] == [r.value for r in data.read(source(values, name))] == values
    assert isinstance(lines, data.Records) and data.unread([lines, lines]) == {"model": 2, "image_id": 2}
    assert data.read(source(json.dumps(values[0]), name))[0].value == values[0]  # one line
    with pytest.raises(ValueError, match=f"{name}, line 3, column 1: "):
        data.read(source("\n".join([*map(json.dumps, values), "x"]), name))


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_with_the_records_inside_is_refused_with_the_place(source, indent):
    inside = {"version": 1, "data": [say("a")]}
    with pytest.raises(ValueError, match="some.json: not a list .*; write the list in 'data' to a file of its own"):
        data.read(source(json.dumps(inside, indent=indent)))


def test_keys_that_change_nothing_are_counted_in_a_list_that_is_kept_parsed_too(source):
    read = data.read(source([say("a", model="x"), 3]))
    assert not isinstance(read, data.Records) and data.unread([read]) == {"model": 1}
    assert data.unread_line([read]) == "keys of records that are set and change nothing: model (1 records)"
    assert data.unread_line([read[1:]]) == ""


def test_a_system_prompt_of_a_record_is_encoded_in_its_place(source, how):
    (plain, own) = data.read(source([say("a"), say("a", system="Be kind.")]))
    chat = replace(how, template="vicuna_v1", max_tokens=2048)
    ids = [x for x in data.encode(own, chat).ids if x >= 0]
    assert how.tokenizer.decode(ids).startswith("Be kind. USER:") and ids != data.encode(plain, chat).ids


def test_what_is_missing_or_not_text_is_named(source, tmp_path):
    with pytest.raises(ValueError, match="gone.json: no such file"):
        data.read(Source(tmp_path / "gone.json", tmp_path))
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        data.read(replace(source([say("a")]), images=tmp_path / "nowhere"))
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    with pytest.raises(ValueError, match="latin.json: not UTF-8"):
        data.read(Source(tmp_path / "latin.json", tmp_path))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Data(samples=0), "data.samples=0"),
        (lambda: Data(accumulate=0), "data.accumulate=0"),
        (lambda: Data(tokens=-1), "data.tokens=-1"),
        (lambda: Data(workers=-1), "data.workers=-1"),
        (lambda: Data(epochs=0.0), "data.epochs=0.0"),
        (lambda: Data(epochs=float("inf")), "data.epochs=inf"),
        (lambda: Source(Path("a"), Path("b"), -0.5), "a: weight=-0.5"),
        (lambda: Source(Path("a"), Path("b"), float("nan")), "a: weight=nan"),
    ],
)
def test_numbers_that_make_no_run_are_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_fingerprint_changes_with_content_and_weight_and_not_with_the_folder(source, tmp_path):
    one = source([say("a")])
    other = replace(one, records=tmp_path / "sub" / one.records.name)
    other.records.parent.mkdir()
    other.records.write_bytes(one.records.read_bytes())
    assert data.fingerprint([one]) == data.fingerprint([other]) != data.fingerprint([replace(one, weight=2.0)])
    other.records.write_bytes(one.records.read_bytes() + b"\n")
    assert data.fingerprint([one]) != data.fingerprint([other])


# Order.


def test_order_is_a_function_of_seed_and_epoch():
    def of(seed, epoch):
        return data.order((50, 7), (1.0, 1.0), seed, epoch).tolist()

    first = of(1, 0)
    data.order.cache_clear()
    assert of(1, 0) == first and sorted(first) == list(range(57))
    assert len({tuple(of(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)} | {tuple(range(57))}) == 7


def test_order_stays_what_it_was_in_earlier_versions():
    assert data.order((5, 4), (1.0, 0.5), 42, 3).tolist() == [3, 1, 2, 8, 0, 4, 7]


def test_weights_repeat_and_thin_out_sources():
    sizes = (10, 8, 6)
    shown = [Counter(data.order(sizes, (0.0, 0.5, 2.5), 3, epoch).tolist()) for epoch in range(3)]
    for counts in shown:
        assert not [i for i in counts if i < 10]
        assert sorted(counts[i] for i in range(10, 18)) == [0] * 4 + [1] * 4
        assert sorted(counts[i] for i in range(18, 24)) == [2] * 3 + [3] * 3
    assert len({frozenset(counts.items()) for counts in shown}) == 3  # drawn anew each epoch


def test_every_record_is_shown_once_an_epoch_and_the_rest_makes_a_smaller_update(emojis, how):
    steps = run(whole(emojis), how, samples=5, epochs=2.0)
    assert [sum(len(b.records) for b in s.batches) for s in steps] == [5, 5, 2] * 2
    assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6]
    everything = sorted(r.name for r in data.read(whole(emojis)))
    first, second = names(steps)[:3], names(steps)[3:]
    assert sorted(sum(first, ())) == sorted(sum(second, ())) == everything and first != second


@pytest.mark.parametrize("epochs, updates", [(0.5, 2), (1.0, 3), (1.1, 4), (2.4, 8)])
def test_steps_counts_the_updates_of_whole_and_part_epochs(emojis, how, epochs, updates):
    config = Data((whole(emojis),), samples=5, epochs=epochs)
    assert data.schedule([data.read(whole(emojis))], config, how).steps() == updates


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(emojis, how, workers):
    fields = {"samples": 3, "epochs": 1.5, "accumulate": 2}
    for a, b in zip(run(whole(emojis), how, **fields), run(whole(emojis), how, workers=workers, **fields), strict=True):
        same(a, b)


@pytest.mark.parametrize("tokens", [0, 40])
def test_a_later_start_continues_exactly_the_sequence(emojis, how, tokens):
    fields = {"samples": 5, "epochs": 3.0, "tokens": tokens}
    everything = run(whole(emojis), how, **fields)
    for start in (1, 3, len(everything) - 1, len(everything)):
        rest = run(whole(emojis), how, start, **fields)
        assert len(rest) == len(everything) - start
        for a, b in zip(everything[start:], rest, strict=True):
            same(a, b)


def test_accumulate_splits_an_update_into_parts_of_nearly_as_many_tokens(emojis, how):
    once, parts = run(whole(emojis), how, samples=7), run(whole(emojis), how, samples=7, accumulate=3)
    assert [sorted(len(b.records) for b in s.batches) for s in parts] == [[2, 2, 3], [1, 2, 2]]
    assert [sorted(sum(s, ())) for s in ([b.records for b in x.batches] for x in once)] == [
        sorted(sum(s, ())) for s in ([b.records for b in x.batches] for x in parts)
    ]
    few = run(whole(emojis), how, samples=2, accumulate=3)
    assert all([len(b.records) for b in s.batches] == [1, 1] for s in few)


# Cutting by tokens.


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(9, 30))
def test_cuts_keep_the_budget_and_the_order_and_fill_each_piece(lengths, budget):
    ends = data.cuts(np.array(lengths), budget)
    pieces = [lengths[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    assert sum(pieces, []) == lengths and all(pieces)
    assert all(sum(piece) <= budget for piece in pieces)
    assert all(sum(a) + b[0] > budget for a, b in zip(pieces, pieces[1:], strict=False))


def test_updates_by_tokens_keep_the_budget_are_full_and_are_counted(emojis, how):
    config = Data((whole(emojis),), tokens=45, epochs=2.0, workers=0)
    records = [data.read(whole(emojis))]
    schedule = data.schedule(records, config, how)
    steps = list(data.steps(records, schedule, how, 0, schedule.steps()))
    sizes = [sum(len(b.ids) for b in s.batches) for s in steps]
    assert max(sizes) <= 45 and len(steps) == schedule.steps() == 2 * len(schedule.epoch(0))
    order = data.order(schedule.sizes, (1.0,), config.seed, 0)
    assert [records[0][i].name for i in order[:3]][0] in steps[0].batches[0].records
    for update, size in zip(schedule.epoch(0)[1:], sizes, strict=False):
        assert size + schedule.lengths[update[0]] > 45  # the next would not have fitted
    assert Counter(sum(names(steps), ())) == Counter({r.name: 2 for r in records[0]})


def test_a_sample_longer_than_the_token_budget_is_refused_by_name(emojis, how):
    with pytest.raises(ValueError, match=r"train.json\[\d+\] id \S+ has \d+ tokens, more than the budget of tokens=9"):
        run(whole(emojis), how, tokens=9)


# The ragged layout.


@st.composite
def sample_lists(draw):
    made = []
    for j in range(draw(st.integers(1, 6))):
        images = draw(st.integers(0, 2))
        prompt = draw(st.lists(st.integers(3, 20), min_size=0, max_size=4))
        label = draw(st.lists(st.booleans(), min_size=1, max_size=6).filter(any))
        ids = (
            [1]
            + [IMAGE] * PATCHES * images
            + prompt
            + draw(st.lists(st.integers(3, 20), min_size=len(label), max_size=len(label)))
        )
        label = [False] * (len(ids) - len(label)) + label
        pixels = torch.full((images, 3, 2, 2), j, dtype=torch.uint8)
        made.append(Sample(f"r{j}", tuple(ids), tuple(label), pixels))
    return made


@settings(max_examples=150, deadline=None)
@given(sample_lists())
def test_collate_lays_out_what_each_sample_holds(samples):
    batch = collate(samples)
    by_name = {s.record: s for s in samples}
    ordered = [by_name[name] for name in batch.records]
    assert sorted(batch.records) == sorted(by_name)
    assert [len(s.ids) for s in ordered] == sorted(len(s.ids) for s in samples) == list(batch.stream.segments.keys)
    ids, positions, reads, pairs, pixels = [], [], [], [], []
    for s in ordered:
        first = s.label.index(True)
        reads += [len(ids) + i for i in range(first - 1, len(s.ids))]
        pairs += [(len(ids) + i - 1, t) for i, t in enumerate(s.ids) if s.label[i]]
        ids += s.ids
        positions += range(len(s.ids))
        pixels += [int(p[0, 0, 0]) for p in s.pixels]
    assert batch.ids.tolist() == ids and batch.stream.positions.tolist() == positions
    assert batch.stream.read.tolist() == reads
    assert batch.stream.read_segments.queries == tuple(len(s.ids) - s.label.index(True) + 1 for s in ordered)
    assert batch.stream.read_segments.keys == batch.stream.segments.keys
    assert list(zip(batch.stream.read[batch.labelled].tolist(), batch.targets.tolist(), strict=True)) == pairs
    assert batch.image_rows.tolist() == [i for i, t in enumerate(ids) if t == IMAGE]
    assert batch.pixels[:, 0, 0, 0].tolist() == pixels


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


def test_a_first_token_is_never_predicted():
    pixels = torch.zeros(0, 3, 2, 2, dtype=torch.uint8)
    batch = collate([Sample("a", (5, 6), (True, True), pixels), Sample("b", (7, 8), (True, True), pixels)])
    assert batch.targets.tolist() == [6, 8] and batch.stream.read[batch.labelled].tolist() == [0, 2]


def test_a_sample_holds_its_image_positions_pixels_and_labels(emojis, how, samples):
    record = data.read(whole(emojis))[0]
    sample = samples[0]
    caption = record.value["conversations"][1]["value"]
    image = [i for i, t in enumerate(sample.ids) if t == IMAGE]
    assert image == list(range(1, 1 + PATCHES)) and sample.ids[0] == how.tokenizer.bos
    assert sample.label == (False,) * (1 + PATCHES) + (True,) * (len(sample.ids) - 1 - PATCHES)
    assert how.tokenizer.decode([t for t in sample.ids[1 + PATCHES :]]).strip() == caption
    assert sample.pixels.shape == (1, 3, 16, 16) and sample.pixels.dtype == torch.uint8


# Records that cannot be used.

MIXED = [
    say("one", id="ok"),
    say("two", "images/none.png", id="gone"),
    {"image": "images/1F44B.png", "conversations": [{"from": "human", "value": "<image>"}], "id": "mute"},
    say("word " * 80, id="long"),
    say("five"),
    ["no object"],
]
REASONS = {
    "some.json[1] id gone": "some.json[1] id gone: .*images/none.png: cannot be read .No such file",
    "some.json[2] id mute": "some.json[2] id mute: the last question has no answer",
    "some.json[3] id long": "some.json[3] id long: \\d+ tokens, more than max_tokens=64",
    "some.json[5]": "some.json[5]: a record is an object with 'conversations', not list",
}


def pattern(text):
    return text.replace("[", r"\[").replace("]", r"\]")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_records_stop_the_run_with_file_position_id_and_reason(source, how, workers):
    with pytest.raises(BadRecord) as caught:
        run(source(MIXED), how, samples=8, workers=workers)
    message = str(caught.value)
    assert message.startswith("step 1: 4 bad records; mend the data set, or run with on_bad_record=")
    for reason in REASONS.values():
        assert len([line for line in message.splitlines() if found(reason, line)]) == 1


def found(reason, line):
    return re.search(pattern(reason), line)


@pytest.mark.parametrize("tokens", [0, 500])
def test_skipped_records_are_all_listed_and_the_others_all_used(source, how, tokens):
    (step,) = run(source(MIXED), how, samples=8, tokens=tokens, on_bad_record="skip")
    assert names([step]) == [("some.json[0] id ok", "some.json[4]")]
    assert sorted(name for name, _ in step.bad) == sorted(REASONS)
    assert all(found(REASONS[name], reason) for name, reason in step.bad)


def test_cutting_by_tokens_meets_bad_text_before_the_first_update(source, how):
    config = Data((source(MIXED),), tokens=500)
    with pytest.raises(BadRecord, match=pattern(REASONS["some.json[2] id mute"])):
        data.schedule([data.read(source(MIXED))], config, how)


@pytest.mark.parametrize("size, batches", [(1, 0), (2, 2)])
def test_an_update_without_a_usable_record_is_empty_on_every_process(source, how, size, batches):
    bad = source(MIXED[1:3])
    shares = [data.Share(rank, size) for rank in range(size)]
    steps = [run(bad, how, on_bad_record="skip", share=share, accumulate=2)[0] for share in shares]
    assert [len(step.batches) for step in steps] == [batches] * size
    assert not any(batch.records or len(batch.targets) for step in steps for batch in step.batches)
    assert sorted(name for step in steps for name, _ in step.bad) == ["some.json[0] id gone", "some.json[1] id mute"]


def test_a_broken_image_is_a_bad_record(source, how, emojis, tmp_path):
    (tmp_path / "half.png").write_bytes((emojis / "images/1F44B.png").read_bytes()[:200])
    records = [say("a", "half.png", id="h"), say("b", str(emojis / "images/1F44B.png"))]
    broken = replace(source(records), images=tmp_path)
    (step,) = run(broken, how, on_bad_record="skip")
    assert [name for name, _ in step.bad] == ["some.json[0] id h"] and "half.png" in step.bad[0][1]


def test_images_are_read_as_the_options_say(source, how, tmp_path):
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    clear = replace(source([say("a", "clear.png")]), images=tmp_path)
    for reading, value in (("original", 9), ("shown", 255)):
        ours = data.preparation(how.tokenizer, 16, PATCHES, Data(max_tokens=64, image_reading=reading))
        (step,) = run(clear, ours)
        assert (step.batches[0].pixels == value).all()


def test_sources_that_are_never_shown_are_refused(source, how):
    with pytest.raises(ValueError, match="the data set is empty"):
        run(source([say("a")], weight=0.0), how)


def test_records_of_several_sources_are_told_apart(source, how):
    one, two = source([say("a")], "one.json"), source([say("b")], "two.json", 2.0)
    steps = run((one, two), how, samples=10)
    assert Counter(names(steps)[0]) == Counter({"one.json[0]": 1, "two.json[0]": 2})
