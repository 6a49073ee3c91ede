"""The server over HTTP, asked by the real openai client, by raw sockets, and by clients that misbehave."""

import asyncio
import dataclasses
import io
import json
import re
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from PIL import Image
from serving import alone, part, serving, start, steps_take, text, user
from warm import ENV, recipe, until

from llava_fn.data.templates import TEMPLATES
from llava_fn.data.text import render
from llava_fn.errors import BadRecord
from llava_fn.generate import assistant, conversation
from llava_fn.generate.conversation import Chat, ask, picture
from llava_fn.generate.options import ChatOptions, Decoding
from llava_fn.serve import answer, app, engine, messages
from llava_fn.serve import ask as ask_of
from llava_fn.serve.worker import Worker

ROOT = Path(__file__).parents[2]
serve = recipe("serve")
HI = [{"role": "user", "content": "Say a word or two."}]
SAID = ask(Chat(), "Say a word or two.")


@pytest.fixture(scope="module")
def a(weights):
    return assistant.load(ChatOptions((weights / "vicuna_v1",), device="cpu", context=1024))


@pytest.fixture(scope="module")
def server(a):
    with serving(a, prompt=500, tokens=400, samples=3, body=300_000, pixels=100_000) as running:
        yield running


@pytest.fixture(scope="module")
def files(emojis):
    return sorted((emojis / "images").iterdir())[:3]


def create(server, messages=HI, **more):
    return server.client().chat.completions.create(
        model="tiny", messages=messages, **({"temperature": 0, "max_tokens": 12} | more)
    )


def test_models(server):
    (model,) = server.client().models.list().data
    assert model.id == "tiny" and server.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        server.client().models.retrieve("other")


def test_an_answer_is_that_of_the_functions(server, a):
    for tokens in (1, 12, 40):
        got = create(server, max_completion_tokens=tokens, max_tokens=None)
        (choice,) = got.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == alone(a, SAID, Decoding(tokens=tokens))
        assert choice.finish_reason == "length" and got.usage.completion_tokens == tokens
        prompt = conversation.prompt(a, SAID, Decoding(tokens=1))[1]
        assert got.usage.prompt_tokens == len(prompt) and got.usage.total_tokens == len(prompt) + tokens


def test_a_stream_brings_the_same_answer(server, a):
    chunks = list(create(server, stream=True, max_tokens=40, stream_options={"include_usage": True}))
    assert len(chunks) > 20 and len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == alone(a, SAID, Decoding(tokens=40))
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert all(c.usage is None for c in chunks[:-1])
    assert all(c.choices for c in create(server, stream=True))


def test_images_reach_the_model_in_their_places(server, a, files):
    one, two, three = (part(f.read_bytes()) for f in files)
    shots = [picture(f, a) for f in files]
    d = Decoding(tokens=12)
    got = [create(server, [user(image, text("What?"))]).choices[0].message.content for image in (one, two, three)]
    assert got == [alone(a, ask(Chat(), "What?", [shot]), d) for shot in shots] and len(set(got)) > 1
    after = create(server, [user(text("What?"), one)])
    assert after.choices[0].message.content == got[0]
    both = create(server, [user(text("Is"), two, text("like"), one, text("?"))])
    want = ask(Chat(), "Is\n<image>\nlike\n<image>\n?", [shots[1], shots[0]])
    assert both.choices[0].message.content == alone(a, want, d)


def test_turns_and_a_system_prompt(server, a, files):
    shot = picture(files[0], a)
    turns = [user(part(files[0].read_bytes()), text("What?")), {"role": "assistant", "content": "A cat"}]
    got = create(server, [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "And?"}])
    chat = ask(Chat(system="Be brief."), "What?", [shot])
    chat = ask(dataclasses.replace(chat, turns=(*chat.turns, ("gpt", "A cat"))), "And?")
    assert got.choices[0].message.content == alone(a, chat, Decoding(tokens=12))
    assert got.usage.prompt_tokens == len(conversation.prompt(a, _featured(a, chat), Decoding())[1])
    assert got.usage.prompt_tokens < create(server, [*turns, HI[0]]).usage.prompt_tokens


def _featured(a, chat):
    return dataclasses.replace(chat, feats=conversation.features(a, chat.pictures, {}))


