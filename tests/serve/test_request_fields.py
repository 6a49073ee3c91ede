"""Every field of a request: what decides the answer, what cannot change it, what is refused, what nobody here knows."""

import base64
import dataclasses
import json
import logging
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serving import alone, data_url, part, serving, text, user

from llava_fn.data.text import prompt as prompt_ids
from llava_fn.data.text import raw as raw_ids
from llava_fn.data.text import render
from llava_fn.errors import BadRecord
from llava_fn.generate import assistant, conversation, decode
from llava_fn.generate.conversation import Chat, ask, picture, text_of
from llava_fn.generate.family import Family
from llava_fn.generate.options import ChatOptions, Decoding
from llava_fn.generate.sampling import uniforms
from llava_fn.generate.types import Vocabulary
from llava_fn.serve import answer, fields
from llava_fn.serve.ask import Offer, completion
from llava_fn.serve.fields import CHAT, COMPLETION
from llava_fn.serve.options import Limits
from llava_fn.serve.refused import Refused

HI = [{"role": "user", "content": "Say a word or two."}]
SAID = ask(Chat(), "Say a word or two.")
BODY = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def a(weights):
    return assistant.load(ChatOptions((weights / "vicuna_v1",), device="cpu", context=512))


@pytest.fixture(scope="module")
def server(a):
    with serving(a, prompt=300, tokens=100, samples=4) as running:
        yield running


@pytest.fixture(scope="module")
def strict(a):
    with serving(a, strict=True, prompt=300, tokens=100, samples=4) as running:
        yield running


@pytest.fixture(scope="module")
def image(emojis):
    return sorted((emojis / "images").iterdir())[0]


def content(answer):
    return answer["choices"][0]["message"]["content"]


UNUSED = {  # as clients send them
    "user": "u1", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "parallel_tool_calls": False,
    "tool_choice": "none", "safety_identifier": "x", "prompt_cache_key": "k", "priority": 3, "stream_interval": 5,
    "top_p": 0.5, "top_k": 3, "min_p": 0.2, "length_penalty": 2, "tools": [], "response_format": {"type": "text"},
    "modalities": ["text"], "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0, "top_logprobs": 0,
    "reasoning_effort": "none", "skip_special_tokens": True, "seed": 5, "max_completion_tokens": 12, "stop": [],
    "guided_json": None, "n": 1.0, "repetition_penalty": 1.0, "function_call": "auto",
}  # fmt: skip


@pytest.mark.parametrize("served", ["server", "strict"])
def test_what_cannot_change_the_answer_is_accepted(served, a, request):
    status, headers, answer = request.getfixturevalue(served).post(BODY | UNUSED)
    assert status == 200 and "x-ignored-fields" not in headers, answer
    assert content(answer) == alone(a, SAID, Decoding(tokens=12))


@pytest.mark.parametrize("detail", ["low", "high", "auto", "original"])
def test_the_detail_of_an_image_is_accepted_since_there_is_one_size(server, a, image, detail):
    shot = part(image.read_bytes())
    shot["image_url"]["detail"] = detail
    status, headers, answer = server.post(BODY | {"messages": [user(shot, text("What?"))]})
    assert status == 200 and "x-ignored-fields" not in headers
    assert content(answer) == alone(a, ask(Chat(), "What?", [picture(image, a)]), Decoding(tokens=12))


