"""The report of an evaluation: what it says, and how it behaves in a real browser (Chromium, headless)."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tables
import tsvs
from PIL import Image
from tables import Table, said, table

from llava_fn.evaluate import compare as comparing
from llava_fn.evaluate import page, results, score
from llava_fn.evaluate.intervals import bootstrap, of_difference
from llava_fn.runs import page as pages

HOSTILE = [
    "<script>document.title = 'hacked'</script>", "</script><script>document.title = 'hacked'</script>",
    "<img src=x onerror=\"document.title = 'hacked'\">", "<!--<script>", "]]>", "\"'><b>bold</b>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;&amp;", "javascript:alert(1)", "\u2028\u2029", "\x00\x0b", "\ud800", "caf\u00e9 \u65e5\u672c \U0001f389",
    "__proto__", "constructor",
]  # fmt: skip


def summary(t, texts, model="one", rules=None, partial=False, **about):
    rules = rules or score.RULES[t.dataset.kind][0]
    return tables.summary(model, t, said(*texts), rules, about, partial)


def embedded(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


CATEGORIES = ("rocks", "moons", "cells")
CHOICES = [
    {"A": "red", "B": "green", "C": "blue", "answer": "ABC"[j % 3], "category": CATEGORIES[j % 3], "images": j // 2}
    for j in range(60)
]
TEXTS = ["ABC"[j % 3] if j % 2 else "BCA"[j % 3] for j in range(57)] + ["no idea", ValueError("too long"), "A or B"]


@pytest.fixture(scope="module")
def choices():
    return table("choice", CHOICES, "AI2D_TEST")


def test_the_report_says_score_interval_and_counts(choices):
    s = summary(choices, TEXTS, model="my-model", seed="seven")
    html = page.report(s, choices)
    low, high = 100 * s.headline.interval.low, 100 * s.headline.interval.high
    for text in ("my-model", "AI2D_TEST", f"{100 * s.headline.mean:.2f}", f"{low:.1f} to {high:.1f}",
                 "28 right", "29 wrong", "2 unparsed", "1 failed", "vlmevalkit-2024", "seven"):  # fmt: skip
        assert text in html, text
    assert "partial" not in html and "http" not in re.sub("http-equiv", "", html)
    assert "partial" in page.report(replace(s, partial=True), choices)


def test_the_page_holds_every_row_with_what_became_of_it(choices):
    data = embedded(page.report(summary(choices, TEXTS), choices))
    assert [row["verdict"] for row in data["rows"]].count("right") == 28
    last = data["rows"][-2]
    assert (
        last["verdict"] == "failed" and last["why"] == "no answer: too long" and last["where"] == {"category": "moons"}
    )
    assert data["rows"][0] | {"picture": ""} == {
        "index": "0", "question": "q0", "options": {"A": "red", "B": "green", "C": "blue"},
        "where": {"category": "rocks"},
        "gold": "A", "picture": "", "verdict": "wrong", "score": 0.0, "said": "B", "extracted": "B",
        "why": "the only option letter is B", "tokens": 3, "seconds": 0.5,
    }  # fmt: skip


def test_pictures_are_small_shared_and_no_more_than_the_cap(choices, monkeypatch):
    monkeypatch.setattr(page, "PICTURES", 3)
    html = page.report(summary(choices, TEXTS), choices)
    pictures = embedded(html)["pictures"]
    assert list(pictures) == ["0", "1", "2"]  # of the first wrong rows 0, 2 and 4
    assert "3 of 30 that belong" in html and "no more than 3 are kept" in html


def jpeg(url):
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))


def encoded(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16", "CMYK"])
def test_a_picture_of_any_mode_becomes_a_small_jpeg_on_white(mode):
    clear = Image.new("RGBA", (1000, 500), (0, 0, 0, 0))
    image = clear.convert(mode) if mode in ("RGBA", "LA") else Image.new(mode, (1000, 500))
    small = jpeg(pages.small(encoded(image, "JPEG" if mode == "CMYK" else "PNG")))
    assert small.size == (800, 400) and small.format == "JPEG"
    assert (small.convert("RGB").getpixel((9, 9)) == (255, 255, 255)) == (mode in ("RGBA", "LA", "CMYK"))


@pytest.mark.parametrize("content", [b"", b"no image", encoded(Image.new("RGB", (90, 90)))[:60]])
def test_a_picture_that_cannot_be_opened_is_named_in_its_place(content):
    assert pages.small(content) == ""


def test_a_question_with_many_pictures_shows_the_first():
    class Many(Table):
        def images(self, question):
            return [tsvs.png(j) for j in range(9)]

    t = table("chartqa", [{"answer": "5"}])
    (urls,) = embedded(page.report(summary(t, ["6"]), Many(t.dataset, t.questions)))["pictures"].values()
    assert len(urls) == page.EACH and len(set(urls)) == page.EACH


def test_long_texts_are_cut_with_a_mark():
    t = table("docvqa", [{"answer": "x", "question": "q" * 700}])
    (row,) = embedded(page.report(summary(t, ["y" * 100_000]), t))["rows"]
    assert row["said"] == "y" * 500 + " [99500 more characters]" and len(row["question"]) < 530 > len(row["why"])


def test_a_histogram_counts_every_answer_and_its_last_bar_the_longest():
    h = pages.histogram("t", "tokens", [1] * 500 + [2] * 499 + [1000])
    assert [(name, n) for name, n, _ in h["bars"] if n] == [("1", 500), ("2 or more", 500)]
    assert [height for _, n, height in h["bars"]] == [0, 100, 100] and (h["median"], h["longest"]) == ("1.5", "1e+03")
    h = pages.histogram("t", "seconds", [j / 100 for j in range(1000)])
    assert len(h["bars"]) == pages.BINS and sum(n for _, n, _ in h["bars"]) == 1000
    assert pages.histogram("t", "seconds", [0.0, 0.0])["bars"][0][1] == 2
    assert sum(n for _, n, _ in pages.histogram("t", "tokens", list(range(0, 5000, 7)))["bars"]) == 715


def test_the_confusion_counts_each_right_letter_against_the_letter_found(choices):
    got = page._confusion(summary(choices, TEXTS))
    assert got["right"] == ["A", "B", "C"] and got["found"] == ["A", "B", "C", "Z"]
    assert got["counts"]["A", "A"] == 9 and got["counts"]["A", "B"] == 10 and got["counts"]["C", "Z"] == 1
    assert got["sums"] == {"A": 20, "B": 19, "C": 20}  # one has failed
    rows = [{"A": "x", "B": "y", "answer": "B"}, {"answer": "12"}]
    assert page._confusion(summary(table("mmmu", rows), ["B", "12"]))["counts"] == {("B", "B"): 1}
    assert page._confusion(summary(table("docvqa", [{"answer": "x"}]), ["x"])) is None


MMMU = [
    {"A": "x", "B": "y", "answer": "A", "split": "dev" if j < 20 else "validation", "category": CATEGORIES[j % 3],
     "l2-category": str(j % 20)} for j in range(60)
]  # fmt: skip


def test_bars_are_of_the_rows_that_the_headline_counts():
    sections = dict(page._sections(summary(table("mmmu", MMMU), ["A"] * 60)))
    assert [t.n for t in sections["split"]] == [20, 40] and sum(t.n for t in sections["category"]) == 40
    assert len(sections["l2-category"]) == 20 > page.LONG
    one = [{"answer": "5", "split": "val"}]
    assert page._sections(summary(table("chartqa", one), ["5"])) == []  # one bar says nothing


def test_a_comparison_is_paired_by_question_and_of_the_headlines_rows():
    t = table("mmmu", MMMU)
    a, b = ["A"] * 60, ["B" if j % 4 == 0 else "A" for j in range(60)]
    c = comparing.compare(summary(t, a), summary(t, b, model="two"))
    assert c.whole.name == "validation" and c.whole.difference == 0.25 and [x.mean for x in c.tallies] == [1, 0.75]
    gains = np.array([float(j % 4 == 0) for j in range(20, 60)])
    assert c.whole.interval == bootstrap(gains, np.arange(40))
    assert str(c) == (
        f"FILE (validation): one less two is +25.00 points (95 % interval {100 * c.whole.interval.low:+.2f} to "
        f"{100 * c.whole.interval.high:+.2f}); 15 questions better, 0 worse, of 60"
    )
    assert page._agreement(c) == {"both": 45, "one": 15, "other": 0, "neither": 0}
    splits = [(g.name, g.n, g.one, g.other) for g in c.groups["split"]]
    assert splits == [("dev", 20, 1, 0.75), ("validation", 40, 1, 0.75)]
    assert [g.n for g in c.groups["category"]] == [14, 13, 13] and len(c.groups["l2-category"]) == 20
    rows = [j for j in range(20, 60) if j % 3 == 0]
    worth = [np.array([row.score.score for row in s.rows])[rows] for s in (c.one, c.other)]
    rocks = next(g for g in c.groups["category"] if g.name == "rocks")
    assert rocks.interval == of_difference(*worth, np.array(rows))
    html = page.comparison(c, t)
    assert f"{100 * rocks.interval.low:+.1f} to {100 * rocks.interval.high:+.1f}</td>" in html
    assert html.count("(validation)</span></h2>") == 2 and html.count('class="gain"') == 2 + 3 + 5


def test_a_comparison_takes_the_questions_that_both_were_asked_and_failures_as_wrong():
    t = table("docvqa", [{"answer": "abcd"}] * 4)
    one = summary(t, ["abcd", "abcd", ValueError("x"), None], partial=True)
    c = comparing.compare(one, summary(t, ["abcd", "abxy", "abcd", "abcd"], model="two"))
    assert [p.change for p in c.pairs] == ["same", "better", "worse"] and c.whole.difference == pytest.approx(-0.5 / 3)


def test_a_comparison_has_the_pictures_of_what_changed():
    t = table("docvqa", [{"answer": "abcd"}] * 4)
    c = comparing.compare(summary(t, ["abcd", "x", "abcd", "x"]), summary(t, ["abcd", "abcd", "x", "x"]))
    assert list(embedded(page.comparison(c, t))["pictures"]) == ["1", "2"]


def test_runs_that_cannot_be_compared_are_refused():
    t = table("docvqa", [{"answer": "a"}])
    one = summary(t, ["a"])
    with pytest.raises(ValueError, match="rules 'anls' of one is not 'challenge' of two; compare like with like"):
        comparing.compare(one, summary(t, ["a"], model="two", rules="challenge"))
    with pytest.raises(ValueError, match="dataset 'FILE' of one is not 'OTHER' of two"):
        comparing.compare(one, summary(table("docvqa", [{"answer": "a"}], "OTHER"), ["a"], model="two"))
    for cells in ({"answer": "b"}, {"answer": "a", "images": 7}):
        with pytest.raises(ValueError, match="were asked different questions of FILE: index 0 and 0 more differ"):
            comparing.compare(one, summary(table("docvqa", [cells]), ["a"]))
    two = table("docvqa", [{"answer": "a"}] * 2)
    with pytest.raises(ValueError, match="no index has answers in both"):
        comparing.compare(summary(two, ["a"], partial=True), summary(two, [None, "a"], partial=True))


@pytest.fixture
def open_report(browser, tmp_path):
    """Writes results and opens their page; fails at the end if it asked for anything, or said anything."""
    said_, asked, pages = [], [], []

    def opened(path, **more):
        view = browser.new_page(**{"viewport": {"width": 1200, "height": 800}} | more)
        view.set_default_timeout(60_000)
        view.on("request", lambda r: asked.append(r.url))
        view.on("console", lambda m: said_.append(m.text))
        view.on("pageerror", lambda e: said_.append(str(e)))
        view.goto(path.as_uri())
        pages.append(view)
        return view

    yield opened
    for view in pages:
        view.close()
    assert all(url.startswith(("file:", "data:")) for url in asked) and sum(
        u.startswith("file:") for u in asked
    ) == len(pages)
    assert not said_


def write(out, t, texts, model="one"):
    return tables.write(out, model, t, said(*texts), score.RULES[t.dataset.kind][0], {"weights": "w"}, False)


def cards(view):
    return view.eval_on_selector_all("#list > li", "all => all.map((x) => x.innerText)")


def count(view):
    return view.text_content("#count")


def test_filters_show_the_questions_that_they_say(open_report, choices, tmp_path):
    write(tmp_path, choices, TEXTS)
    view = open_report(tmp_path / "one_AI2D_TEST.html")
    assert count(view) == "32 questions of 60." and len(cards(view)) == 32  # those that are not right, at first
    assert view.locator("#verdicts button").all_text_contents() == [
        "all 60", "not right 32", "right 28", "wrong 29", "unparsed 2", "failed 1",
    ]  # fmt: skip
    view.click("text='unparsed 2'")
    assert [("no idea" in x, "A or B" in x) for x in cards(view)] == [(True, False), (False, True)]
    assert view.get_attribute("[data-verdict=unparsed]", "aria-pressed") == "true"
    view.click("text='failed 1'")
    assert len(cards(view)) == 1 and "no answer: too long" in cards(view)[0]
    view.click("text='all 60'")
    assert len(cards(view)) == 50
    view.click("#more")
    assert len(cards(view)) == 60 and view.is_hidden("#more")
    view.select_option("select[data-column=category]", "moons")
    assert count(view) == "20 questions of 60." and all("moons" in x for x in cards(view))
    view.fill("#search", "TOO Long")
    assert count(view) == "1 question of 60."
    view.click("#clear")
    assert count(view) == "60 questions of 60." and view.input_value("#search") == ""


def test_bars_and_confusion_lead_to_their_questions(open_report, choices, tmp_path):
    write(tmp_path, choices, TEXTS)
    view = open_report(tmp_path / "one_AI2D_TEST.html")
    view.click("button[data-value=rocks]")
    assert count(view) == "20 questions of 60." and view.input_value("select[data-column=category]") == "rocks"
    view.click("[aria-label='right A, found B: 10 rows']")
    assert count(view) == "10 questions of 60. Right letter A, found B." and len(cards(view)) == 10
    assert view.input_value("select[data-column=category]") == ""
    assert view.locator("#list img").first.evaluate("x => x.decode().then(() => x.naturalWidth)") == 20


@pytest.mark.parametrize("width", [1200, 390])
def test_a_picture_opens_large_by_click_and_by_key(width, open_report, choices, tmp_path):
    write(tmp_path, choices, TEXTS)
    view = open_report(tmp_path / "one_AI2D_TEST.html", viewport={"width": width, "height": 700})
    assert view.is_hidden("#large")
    small, large = view.locator("#list .enlarge >> nth=1"), view.locator("#large-picture")
    for how in (small.click, lambda: small.press("Enter"), lambda: small.press("Space")):
        how()
        assert large.get_attribute("src") == small.locator("img").get_attribute("src")
        assert large.get_attribute("alt") == view.text_content("#large-name") == "Picture of question 2"
        box = large.bounding_box()
        assert box["width"] > 0.85 * width and 500 < box["height"] and box["y"] + box["height"] <= 700
        view.keyboard.press("Escape")
        assert view.is_hidden("#large") and small.evaluate("x => x === document.activeElement")
    for place in ("#large-close", "#large-picture"):
        small.click()
        view.click(place)
        assert view.is_hidden("#large")
    small.click()
    view.mouse.click(2, 2)  # beside it
    assert view.is_hidden("#large")


def test_the_order_can_be_chosen(open_report, tmp_path):
    t = table("docvqa", [{"answer": "abcd", "question": f"question {j}"} for j in range(3)])
    found = said("abcx", "zzzz", "abxx")
    found["0"] = replace(found["0"], tokens=9)
    found["2"] = replace(found["2"], seconds=9.0)
    tables.write(tmp_path, "one", t, found, "anls", {}, False)
    view = open_report(tmp_path / "one_FILE.html")
    view.click("[data-verdict=all]")
    for order, first in (("file", 0), ("low", 1), ("long", 0), ("slow", 2)):
        view.select_option("#order", order)
        assert f"question {first}" in cards(view)[0], order
    assert "0.75" in cards(view)[1] and "0.5" in cards(view)[0]


@pytest.mark.parametrize("kind", ["docvqa", "choice"])
def test_hostile_texts_stay_texts_everywhere(kind, open_report, tmp_path):
    options = {"choice": {"A": "x", "B": "y"}, "docvqa": {}}[kind]
    cells = [
        {"answer": text, "category": text, "question": text, **(options and options | {"A": text, "answer": "B"})}
        for text in HOSTILE
    ]
    t = table(kind, cells)
    s = tables.write(tmp_path, "one", t, said(*HOSTILE), score.RULES[kind][0], {"<b>": HOSTILE[1]}, False)
    results.compare(tmp_path, replace(s, model=HOSTILE[5].replace("/", "")), replace(s, model="<i>two"), t)
    for path in tmp_path.glob("*.html"):
        view = open_report(path)
        view.click("[data-verdict=all]")
        assert (
            "hacked" not in view.title() and view.locator("main script, main b, main i, #list img[src=x]").count() == 0
        )
        got = view.eval_on_selector_all("#list .body", "all => all.map((x) => x.textContent)")
        assert len(got) == len(HOSTILE) and got[0] == HOSTILE[0] and got[1] == HOSTILE[1] and got[6] == HOSTILE[6]
        view.select_option("select[data-column=category]", HOSTILE[1])
        assert len(cards(view)) == 1
        assert HOSTILE[1] in view.text_content("dl:last-of-type >> nth=-1")


def test_a_comparison_shows_what_changed_with_both_answers(open_report, choices, tmp_path):
    one, other = write(tmp_path, choices, TEXTS), write(tmp_path, choices, ["A"] * 60, "two")
    results.compare(tmp_path, one, other, choices)
    view = open_report(tmp_path / "one_AI2D_TEST_vs_two.html")
    assert f"{100 * (one.overall.mean - other.overall.mean):+.2f} points" in view.inner_text(".score")
    n = sum((a.score.hit != b.score.hit) for a, b in zip(one.rows, other.rows, strict=True))
    assert count(view) == f"{n} questions of 60."
    better = sum((a.score.hit > b.score.hit) for a, b in zip(one.rows, other.rows, strict=True))
    view.click(f"text='better {better}'")
    assert len(cards(view)) == better and all("better" in x and "right" in x and "wrong" in x for x in cards(view))
    view.select_option("select[data-column=category]", "cells")
    assert all("cells" in x for x in cards(view))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_can_be_read_in_both_schemes(scheme, open_report, choices, tmp_path):
    write(tmp_path, table("mmmu", [x | {"question": "long" * 200} for x in MMMU]), ["A", "B"] * 30)
    view = open_report(tmp_path / "one_FILE.html", viewport={"width": 360, "height": 640}, color_scheme=scheme)
    assert view.evaluate("document.documentElement.scrollWidth") == 360
    for selector in ("body", ".soft", ".tag.wrong", ".choices button[aria-pressed=true]"):
        assert view.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector


# Of an element's text with what is painted behind it, by WCAG 2.
CONTRAST = """(node) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;
  const behind = [];
  for (let x = node; x; x = x.parentElement) behind.unshift(getComputedStyle(x).backgroundColor);
  const paint = (colours) => { for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); } };
  const light = () => [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((s, v, j) => s + v * [0.2126, 0.7152, 0.0722][j], 0);
  paint(behind);
  const back = light();
  paint([getComputedStyle(node).color]);
  const front = light();
  return (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
}"""


def test_tables_have_headers_and_every_control_a_name(open_report, choices, tmp_path):
    write(tmp_path, choices, TEXTS)
    view = open_report(tmp_path / "one_AI2D_TEST.html")
    assert view.locator("table.bars tbody th[scope=row]").count() == 3
    assert view.locator("table").count() == view.locator("table:has(th[scope=col])").count() == 2
    unnamed = "x => x.filter((e) => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).length"
    assert view.eval_on_selector_all("button, select, input", unnamed) == 0
    assert view.locator("img:not([alt])").count() == 0 and view.locator("[role=img]:not([aria-label])").count() == 0


def test_5349_rows_make_a_page_of_bounded_size():
    rows = [{"answer": "['Some Company, Inc.', 'Some Company']", "question": "What is the name of the company?",
             "split": "val", "images": j // 4} for j in range(5349)]  # fmt: skip
    t = table("docvqa", rows)
    html = page.report(summary(t, ["Other Company of America"] * 5349), t)
    assert len(html.encode()) < 5_000_000 and len(embedded(html)["pictures"]) == page.PICTURES