PLACES = {
    "vicuna_v1": "{} USER: Hi ASSISTANT:",
    "hf": "{} USER: Hi ASSISTANT:",
    "llava_v0": "{}###Human: Hi###Assistant:",
    "llava_llama_2": "[INST] <<SYS>>\n{}\n<</SYS>>\n\nHi [/INST]",
    "mpt": "<|im_start|>system\n{}<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_system_prompt_takes_the_place_of_the_templates_own(name):
    template, turns = TEMPLATES[name], (("human", "Hi"),)
    assert render(turns, template.with_system("Be brief.")) == PLACES[name].format("Be brief.")
    before, _, after = render(turns, template.with_system("@")).partition("@")
    own = render(turns, template).removeprefix(before).removesuffix(after)
    assert name == "hf" or template.with_system(own) == template
    assert render(turns, template.with_system("")).startswith(template.next.removeprefix("<s>"))


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_template_takes_a_system_prompt_or_says_that_it_has_no_place_for_one(name):
    if name in ("plain", "v0_plain", "mistral_instruct"):
        with pytest.raises(BadRecord, match="no place for a system prompt"):
            TEMPLATES[name].with_system("x")
    else:
        assert "@" in render((("human", "Hi"),), TEMPLATES[name].with_system("@"))


def test_a_model_that_captions_wants_one_image_and_nothing_before(weights, files):
    captioner = assistant.load(ChatOptions((weights / "plain",), device="cpu", context=128))
    image, shot = part(files[0].read_bytes()), picture(files[0], captioner)
    with serving(captioner, prompt=60, tokens=20) as server:
        want = alone(captioner, ask(Chat(), "", [shot]), Decoding(tokens=12))
        for said in ([], [text("What is it?")]):
            assert create(server, [user(image, *said)]).choices[0].message.content == want
        for bad in (HI, [user(image, image)], [user(image), {"role": "assistant", "content": "A"}, user(image)]):
            with pytest.raises(openai.BadRequestError, match="writes a caption for an image: send one image"):
                create(server, bad)


def test_stop_texts(server, a):
    free = alone(a, SAID, Decoding(tokens=40))
    stop = free[5:7]
    for more in ({"stop": stop}, {"stop": ["never to be seen", stop]}):
        (choice,) = create(server, max_tokens=40, **more).choices
        assert choice.message.content == free[: free.index(stop)] and choice.finish_reason == "stop"
        chunks = list(create(server, max_tokens=40, stream=True, **more))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content


def test_samples_have_their_own_seeds(server, a):
    d = Decoding(tokens=12, temperature=1.5)
    want = [alone(a, SAID, dataclasses.replace(d, seed=s)) for s in (7, 8, 9)]
    got = create(server, n=3, temperature=1.5, seed=7)
    assert [c.message.content for c in got.choices] == want and [c.index for c in got.choices] == [0, 1, 2]
    assert got.usage.completion_tokens == 36 and len(set(want)) == 3
    texts = ["", "", ""]
    for chunk in create(server, n=3, temperature=1.5, seed=7, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == want
    narrow = dataclasses.replace(d, top_p=0.5, seed=7)
    assert create(server, temperature=1.5, seed=7, top_p=0.5).choices[0].message.content == alone(a, SAID, narrow)


def test_without_a_seed_and_a_temperature_answers_differ(server):
    client = server.client().chat.completions
    got = {client.create(model="tiny", messages=HI, max_tokens=20).choices[0].message.content for _ in range(4)}
    assert len(got) > 1


def test_log_probabilities_of_each_token(server, a):
    chat = dataclasses.replace(SAID)
    ((want,),) = conversation.answers(a, [chat], Decoding(tokens=12, logprobs=True))
    said = create(server, logprobs=True).choices[0].logprobs.content
    assert [t.logprob for t in said] == pytest.approx(want.logprobs, abs=1e-4)
    assert "".join(t.token for t in said).removeprefix(" ") == want.text
    chunks = [c for c in create(server, logprobs=True, stream=True) if c.choices[0].logprobs]
    assert [t.logprob for c in chunks for t in c.choices[0].logprobs.content] == pytest.approx(want.logprobs, abs=1e-4)
    assert create(server).choices[0].logprobs is None


def test_an_answer_without_a_limit_ends_at_the_servers(server):
    got = server.client().chat.completions.create(model="tiny", messages=HI, temperature=1.3, seed=1)
    assert got.choices[0].finish_reason == "stop" or got.usage.completion_tokens == 400


def post(server, body, path="/v1/chat/completions", **headers):
    status, _, answer = server.post(body, path, **headers)
    return status, answer


def png(width, height):
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


def with_image(url, **more):
    return {"messages": [user(text("What?"), {"type": "image_url", "image_url": {"url": url} | more})]}


BAD = {
    "penalty": ({"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported", "frequency_penalty"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools is not supported", "tools"),
    "JSON answers": ({"response_format": {"type": "json_object"}}, 400, "not supported", "response_format"),
    "top_logprobs": ({"top_logprobs": 3}, 400, "goes with logprobs", "top_logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "from 0 to 20", "top_logprobs"),
    "model": ({"model": "gpt-4"}, 404, "no model 'gpt-4'; this server has 'tiny'", "model"),
    "no model": ({"model": None}, 400, "model is missing", "model"),
    "no messages": ({"messages": None}, 400, "messages is missing", "messages"),
    "empty messages": ({"messages": []}, 400, "empty", "messages"),
    "messages": ({"messages": "hi"}, 400, "messages must be a list", "messages"),
    "message": ({"messages": ["hi"]}, 400, "messages[0] is an object", "messages"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, 'role "tool"', "messages"),
    "extra": ({"messages": [HI[0] | {"name": "Bo"}]}, 400, "messages[0]: name is not supported", "messages"),
    "content": ({"messages": [{"role": "user", "content": 7}]}, 400, "content is a text or a list", "messages"),
    "audio": ({"messages": [user({"type": "input_audio"})]}, 400, "messages[0].content[0]: a part is", "messages"),
    "two questions": ({"messages": HI * 2}, 400, "turns alternate", "messages"),
    "late system": ({"messages": [*HI, {"role": "system", "content": "x"}]}, 400, "is the first one", "messages"),
    "system mark": ({"messages": [{"role": "system", "content": "</s>"}, *HI]}, 400, "holds '</s>'", "messages"),
    "mark": ({"messages": [user(text("<image> what"))]}, 400, "holds '<image>'", "messages"),
    "surrogate": ({"messages": [user(text("\ud800"))]}, 400, "not valid Unicode", "messages"),
    "empty": ({"messages": [user(text(" "))]}, 400, "is empty", "messages"),
    "n": ({"n": 4, "temperature": 1}, 400, "at most 3 answers", "n"),
    "n 0": ({"n": 0}, 400, "n must be", "n"),
    "greedy n": ({"n": 2, "temperature": 0}, 400, "n=2 without a temperature", "n"),
    "max_tokens": ({"max_tokens": 401}, 400, "at most 400", "max_tokens"),
    "both lengths": ({"max_tokens": 4, "max_completion_tokens": 5}, 400, "one and the same", "max_tokens"),
    "temperature": ({"temperature": 2.5}, 400, "temperature must be from 0 to 2, not 2.5", "temperature"),
    "cold": ({"temperature": 1e-9}, 400, "temperature must be 0, or at least 0.01, not 1e-09", "temperature"),
    "warm text": ({"temperature": "hot"}, 400, 'not "hot"', "temperature"),
    "cold false": ({"temperature": False}, 400, "not false", "temperature"),
    "true": ({"max_tokens": True}, 400, "not true", "max_tokens"),
    "top_p": ({"top_p": 0}, 400, "top_p must be above 0", "top_p"),
    "seed": ({"seed": 2**64}, 400, "seed must be", "seed"),
    "min_p": ({"min_p": 1.1}, 400, "min_p must be from 0 to 1", "min_p"),
    "top_k": ({"top_k": -2}, 400, "top_k must be", "top_k"),
    "top_k 1.5": ({"top_k": 1.5}, 400, "top_k must be a whole number", "top_k"),
    "repetition_penalty": ({"repetition_penalty": 0}, 400, "must be from 0.01", "repetition_penalty"),
    "stop": ({"stop": ["a", ""]}, 400, "none empty", "stop"),
    "stop surrogate": ({"stop": "\ud800"}, 400, "stop must be in Unicode", "stop"),
    "many messages": ({"messages": HI * 501}, 400, "501 messages, more than a prompt of 500 tokens", "messages"),
    "unknown fields": ({f"field_{i}": 1 for i in range(999)}, 400, '999 unknown fields, the first "field_0"', None),
    "stops": ({"stop": list("abcde")}, 400, "up to 4", "stop"),
    "stream": ({"stream": 1}, 400, "stream must be true or false", "stream"),
    "options": ({"stream_options": {"include_usage": True}}, 400, "goes with stream", "stream_options"),
    "usage": ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "include_usage", "stream_options"),
    "long": ({"messages": [user(text("word " * 150))]}, 400, "over this server's limit of 500", "messages"),
    "longer": ({"messages": [user(text("word " * 6401))]}, 400, "32005 characters, over what 500 tokens", "messages"),
    "too long": ({"messages": [user(text("word " * 4000))]}, 400, "over the context of 1024", "messages"),
    "http": (with_image("http://127.0.0.1:9/x.png"), 400, "a data URL only", "messages"),
    "https": (with_image("https://example.com/x.png"), 400, "fetches no address", "messages"),
    "file": (with_image("file:///etc/passwd"), 400, "opens no path", "messages"),
    "path": (with_image("/etc/passwd"), 400, "opens no path", "messages"),
    "base64": (with_image("data:image/png;base64,@@@"), 400, "messages[0], image 0: no base64", "messages"),
    "not base64": (with_image("data:image/png,abc"), 400, "a data URL begins with", "messages"),
    "no image": (with_image("data:image/png;base64,aGVsbG8="), 400, "not one of JPEG", "messages"),
    "no URL": (with_image(7), 400, "a data URL only", "messages"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_answered_is_refused_and_says_why(server, case):
    more, status, message, param = BAD[case]
    body = {"model": "tiny", "messages": HI, "max_tokens": 3} | more
    got, answer = post(server, body)
    assert (got, answer["error"]["param"]) == (status, param), answer
    assert message in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


BROKEN = [b"", b"[1]", b"{", b'{"seed": NaN}', b"\xff", b'{"a":' * 50_000, b'{"seed": 1, "seed": 2}']


@pytest.mark.parametrize("body", BROKEN)
def test_a_body_that_is_no_json_object_is_refused(server, body):
    status, answer = post(server, body)
    assert status == 400 and "body is" in answer["error"]["message"]


def test_what_is_nested_too_deeply_to_be_shown_is_refused():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadRecord, match="messages.0. is an object .* not what is nested so deeply"):
        messages.read([deep], ask_of.Limits())


def test_a_large_image_is_refused_before_it_is_decoded(server, a):
    size, small = struct.pack(">II", 20_000, 10_000), png(2, 2)
    header = b"IHDR" + size + small[24:29]
    huge = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(openai.BadRequestError, match="image 0: over the limit of 100000 pixels .*200000000"):
        create(server, [user(part(huge))])
    with pytest.raises(openai.BadRequestError, match="more than the 125 images"):
        create(server, [user(*[part(png(2, 2))] * 126)])
    assert create(server, [user(part(png(400, 250)), text("What?"))]).choices


def test_a_large_body_is_refused_however_it_is_sent(server):
    status, answer = post(server, {"model": "tiny", "messages": [user(text("x" * 300_000))]})
    assert status == 413 and "limit of 300000 bytes" in answer["error"]["message"]
    with raw(server) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        for _ in range(40):
            sock.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        assert b" 413 " in sock.recv(100)
    with raw(server) as sock:
        sock.sendall(request().replace(b"Content-Length: ", b"Content-Length: 99999999"))
        assert b" 413 " in sock.recv(100)


def test_a_client_that_is_still_sending_hears_why_it_is_refused(server):
    with pytest.raises(openai.APIStatusError, match="limit of 300000 bytes") as error:
        create(server, [user(text("x" * 2_000_000))])
    assert error.value.status_code == 413


def test_only_so_many_requests_are_read_at_a_time(a):
    with serving(a, queue=2) as server:
        with raw(server) as one, raw(server) as two:
            one.sendall(request()[:-5])
            two.sendall(request()[:-5])
            assert until(lambda: len(server.service.reading) == 2)
            with pytest.raises(openai.RateLimitError, match="2 requests are being read"):
                create(server)
        assert until(lambda: not server.service.reading)
        assert create(server).choices


def test_requests_that_are_read_together_hold_so_many_bytes(a):
    with serving(a, bodies=1100) as server:
        with raw(server) as one:
            one.sendall(request(user="x" * 900)[:-5])
            assert until(lambda: sum(server.service.reading.values()) > 900)
            with pytest.raises(openai.RateLimitError, match="fill this server's memory"):
                create(server)
        assert until(lambda: not server.service.reading)
        assert create(server).choices


def test_errors_start_no_threads(server):
    post(server, {}, "/v1/embeddings")
    before = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: post(server, {}, "/v1/embeddings")[0], range(40))) == {404}
    assert threading.active_count() <= before


def raw(server):
    sock = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    sock.settimeout(30)
    return sock


def request(**more):
    body = json.dumps({"model": "tiny", "messages": HI, "temperature": 1, "seed": 1, "max_tokens": 400} | more).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


def test_pages_of_other_sites_cannot_ask(server):
    body = {"model": "tiny", "messages": HI}
    assert post(server, body, Content_Type="text/plain")[0] == 415
    with pytest.raises(json.JSONDecodeError):
        post(server, body, Host="evil.example")
    assert post(server, body, Host="localhost:80")[0] == 200


def test_other_routes_and_methods_are_errors_in_json(server):
    assert post(server, {}, "/v1/embeddings")[0] == 404 and post(server, {}, "/v1/models")[0] == 405
    assert "see /v1/models" in post(server, {}, "/v1/embeddings")[1]["error"]["message"]


def test_a_key_is_wanted_where_there_is_one(a):
    with serving(a, key="geheim\u00e9") as server:
        for ask_for in (lambda c: c.models.list(), lambda c: c.models.retrieve("tiny"), lambda c: create(server)):
            with pytest.raises(openai.AuthenticationError, match="wants its API key"):
                ask_for(server.client("geheim"))
        body = {"model": "tiny", "messages": HI, "max_tokens": 2}
        keys = {"geheim": 401, "geheim\u00e9x": 401, "\u00e9": 401, "": 401, "geheim\u00e9": 200}
        for key, status in keys.items():
            header = f"Bearer {key}".encode().decode("latin-1")
            assert post(server, body, Authorization=header)[0] == status, key
        for path in ("/", "/health"):
            assert urllib.request.urlopen(server.url + path).status == 200


def test_64_clients_at_once_are_all_answered(server, a, files):
    shots, parts = [picture(f, a) for f in files], [part(f.read_bytes()) for f in files]
    chats = [ask(Chat(), f"Say {j}.", shots[: j % 3]) for j in range(8)]
    bodies = [[user(*parts[: j % 3], text(f"Say {j}."))] for j in range(8)]
    want = [alone(a, chat, Decoding(tokens=9)) for chat in chats]
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)

    async def everybody():
        one = client.chat.completions.create
        return await asyncio.gather(
            *(one(model="tiny", messages=bodies[j % 8], temperature=0, max_tokens=9) for j in range(64))
        )

    got = [r.choices[0].message.content for r in asyncio.run(everybody())]
    assert got == want * 8 and len(set(want)) > 3
    assert server.free(4)


def slowly(monkeypatch, seconds):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda a, desk: time.sleep(seconds) or step(a, desk))


def test_too_many_waiting_requests_are_told_to_come_again(a, monkeypatch):
    slowly(monkeypatch, 0.1)  # the four must not end before the others have come, however busy the machine
    with serving(a, queue=2) as server, ThreadPoolExecutor(12) as pool:
        streams = []
        for left in (3, 2, 1, 0):  # one after another: three that wait for the same step would be one too many
            streams.append(create(server, stream=True, max_tokens=200))
            assert server.free(left)
        waiting = [pool.submit(create, server) for _ in range(2)]
        assert server.free(0, 2)
        with pytest.raises(openai.RateLimitError, match="2 requests are waiting") as error:
            create(server)
        assert error.value.response.headers["retry-after"] == "1" and error.value.status_code == 429
        for stream in streams:
            stream.close()
        assert all(w.result().choices for w in waiting)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(server, monkeypatch, stream):
    slowly(monkeypatch, 0.1)
    with raw(server) as sock:
        sock.sendall(request(stream=stream, n=3))
        assert server.free(1)
    assert server.free(4)  # `free` gives up long before 400 steps could end


def test_a_client_that_never_reads_stalls_nobody(server, a):
    with raw(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.sendall(request(stream=True, n=3, logprobs=True, max_tokens=200))
        assert create(server).choices[0].message.content == alone(a, SAID, Decoding(tokens=12))
        assert server.free(4)


def test_an_answer_that_cannot_be_sent_is_given_up_in_time(server, monkeypatch):
    monkeypatch.setattr(app, "SENDING", 0.2)
    offer = server.service.offer
    offer = dataclasses.replace(offer, limits=dataclasses.replace(offer.limits, seconds=0.2))
    s = dataclasses.replace(server.service, offer=offer)
    parts = [{"type": "http.request", "body": request(stream=True).partition(b"\r\n\r\n")[2], "more_body": False}]

    async def never(*_):
        await asyncio.Event().wait()

    async def receive():
        return parts.pop() if parts else await never()

    async def main():
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}
        reply = await app.complete(s, ask_of.chat, answer.CHAT, app.Request(scope, receive))
        await asyncio.wait_for(reply(scope, receive, never), 60)
        assert await asyncio.to_thread(server.free, 4)  # the loop must be there for what the worker has under way

    asyncio.run(main())


def test_a_request_has_so_much_time(a, monkeypatch):
    steps_take(monkeypatch, 5)
    with serving(a, seconds=100) as server:
        with pytest.raises(openai.APIStatusError, match="within this server's limit of 100 seconds") as error:
            create(server, max_tokens=300)
        assert error.value.status_code == 504
        got = ""
        with pytest.raises(openai.APIError, match="limit of 100 seconds"):
            for chunk in create(server, max_tokens=300, stream=True):
                got += chunk.choices[0].delta.content or ""
        assert got and server.free(4)
    with serving(a, seconds=0.1) as server, raw(server) as sock:
        sock.sendall(request()[:-20])
        assert b" 408 " in sock.recv(100)


def test_health_says_when_the_model_has_failed(a, monkeypatch):
    with serving(a) as server:
        assert json.load(urllib.request.urlopen(server.url + "/health"))["status"] == "ok"
        monkeypatch.setattr(engine, "step", lambda a, desk: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the model has failed"):
            create(server)
        with pytest.raises(openai.InternalServerError) as error:
            create(server)
        assert error.value.status_code == 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(server.url + "/health")


def test_the_recipe_lets_answers_finish_when_a_signal_comes_and_ends_with_0(weights, warm, tmp_path):
    command = f"python {ROOT}/recipes/serve.py --weights {weights}/vicuna_v1"
    server = start(warm, command, tmp_path, ENV)
    assert server.told.startswith("vicuna_v1: http://127.0.0.1:")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0).chat.completions
    stream = client.create(model="vicuna_v1", messages=HI, max_tokens=60, temperature=2, seed=1, stream=True)
    next(stream)
    with raw(server) as unread:
        unread.sendall(request(model="vicuna_v1", stream=True, max_tokens=150))
        with ThreadPoolExecutor() as pool:
            ended = pool.submit(server.end, signal.SIGTERM)
            assert list(stream)[-1].choices[0].finish_reason
            status, out, err = ended.result(60)
            assert (status, out) == (0, server.told + "\n")
            assert re.fullmatch(r"8 slots, a cache of 32768 tokens: \d+\.\d\d GiB; warmed up in \d+\.\d s\n", err)


def test_the_recipe_refuses_what_it_cannot_do(weights):
    model = ChatOptions((weights / "vicuna_v1",), device="cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="cannot listen on 127.0.0.1:.* give another --port"):
            serve.main(serve.Serve(model, port=taken.getsockname()[1]))
    with pytest.raises(ValueError, match="--api-key is empty"):
        serve.Serve(model, api_key="")
    with pytest.raises(ValueError, match="port=70000: must be from 0"):
        serve.Serve(model, port=70_000)
    with pytest.raises(ValueError, match="limits.queue=0: must be above 0"):
        serve.Limits(queue=0)
    with pytest.raises(ValueError, match="limits.pixels=100000000: must be at most"):
        serve.Limits(pixels=100_000_000)


def test_the_recipe_fails_with_the_model_and_warns_of_an_open_door(weights, monkeypatch, capsys):
    model = ChatOptions((weights / "plain",), device="cpu")
    monkeypatch.setattr(Worker, "start", lambda w: setattr(w, "error", ValueError("lost")) or threading.Timer(
        0.5, w._on_crash).start())  # fmt: skip
    monkeypatch.setattr(Worker, "stop", lambda w: None)
    with pytest.raises(ValueError, match="the model failed: ValueError..lost"):
        serve.main(serve.Serve(model, web=serve.Web(host="127.0.0.2"), port=0))
    said = capsys.readouterr()
    assert "anybody who reaches 127.0.0.2" in said.err and "stage 1" in said.err
    assert said.out.startswith("plain: http://127.0.0.2:")