WANTED = {  # a value that would change the answer, of each field that is known and not there
    "frequency_penalty": 0.5, "presence_penalty": -1, "min_tokens": 4, "logit_bias": {"5": 2}, "vllm_xargs": {"a": 1},
    "stop_token_ids": [5], "bad_words": ["no"], "allowed_token_ids": [4], "use_beam_search": True, "watermarking": True,
    "include_stop_str_in_output": True, "ignore_eos": True, "echo": True, "return_tokens_as_token_ids": True,
    "return_token_ids": True, "skip_special_tokens": False, "thinking_token_budget": 5,
    "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}, "guided_json": {},
    "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "a", "guided_decoding_backend": "x",
    "guided_whitespace_pattern": " ", "json_schema": {}, "grammar": "a", "regex": "a", "ebnf": "a",
    "truncate_prompt_tokens": 5, "prompt_logprobs": 1, "logprob_token_ids": [3], "repetition_detection": {},
    "cache_salt": "s", "kv_transfer_params": {}, "ec_transfer_params": {}, "routed_experts_prompt_start": 1,
}  # fmt: skip
WANTED_OF_CHAT = {
    "tools": [{"type": "function"}], "functions": [{"name": "f"}], "tool_choice": "required", "documents": [{}],
    "function_call": {"name": "f"}, "modalities": ["text", "audio"], "reasoning_effort": "high", "verbosity": "low",
    "add_special_tokens": True, "return_prompt_text": True, "chat_template_kwargs": {"a": 1}, "prompt": "x",
    "media_io_kwargs": {"a": 1}, "mm_processor_kwargs": {"a": 1}, "audio": {"voice": "x"}, "moderation": {},
    "prediction": {"type": "content"}, "web_search_options": {}, "chat_template": "{{x}}",
}  # fmt: skip
WANTED_OF_COMPLETION = {
    "best_of": 2, "suffix": "x", "add_special_tokens": False, "prompt_embeds": "x", "messages": HI,
}  # fmt: skip


@pytest.mark.parametrize(
    "table, wanted", [(CHAT, WANTED | WANTED_OF_CHAT), (COMPLETION, WANTED | WANTED_OF_COMPLETION)]
)
def test_what_would_change_the_answer_and_is_not_there_is_refused_by_name(table, wanted):
    begin = {"model": "tiny", "messages" if table is CHAT else "prompt": HI if table is CHAT else "x"}
    for name, value in wanted.items():
        with pytest.raises(Refused, match=f"^{name} is not supported; leave it out") as error:
            fields.request(json.dumps({name: value} | {k: v for k, v in begin.items() if k != name}).encode(), table)
        assert (error.value.status, error.value.param) == (400, name)
    silent = {name for name, check in table.items() if "off." in getattr(check, "__qualname__", "")}
    assert silent == wanted.keys()


def test_false_is_no_number_and_0_is_not_false():
    for nothing, value in ((0, False), (False, 0), (1, True)):
        with pytest.raises(BadRecord, match="is not supported; leave it out, or give"):
            fields.off(nothing)(value)
        fields.off(nothing)(nothing)


def test_a_field_that_is_off_is_refused_whether_the_server_is_strict_or_not(server, strict):
    for running in (server, strict):
        status, _, answer = running.post(BODY | {"tools": [{"type": "function"}]})
        assert status == 400 and answer["error"]["param"] == "tools"
        message = answer["error"]["message"]
        assert message == "tools is not supported; leave it out, or give []"


FOREIGN = {"do_sample": True, "chat_id": "c", "session_id": "s", "features": {"web_search": False}, "keep_alive": "5m",
           "options": {"num_ctx": 4096}, "bad\r\nX-Evil: 1": 1, "\ud800": 1}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_fields_of_other_servers_are_named_in_a_header_and_in_the_log(server, a, caplog, stream):
    body = BODY | FOREIGN | {"messages": [HI[0] | {"timestamp": 17, "id": "m1"}], "stream": stream}
    with caplog.at_level(logging.WARNING, "llava_fn.serve"):
        headers, said = server.stream(body) if stream else server.post(body)[1:]
    assert (said if stream else content(said)) == alone(a, SAID, Decoding(tokens=12))
    named = [urllib.parse.unquote(n, errors="surrogatepass") for n in headers["x-ignored-fields"].split(", ")]
    assert named == [*FOREIGN, "messages.timestamp", "messages.id"] and "x-evil" not in headers
    (line,) = caplog.messages
    assert "ignored fields: ('do_sample', 'chat_id'" in line and "\n" not in line


