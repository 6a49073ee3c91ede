"""The chat page in a real browser: Chromium, headless. Skipped where there is none."""

import base64
import dataclasses
import io
import time

import pytest
from PIL import Image
from serving import alone, serving

from llava_fn.generate import assistant
from llava_fn.generate.conversation import Chat, ask, picture
from llava_fn.generate.options import ChatOptions, Decoding
from llava_fn.serve import engine
from llava_fn.serve.options import Web

PHONE = {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def a(weights):
    return assistant.load(ChatOptions((weights / "vicuna_v1",), device="cpu", context=1024))


@pytest.fixture(scope="module")
def server(a):
    with serving(a, prompt=500, tokens=400, pixels=100_000) as running:
        yield running


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; fails at the end if it asked anybody else, or said anything on the console."""
    asked, said, pages = [], [], []

    def opened(server, wait=True, **more):
        page = browser.new_page(**{"viewport": {"width": 900, "height": 700}} | more)
        page.set_default_timeout(60_000)
        page.on("request", lambda r: asked.append(r.url))
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.goto(server.url)
        if wait:
            until(page, "document.title === 'tiny'")
        page.click("summary")
        page.fill("#temperature", "0")
        page.fill("#tokens", "12")
        pages.append((page, server.url))
        return page

    yield opened
    for page, url in pages:
        assert all(u.startswith((url, "data:")) for u in asked) and len(asked) >= 2
        page.close()
    assert all("Failed to load resource" in text for text in said), said  # that is how it logs a refused request


def until(page, condition):
    """Playwright's own wait_for_function is forbidden by the page's security policy, as it should be."""
    for _ in range(3000):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never so: {condition}")


def answers(page):
    until(page, "document.getElementById('stop').hidden")
    return page.eval_on_selector_all(".answer > p:first-child", "all => all.map((p) => p.textContent)")


def ask_page(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")
    return answers(page)[-1]


def contents(path):
    return base64.b64encode(path.read_bytes()).decode()


GIVE = """([data, how]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
  document.dispatchEvent(how === "paste"
    ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
    : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def files(emojis):
    return sorted((emojis / "images").iterdir())[:3]


def test_a_conversation_about_an_image_is_the_one_of_the_functions(server, a, files, open_page):
    page = open_page(server)
    page.set_input_files("#file", files[0])
    page.wait_for_selector("#thumb img")
    first = ask_page(page, "What is it?")
    chat, d = ask(Chat(), "What is it?", [picture(files[0], a)]), Decoding(tokens=12)
    assert first == alone(a, chat, d).strip() and page.locator(".question img").count() == 1
    assert page.locator("#thumb").is_hidden() and page.input_value("#question") == ""
    after = ask(dataclasses.replace(chat, turns=(*chat.turns, ("gpt", first))), "And why?")
    assert ask_page(page, "And why?") == alone(a, after, d).strip()
    assert page.locator(".state").last.inner_text() == "Cut at the longest answer that was asked for."
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.locator("#empty").is_visible()
    assert ask_page(page, "And why?") == alone(a, ask(Chat(), "And why?"), d).strip()


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_an_image_can_be_pasted_and_dropped(server, a, files, open_page, how):
    page = open_page(server)
    page.evaluate(GIVE, [contents(files[1]), how])
    page.wait_for_selector("#thumb img")
    page.click("#remove")
    assert page.locator("#thumb").is_hidden()
    page.evaluate(GIVE, [contents(files[1]), how])
    page.wait_for_selector("#thumb img")
    page.click("#send")
    assert answers(page) == [alone(a, ask(Chat(), "", [picture(files[1], a)]), Decoding(tokens=12)).strip()]


def test_an_answer_grows_and_can_be_stopped_and_tried_again(server, a, open_page, monkeypatch):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda a, desk: time.sleep(0.03) or step(a, desk))
    page = open_page(server)
    page.fill("#tokens", "300")
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
        page.fill("#question", "Say a lot.")
        page.click("#send")
        until(page, "document.querySelector('.turn:last-child .answer > p').textContent.length > 10")
        assert page.locator("#send").is_hidden() and server.free(3)
        stop()
        until(page, "document.getElementById('stop').hidden")
        assert page.locator(".state").last.inner_text() == "Stopped." and server.free(4)
    whole = alone(a, ask(Chat(), "Say a lot."), Decoding(tokens=12))
    page.click("#new")
    page.fill("#tokens", "300")
    page.fill("#question", "Say a lot.")
    page.press("#question", "Enter")
    page.wait_for_selector("#stop:not([hidden])")
    page.keyboard.press("Escape")
    page.wait_for_selector(".again")
    page.fill("#tokens", "12")
    page.click(".again")
    page.wait_for_selector(".again")
    assert answers(page) == [whole.strip()] and page.locator(".answer").count() == 1


def test_an_error_is_shown_and_the_conversation_goes_on(server, a, files, open_page):
    page, large = open_page(server), io.BytesIO()
    Image.new("1", (1000, 1000)).save(large, "PNG")
    page.set_input_files("#file", {"name": "large.png", "mimeType": "image/png", "buffer": large.getvalue()})
    page.wait_for_selector("#thumb img")
    ask_page(page, "What?")
    assert "over the limit of 100000" in page.locator(".error").inner_text()
    assert ask_page(page, "And why?") == alone(a, ask(Chat(), "And why?"), Decoding(tokens=12)).strip()
    page.set_input_files("#file", {"name": "no.heic", "mimeType": "image/heic", "buffer": b"nothing"})
    page.wait_for_selector("text=no.heic is no image that this browser can open")


def test_a_model_that_captions_is_asked_about_one_image_at_a_time(weights, files, open_page):
    captioner = assistant.load(ChatOptions((weights / "plain",), device="cpu", context=128))
    with serving(captioner, prompt=60, tokens=20) as server:
        page = open_page(server)
        assert "These weights are of stage 1" in page.locator("#note").inner_text()
        for file in files[:2]:
            page.set_input_files("#file", file)
            page.wait_for_selector("#thumb img")
            want = alone(captioner, ask(Chat(), "", [picture(file, captioner)]), Decoding(tokens=12))
            assert ask_page(page, "What is it?") == want.strip()


def test_a_photo_is_turned_as_it_says(server, open_page):
    photo, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 20)).save(photo, "JPEG", exif=exif)
    page = open_page(server)
    page.set_input_files("#file", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo.getvalue()})
    until(page, "document.querySelector('#thumb img').naturalHeight === 40")
    assert page.evaluate("picture.startsWith('data:image/png') && $('thumb').querySelector('img').naturalWidth") == 20


