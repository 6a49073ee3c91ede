"""What validate.py says of a data set beside its bad records, as text, JSON and a page."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from llava_fn.data import records as data
from llava_fn.data import survey
from llava_fn.data.check import check
from llava_fn.data.options import Data, Source
from llava_fn.runs.survey import survey_page

TEXT = [{"from": "human", "value": "What is <video> in HTML?"}, {"from": "gpt", "value": "a tag"}]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pictures(folder):
    """Pictures of every odd kind, and one of none."""
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    alpha.paste((0, 0, 0, 255), (5, 5, 15, 15))  # black on nothing: without alpha all of it is black
    noise(20, 20).save(folder / "good.png")
    noise(20, 24).save(folder / "rotated.jpg", exif=exif)
    alpha.save(folder / "clear.png")
    noise(60, 20).convert("RGBA").save(folder / "opaque.png")
    noise(70, 16).save(folder / "wide.png")
    noise(3, 3).save(folder / "tiny.png")
    Image.new("L", (9000, 2000)).save(folder / "huge.png")
    shutil.copy(folder / "good.png", folder / "copy.png")


def say(image, **more):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    return {"image": image, "conversations": turns, **more}


@pytest.fixture(scope="module")
def found(how, tmp_path_factory):
    """(survey, summary, options)."""
    folder = tmp_path_factory.mktemp("odd")
    pictures(folder)
    names = [p.name for p in sorted(folder.iterdir())]
    rows = [say(name, model="<b>m") for name in names] + [say("good.png", id="other"), say("good.png", id="twin")]
    two = TEXT + [{"from": "human", "value": "<image><image> Same?"}, {"from": "gpt", "value": "Yes."}]
    rows += [{"conversations": TEXT, "source": "x"}, {"image": ["good.png", "wide.png"], "conversations": two}]
    rows += [say("gone.png"), {"conversations": [TEXT[0], {"from": "gpt", "value": "a b c d " * 200}]}]
    (folder / "some.json").write_text(json.dumps(rows))
    chat = data.Preparation(how.tokenizer, "vicuna_v1", None, "pad", 16, how.patches, 400)
    read, c = data.read(Source(folder / "some.json", folder)), Data(samples=5, epochs=1.5)
    s = survey.Survey(16)
    for chunk in check(read, chat, 0):
        s.add(chunk)
    return s, survey.summary(s, read, data.unread([read]), survey.estimate(s, c, 100.0)), c


def test_records_are_counted_by_what_is_odd_about_them(found):
    s, f, _ = found
    assert (f["records"], f["usable"], len(f["bad"]), f["too_long"]) == (14, 12, 2, 1)
    assert f["unread_keys"] == {"model": 8, "source": 1} and f["foreign_marks"] == {"<video>": 2}
    assert f["same_records_count"] == 3 - 1 and f["same_records"][0] == ["some.json[2]", "some.json[8] id other"]
    assert (f["text_only_share"], f["several_images_share"]) == (1 / 12, 1 / 12)
    assert sum(n for _, _, n in f["tokens"]) == 12 and f["tokens_sum"] == sum(s.tokens) > f["targets_sum"] > 24
    assert [n for low, _, n in f["turns"] if low in (2, 4)] == [11, 1]
    updates = f["estimate"]["updates"]
    assert updates == 5 and f["estimate"]["hours"] == pytest.approx(1.5 * sum(s.tokens) / 100 / 3600, rel=1e-3)


def test_images_are_counted_once_by_what_is_odd_about_them(found):
    s, f, _ = found
    assert f["image_files"] == 8 and f["odd_images"] == {
        "extreme shape": 2, "tiny": 1, "huge": 1, "one colour": 2, "rotated": 1, "transparent": 1,
    }  # fmt: skip
    (pair,) = f["same_images"]
    assert [p.rpartition("/")[2] for p in pair] == ["copy.png", "good.png"]
    shown = {kind: [look.path.rpartition("/")[2] for _, _, look in kept] for kind, kept in s.odd.items()}
    assert shown["rotated"] == ["rotated.jpg"] and shown["transparent"] == ["clear.png"]
    assert set(shown["one colour"]) == {"clear.png", "huge.png"} and shown["tiny"] == ["tiny.png"]
    assert max(s.odd["extreme shape"])[2].path.endswith("huge.png")


def test_only_the_oddest_images_of_a_kind_are_kept(found):
    s = survey.Survey(16)
    (_, _, look), *_ = found[0].odd["rotated"]
    for i in range(20):
        s._image(type(look)(f"{i}", i, 100, 400 + i, ()))
    assert sorted(kept.height for _, _, kept in s.odd["extreme shape"]) == list(range(414, 420))
    assert s.kinds["extreme shape"] == 20


def test_the_text_names_all_of_it(found):
    said = survey.text(found[1])
    for words in (
        "12 of 14 records are fine\n1 of the others have too many tokens", "8.3% are text alone, 8.3% have several",
        "training: 5 updates, ",
        "8 image files: 2 extreme shape, 1 tiny, 1 huge, 2 one colour, 1 rotated, 1 transparent",
        "keys that are set and change nothing: model (8 records), source (1 records)",
        "marks of other tools, which are text here: <video> (2 records)", "1 images are copies of others: ",
    ):  # fmt: skip
        assert words in said, said


def test_the_page_stands_alone_and_escapes_what_it_shows(found):
    s, f, c = found
    page = survey_page(s, f | {"bad": ["<script>"] * 300}, "<i>some.json", c)
    assert page.count("data:image/jpeg;base64,") == 2 + 1 + 1 + 2 + 1 + 1
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" not in page and "<i>some" not in page
    assert "The first 200 of 300" in page and page.count("&lt;script&gt;") == 200
    assert "src=" in page and "http" not in page.replace('http-equiv="Content-Security-Policy"', "")


def test_nothing_that_can_be_used_is_a_page_too():
    s = survey.Survey(16)
    f = survey.summary(s, [], {}, survey.estimate(s, Data(tokens=5), 0.0))
    assert f["estimate"] == {"updates": 0, "tokens": 0, "hours": None} and "0 of 0" in survey.text(f)
    assert "Odd images" not in survey_page(s, f, "none", Data())