def test_a_strict_server_refuses_fields_that_it_does_not_know(strict):
    for more, name in (
        ({"do_sample": True}, "do_sample"),
        ({"messages": [HI[0] | {"timestamp": 17}]}, "messages.timestamp"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": [user(text("What?") | {"x": 1})]}, "messages.content.x"),
    ):
        status, _, answer = strict.post(BODY | more)
        assert status == 400 and f"unknown field '{name}'" in answer["error"]["message"]
        assert "--strict" in answer["error"]["message"] and answer["error"]["param"] == name


WAYS = {  # of writing one PNG
    "lines": lambda data: "data:image/png;base64," + base64.encodebytes(data).decode(),
    "CRLF": lambda data: "data:image/png;base64," + base64.encodebytes(data).decode().replace("\n", "\r\n"),
    "URL-safe": lambda data: "data:image/png;base64," + base64.urlsafe_b64encode(data).decode(),
    "no padding": lambda data: "data:image/png;base64," + base64.urlsafe_b64encode(data).decode().rstrip("="),
    "escaped": lambda data: "data:image/png;base64," + urllib.parse.quote(base64.b64encode(data).decode(), safe=""),
    "upper case": lambda data: "DATA:image/PNG;BASE64," + base64.b64encode(data).decode(),
    "parameter": lambda data: "data:image/png;name=a.png;base64," + base64.b64encode(data).decode(),
}


@pytest.fixture(scope="module")
def awkward(image):
    """A PNG whose base64 has both letters that differ in the alphabet of URLs, and padding."""
    for n in range(200):
        data = image.read_bytes() + b"\xfb\xef\xbe\xff\xff\xff" + bytes(n)
        if {"+", "/", "="} <= set(base64.b64encode(data).decode()):
            return data
    raise AssertionError


@pytest.mark.parametrize("way", WAYS)
def test_images_are_decoded_however_their_base64_is_written(server, a, awkward, way):
    shot = {"type": "image_url", "image_url": {"url": WAYS[way](awkward)}}
    status, _, answer = server.post(BODY | {"messages": [user(shot, text("What?"))]})
    assert status == 200, answer
    assert content(answer) == alone(a, ask(Chat(), "What?", [picture(awkward, a)]), Decoding(tokens=12))


def test_parts_are_read_in_the_words_of_the_responses_api_too(server, a, image):
    url = data_url(image.read_bytes())
    want = alone(a, ask(Chat(), "What?", [picture(image, a)]), Decoding(tokens=12))
    for parts in (
        [{"type": "image_url", "image_url": url}, text("What?")],
        [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": "What?"}],
        [{"type": "input_image", "image_url": {"url": url}}, text("What?") | {"cache_control": {"type": "ephemeral"}}],
    ):
        status, headers, answer = server.post(BODY | {"messages": [user(*parts)]})
        assert status == 200 and "x-ignored-fields" not in headers, answer
        assert content(answer) == want


OPTIONS = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.5, "top_k": 2, "seed": 2},
    {"temperature": 1.5, "top_k": -1, "seed": 3},
    {"temperature": 2.0, "min_p": 0.3, "seed": 4},
    {"temperature": 0.7, "top_p": 0.6, "top_k": 9, "min_p": 0.01, "seed": 5},
    {"temperature": 0, "repetition_penalty": 1.8},
    {"temperature": 1.5, "repetition_penalty": 0.5, "seed": -7},
    {"temperature": 1.5, "seed": 2**63 - 1},
    {"temperature": 1.5, "seed": -(2**63)},
    {"temperature": 1.5, "seed": 2**64 - 1},
    {"temperature": 1.5, "seed": 2**40},
]


def test_answers_side_by_side_each_have_their_own_options(server, a):
    """Each is what its request alone gives: options never reach a neighbour."""

    def one(options):
        return content(server.post(BODY | options)[2])

    want = []
    for options in OPTIONS:
        d = options | {"seed": options.get("seed", 0) % 2**64, "top_k": max(0, options.get("top_k", 0))}
        want.append(alone(a, SAID, Decoding(tokens=12, **d)))
    with ThreadPoolExecutor(len(OPTIONS)) as pool:
        assert list(pool.map(one, OPTIONS)) == want
    assert len(set(want)) > 8


def test_every_bit_of_a_seed_counts():
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1, -1 % 2**63, 7 << 40]
    rows = uniforms(seeds, 3)
    assert len({tuple(row.tolist()) for row in rows}) == len(seeds)
    assert torch.equal(rows[1], torch.rand(3, generator=torch.Generator().manual_seed(1)))