def test_what_people_and_models_write_is_text(server, open_page):
    page = open_page(server)
    ask_page(page, "<img src=x onerror=document.title='gone'><b>bold</b>")
    assert page.locator(".question b, .question img").count() == 0 and page.title() == "tiny"
    assert "<b>bold</b>" in page.locator(".question").inner_text()


def test_a_key_is_asked_for_where_the_server_wants_one(a, open_page):
    with serving(a, key="k1") as server:
        page = open_page(server, wait=False)
        page.wait_for_selector("#api-key")
        ask_page(page, "What?")
        assert "wants an API key" in page.locator(".error").inner_text()
        page.fill("#api-key", "wrong")
        page.press("#api-key", "Tab")
        page.wait_for_selector("text=does not accept this API key")
        page.fill("#api-key", "k1")
        page.click(".again")
        assert answers(page) == [alone(a, ask(Chat(), "What?"), Decoding(tokens=12)).strip()]


def test_a_server_that_is_gone_is_named(a, open_page):
    with serving(a) as server:
        page = open_page(server)
    ask_page(page, "What?")
    assert page.locator(".error").inner_text() == "The server cannot be reached."


def test_the_keyboard_is_enough(server, files, open_page):
    page = open_page(server)
    page.focus("#question")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo" and page.locator(".turn").count() == 0
    page.keyboard.press("Enter")
    answers(page)
    seen = []
    page.focus("#new")
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.className || 'summary'"))
    assert {"again", "question", "file", "summary", "temperature", "tokens"} <= set(seen), seen
    page.locator("#file").focus()
    assert page.evaluate("getComputedStyle(document.querySelector('label.button')).outlineStyle") == "solid"


LUMINANCE = """(node) => {
  const channel = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let behind = node;
  while (/, 0\\)$/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const pair = [light(getComputedStyle(node).color), light(getComputedStyle(behind).backgroundColor)];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone_in_light_and_dark(server, files, open_page, scheme, tmp_path):
    page = open_page(server, viewport=PHONE, color_scheme=scheme, has_touch=True)
    page.set_input_files("#file", files[0])
    page.wait_for_selector("#thumb img")
    ask_page(page, "What is a word that never ends: " + "abcdefghij" * 12)
    ask_page(page, "<image>")
    page.wait_for_selector(".error")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth && $('log').scrollWidth <= innerWidth")
    assert page.evaluate("$('log').scrollHeight - $('log').scrollTop - $('log').clientHeight") < 2
    for selector in ("#model", "#new", ".question p", ".answer p", ".error", ".state", "#send", "summary", "#question"):
        assert page.locator(selector).first.evaluate(LUMINANCE) >= 4.5, selector
    for selector in ("#new", "#send", ".again", "label.button"):
        assert page.locator(selector).bounding_box()["height"] >= 40
    page.screenshot(path=tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        corner = shot.convert("L").getpixel((2, 2))
        assert shot.size == (360, 640) and (corner > 240 if scheme == "light" else corner < 40)


def test_the_page_asks_below_the_path_of_a_proxy(a, open_page):
    with serving(a, web=Web(root_path="/llava"), prompt=500, tokens=400) as running:
        page = open_page(dataclasses.replace(running, url=f"{running.url}/llava/"))
        page.fill("#question", "Say a word.")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('.answer p')?.className === ''")
        said = page.inner_text(".answer p")
    assert said == alone(a, ask(Chat(), "Say a word."), Decoding(tokens=12)).strip()