def test_a_seed_of_minus_one_is_a_random_one(server):
    got = {content(server.post(BODY | {"temperature": 2, "seed": -1})[2]) for _ in range(4)}
    assert len(got) > 1


def likeliest(a, prompt, ids, k):
    """The k likeliest tokens in the place of each of `ids`, and their log-probabilities."""
    known, out = assistant.vocabulary(a), []
    state = decode.prefill(a.model, [prompt], a.model.cache(1, 256), known)
    for token in ids:
        best, tokens = decode.logits(a.model, state).log_softmax(-1).topk(k)
        out.append(list(zip(tokens[0].tolist(), best[0].tolist(), strict=True)))
        state = decode.step(a.model, state, torch.tensor([token]))
    return out


@pytest.mark.parametrize("stream", [False, True])
def test_the_likeliest_tokens_beside_each_chosen_one(server, a, stream):
    prompt, _ = conversation.prompt(a, SAID, Decoding(tokens=12))
    d = Decoding(tokens=12, temperature=1.5, seed=3, logprobs=True)
    ((said,),) = conversation.answers(a, [SAID], d)
    more = {"temperature": 1.5, "seed": 3, "logprobs": True, "top_logprobs": 5, "stream": stream}
    got = server.client().chat.completions.create(**BODY | more)
    choices = [c.choices[0] for c in got] if stream else got.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert len(entries) == len(said.ids)
    for entry, logprob, best in zip(entries, said.logprobs, likeliest(a, prompt, said.ids, 5), strict=True):
        assert entry.logprob == pytest.approx(logprob, abs=1e-4)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([p for _, p in best], abs=1e-4)
        control = {a.tokenizer.eos: "</s>", a.tokenizer.bos: "<s>"}
        for t, (token, _) in zip(entry.top_logprobs, best, strict=True):
            assert t.token == control.get(token, a.tokenizer.decode([*a.tokenizer.encode("."), token])[1:])


def test_a_token_is_spelled_with_its_space_and_a_control_token_by_its_name(a):
    spell = [answer.spelled(a.tokenizer, token) for token in (a.tokenizer.bos, a.tokenizer.eos)]
    assert spell == ["<s>", "</s>"]
    assert "".join(answer.spelled(a.tokenizer, t) for t in a.tokenizer.encode(" A cat")) == " A cat"


def test_options_of_logprobs_of_neighbours_do_not_mix(server):
    bodies = [BODY | {"logprobs": bool(k), "top_logprobs": k} for k in (0, 1, 20, 3)]
    with ThreadPoolExecutor(4) as pool:
        answers = [answer["choices"][0] for _, _, answer in pool.map(server.post, bodies)]
    assert answers[0]["logprobs"] is None and len({c["message"]["content"] for c in answers}) == 1
    for k, choice in zip((1, 20, 3), answers[1:], strict=True):
        assert {len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]} == {k}


def after(a, ids, pictures, d):
    """The text that follows these tokens, with its space."""
    prompt, _ = conversation.prompt_of(a, ids, pictures, conversation.features(a, pictures, {}), d)
    (answer,) = decode.generate(a.model, [prompt], d, assistant.vocabulary(a))[0]
    return text_of(a.tokenizer, answer.ids, True)


@pytest.mark.parametrize("more", [{}, {"continue_final_message": True, "add_generation_prompt": False}])
def test_an_answer_that_has_begun_is_continued(server, a, more):
    """What follows "A cat" is " on", and not "on"."""
    begun = [*HI, {"role": "assistant", "content": "A cat"}]
    template = assistant.template_of("vicuna_v1")
    ids = prompt_ids(SAID.turns, template, a.tokenizer) + a.tokenizer.encode(" A cat")
    assert ids == prompt_ids((*SAID.turns, ("gpt", "A cat")), template, a.tokenizer, goes_on=True)
    spaces = set()
    for seed in range(6):
        want = after(a, ids, (), Decoding(tokens=4, temperature=1.5, seed=seed))
        body = BODY | {"messages": begun, "max_tokens": 4, "temperature": 1.5, "seed": seed} | more
        assert content(server.post(body)[2]) == server.stream(body | {"stream": True})[1] == want
        spaces.add(want[:1] == " ")
    assert True in spaces


def test_a_caption_that_has_begun_is_continued(weights, image):
    captioner = assistant.load(ChatOptions((weights / "plain",), device="cpu", context=128))
    chat = ask(Chat(), "", [picture(image, captioner)])
    template, tokenizer = assistant.template_of("plain"), captioner.tokenizer
    ids = prompt_ids(chat.turns, template, tokenizer) + tokenizer.encode(" A cat")
    want = after(captioner, ids, chat.pictures, Decoding(tokens=12))
    messages = [user(part(image.read_bytes())), {"role": "assistant", "content": "A cat"}]
    with serving(captioner, prompt=60, tokens=20) as server:
        status, _, answer = server.post(BODY | {"messages": messages})
    assert status == 200 and content(answer) == want


BEGUN = [*HI, {"role": "assistant", "content": "A"}]
CONTRADICTIONS = {
    "continue a question": (HI, {"continue_final_message": True}, "continue_final_message must be false"),
    "no prompt for an answer": (HI, {"add_generation_prompt": False}, "add_generation_prompt must be true"),
    "a new answer": (BEGUN, {"continue_final_message": False}, "continue_final_message must be true"),
    "both": (
        BEGUN, {"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt must be false",
    ),
    "an empty answer": ([*HI, {"role": "assistant", "content": ""}], {}, "turn 1 (gpt) is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_the_last_message_is_refused(server, case):
    messages, more, said = CONTRADICTIONS[case]
    status, _, answer = server.post(BODY | {"messages": messages} | more)
    assert status == 400 and said in answer["error"]["message"]


def test_a_prompt_that_goes_on_ends_with_an_answer(a):
    template = assistant.template_of("vicuna_v1")
    with pytest.raises(BadRecord, match="ends with an answer that goes on, but the last turn is a question"):
        prompt_ids(SAID.turns, template, a.tokenizer, goes_on=True)
    turns = (*SAID.turns, ("gpt", "A cat"), ("human", "And?"))
    assert raw_ids(render(turns, template), a.tokenizer) == prompt_ids(turns, template, a.tokenizer)


def complete(server, prompt, **more):
    return server.client().completions.create(
        **{"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12} | more
    )


def plainly(a, ids, d):
    """The answer to these tokens, by the functions, with the text as it follows them."""
    prompt, _ = conversation.prompt_of(a, ids, (), {}, d)
    (answer,) = decode.generate(a.model, [prompt], d, Vocabulary.of(a.tokenizer))[0]
    return a.tokenizer.decode([*a.tokenizer.encode("."), *answer.ids])[1:], answer


def test_a_text_is_completed(server, a):
    for prompt in ("Once upon a time", "", "USER: Hi ASSISTANT: A cat</s>USER: And? ASSISTANT:"):
        want, answer = plainly(a, raw_ids(prompt, a.tokenizer), Decoding(tokens=12))
        got = complete(server, prompt)
        assert got.object == "text_completion" and got.id.startswith("cmpl-")
        assert (got.choices[0].text, got.choices[0].finish_reason) == (want, "stop" if answer.ended else "length")
        assert got.usage.prompt_tokens == len(raw_ids(prompt, a.tokenizer))
        assert got.usage.completion_tokens == len(answer.ids)
        chunks = list(complete(server, prompt, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].text for c in chunks[:-1]) == want and chunks[-1].usage == got.usage
    assert complete(server, "Hi", max_tokens=None).usage.completion_tokens <= 16
    assert a.tokenizer.eos in raw_ids("A</s>B", a.tokenizer)


def test_a_template_does_not_end_a_text(weights):
    captioner = assistant.load(ChatOptions((weights / "plain",), device="cpu", context=128))
    body = json.dumps({"model": "tiny", "prompt": "Hi", "stop": "x"}).encode()
    (one,) = completion(body, Offer(Family(captioner), "tiny", Limits()), "x").answers
    assert one.vocabulary.ends == (captioner.tokenizer.eos,) != assistant.vocabulary(captioner).ends
    assert one.decoding.stop == ("x",)


def test_several_prompts_tokens_and_samples_of_each(server, a):
    ids = raw_ids("Hello", a.tokenizer)
    d = Decoding(tokens=12, temperature=1.5, seed=3)
    want = [
        plainly(a, raw_ids(p, a.tokenizer), dataclasses.replace(d, seed=s))[0] for p in ("Hi", "Hello") for s in (3, 4)
    ]
    got = complete(server, ["Hi", "Hello"], n=2, temperature=1.5, seed=3)
    assert [c.text for c in got.choices] == want and [c.index for c in got.choices] == [0, 1, 2, 3]
    assert got.usage.prompt_tokens == len(raw_ids("Hi", a.tokenizer)) + len(ids)
    assert complete(server, ids, temperature=1.5, seed=3).choices[0].text == want[2]
    got = complete(server, [ids, ids[:2]], temperature=1.5, seed=3)
    assert got.choices[0].text == want[2] and len(got.choices) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_completions(server, a, stream):
    ids = raw_ids("Hello", a.tokenizer)
    _, answer = plainly(a, ids, Decoding(tokens=12, logprobs=True))
    best = likeliest(a, conversation.prompt_of(a, ids, (), {}, Decoding(tokens=12))[0], answer.ids, 3)
    got = complete(server, "Hello", logprobs=3, stream=stream)
    found = [c.choices[0].logprobs for c in got if c.choices[0].logprobs] if stream else [got.choices[0].logprobs]
    values = {name: [x for one in found for x in getattr(one, name)] for name in
              ("tokens", "token_logprobs", "top_logprobs", "text_offset")}  # fmt: skip
    assert values["token_logprobs"] == pytest.approx(list(answer.logprobs), abs=1e-4)
    for told, three in zip(values["top_logprobs"], best, strict=True):
        assert sorted(told.values(), reverse=True)[:3] == pytest.approx([p for _, p in three], abs=1e-4)
        assert len(told) in (3, 4)
    spelled = [a.tokenizer.decode([*a.tokenizer.encode("."), t])[1:] for t in answer.ids]
    assert values["text_offset"] == [len("".join(spelled[:j])) for j in range(len(spelled))]


NO_COMPLETION = {
    "image": ({"prompt": "<image> What?"}, "send images to /v1/chat/completions", "prompt"),
    "tokens": ({"prompt": [1, 99_999]}, "token 99999 is outside the vocabulary", "prompt"),
    "negative": ({"prompt": [1, -200]}, "token -200 is outside", "prompt"),
    "nothing": ({"prompt": []}, "prompt must be a text, a list of tokens", "prompt"),
    "mixed": ({"prompt": ["a", [1]]}, "prompt must be", "prompt"),
    "no prompt": ({"prompt": None}, "prompt is missing", "prompt"),
    "surrogate": ({"prompt": "\ud800"}, "not valid Unicode", "prompt"),
    "long": ({"prompt": "word " * 120}, "over this server's limit of 300", "prompt"),
    "too long": ({"prompt": "word " * 2000}, "over the context of 512", "prompt"),
    "longer": ({"prompt": "word " * 3900}, "19500 characters, over what 300 tokens can hold", "prompt"),
    "many": ({"prompt": ["a"] * 5}, "n=1 for 5 prompts: this server gives at most 4", "n"),
    "messages": ({"messages": HI}, "messages is not supported", "messages"),
    "logprobs": ({"logprobs": True}, "logprobs must be a whole number", "logprobs"),
    "model": ({"model": "x"}, "no model 'x'", "model"),
}


@pytest.mark.parametrize("case", NO_COMPLETION)
def test_what_cannot_be_completed_is_refused(server, case):
    more, said, param = NO_COMPLETION[case]
    status, _, answer = server.post({"model": "tiny", "prompt": "x"} | more, "/v1/completions")
    assert status in (400, 404) and said in answer["error"]["message"] and answer["error"]["param"] == param
