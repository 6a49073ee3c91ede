"""What stands around the answers: metrics, other sites, proxies, and the requests of front ends as they send them."""

import http.client
import urllib.request

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import part, serving, text, user

from llava_fn.generate import assistant
from llava_fn.generate.options import ChatOptions
from llava_fn.serve import engine
from llava_fn.serve.options import Web

HI = [{"role": "user", "content": "Say a word or two."}]
BODY = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 12}
ORIGIN = "https://chat.example"


@pytest.fixture(scope="module")
def a(weights):
    return assistant.load(ChatOptions((weights / "vicuna_v1",), device="cpu", context=512))


@pytest.fixture(scope="module")
def server(a):
    web = Web(cors=(ORIGIN,), root_path="/llava/", hosts=("proxy.example",))
    with serving(a, web=web, prompt=300, tokens=100, samples=4) as running:
        yield running


@pytest.fixture(scope="module")
def images(emojis):
    return sorted((emojis / "images").iterdir())[:2]


def raw(server, method, path, headers):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def figures(server):
    """(name, labels) -> value, as Prometheus reads them."""
    odd = {"Accept": "application/openmetrics-text;version=?,text/plain;version=x"}
    with urllib.request.urlopen(urllib.request.Request(server.url + "/metrics", headers=odd)) as response:
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(response.read().decode()))
    assert all(f.documentation and f.name.startswith("llava_fn_") for f in families)
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def test_metrics_count_what_was_asked_and_answered(a, images, monkeypatch):
    with serving(a, prompt=300, tokens=100, samples=4) as server:
        before = figures(server)
        assert before["llava_fn_slots", "free"] == 4 and before["llava_fn_requests_waiting",] == 0
        pages = [before["llava_fn_cache_pages", state] for state in ("free", "busy", "kept")]
        assert sum(pages) == 4 * 512 // 64 and pages[1] == 0
        usage = []
        shots = user(*[part(i.read_bytes()) for i in images], text("What?"))
        for body in (BODY, BODY | {"messages": [shots], "n": 2, "temperature": 1}):
            usage.append(server.post(body)[2]["usage"])
        server.stream(BODY | {"stream": True})
        server.post({"model": "tiny", "prompt": "Hi", "max_tokens": 3}, "/v1/completions")
        server.post(BODY | {"tools": [{}]})
        server.post(BODY, Content_Type="text/plain")
        server.free(4)
        now = figures(server)
        assert now["llava_fn_requests_total", "chat/completions", "200"] == 3
        assert now["llava_fn_requests_total", "completions", "200"] == 1
        assert now["llava_fn_requests_total", "chat/completions", "400"] == 1
        assert now["llava_fn_requests_total", "chat/completions", "415"] == 1
        assert now["llava_fn_images_total",] == 2
        generated = 12 + sum(u["completion_tokens"] for u in usage) + 3
        assert 0 <= generated - now["llava_fn_generated_tokens_total",] <= 3  # an answer may end by itself
        assert now["llava_fn_prompt_tokens_total",] > usage[0]["prompt_tokens"] * 2 + usage[1]["prompt_tokens"]
        assert now["llava_fn_time_to_first_token_seconds_count",] == 5
        assert now["llava_fn_time_per_token_seconds_count",] > 30
        assert now["llava_fn_time_per_token_seconds_sum",] > 0
        assert now["llava_fn_time_to_first_token_seconds_bucket", "+Inf"] == 5
        monkeypatch.setattr(engine, "step", lambda a, desk: 1 / 0)
        with pytest.raises(openai.APIError, match="the model has failed"):
            list(server.client().chat.completions.create(**BODY, stream=True))
        server.post(BODY)
        now = figures(server)
        assert now["llava_fn_requests_total", "chat/completions", "500"] == 1
        assert now["llava_fn_requests_total", "chat/completions", "503"] == 1


def test_pages_of_an_origin_that_is_allowed_may_ask(server, a):
    """As a browser does with OpenAI's JavaScript client, which sends headers of its own."""
    wanted = "authorization,content-type,x-stainless-lang"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    status, headers, _ = raw(server, "OPTIONS", "/v1/chat/completions", {"Origin": ORIGIN} | preflight)
    assert status == 200 and headers["access-control-allow-origin"] == ORIGIN
    assert headers["access-control-allow-headers"] == wanted
    status, headers, answer = server.post(BODY | {"chat_id": 1}, Origin=ORIGIN)
    assert status == 200 and headers["access-control-allow-origin"] == ORIGIN
    assert headers["access-control-expose-headers"] == "X-Ignored-Fields"
    status, headers, _ = server.post(BODY | {"n": 0}, Origin=ORIGIN)
    assert status == 400 and headers["access-control-allow-origin"] == ORIGIN
    status, headers, _ = raw(server, "OPTIONS", "/v1/chat/completions", {"Origin": "https://evil.example"} | preflight)
    assert status == 400 and "access-control-allow-origin" not in headers


def test_without_the_option_no_origin_is_allowed(a):
    with serving(a) as server:
        headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        status, got, _ = raw(server, "OPTIONS", "/v1/chat/completions", headers)
        assert status == 405 and "access-control-allow-origin" not in got


@pytest.mark.parametrize("prefix", ["", "/llava"])
def test_a_proxy_may_cut_its_path_off_or_not(server, prefix):
    for path, status in (("/", 200), ("/health", 200), ("/v1/models", 200), ("/v1/nothing", 404), ("/metrics", 200)):
        assert raw(server, "GET", prefix + path, {})[0] == status
    assert server.post(BODY, f"{prefix}/v1/chat/completions")[0] == 200
    page = raw(server, "GET", prefix + "/", {})[2].decode()
    assert 'fetch("v1/models"' in page and 'fetch("/' not in page  # relative, so that they are below the path


def test_a_proxy_may_pass_on_its_own_name(server):
    assert raw(server, "GET", "/v1/models", {"Host": "proxy.example"})[0] == 200
    assert raw(server, "GET", "/v1/models", {"Host": "evil.example"})[0] == 400


SYSTEM = {"role": "system", "content": "Be brief."}
PARAMS = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 12, "seed": 3, "stop": ["###"], "top_k": 40, "min_p": 0.05}
PAGE = {  # of open-webui's page, where a browser asks the server itself
    "params": {}, "files": [], "filter_ids": [], "tool_servers": [], "features": {"web_search": False, "memory": False},
    "variables": {"{{USER_NAME}}": "Bo"}, "model_item": {"id": "tiny"}, "session_id": "s1", "chat_id": "c1", "id": "m1",
    "background_tasks": {"title_generation": True, "tags_generation": True},
}  # fmt: skip
# The fields of requests, and those of them that are named. Sources in open-webui: routers/openai.py (chat),
# routers/tasks.py (title, tags), utils/payload.py (params), components/chat/Chat.svelte (page).
OPEN_WEBUI = {
    "chat": ({"messages": [SYSTEM, *HI], "stream": True, "stream_options": {"include_usage": True}} | PARAMS, []),
    "turns": ({"messages": [*HI, {"role": "assistant", "content": "A"}, *HI], "stream": True, "max_tokens": 12}, []),
    "continue": ({"messages": [*HI, {"role": "assistant", "content": "A cat"}], "stream": True, "max_tokens": 12}, []),
    "title": ({"messages": HI, "stream": False, "max_completion_tokens": 100}, []),
    "tags": ({"messages": HI, "stream": False}, []),
    "cached": ({"messages": [user(text("Hi") | {"cache_control": {"type": "ephemeral"}})], "max_tokens": 9}, []),
    "ollama's": ({"messages": HI, "repeat_penalty": 1.1, "num_ctx": 4096, "keep_alive": "5m", "max_tokens": 9},
                 ["repeat_penalty", "num_ctx", "keep_alive"]),
    "page": ({"messages": HI, "stream": True, "max_tokens": 9} | PAGE, list(PAGE)),
}  # fmt: skip


@pytest.mark.parametrize("case", OPEN_WEBUI)
@pytest.mark.parametrize("with_image", [False, True])
def test_requests_of_a_front_end_are_answered(server, images, case, with_image):
    fields, named = OPEN_WEBUI[case]
    messages = fields["messages"]
    if with_image:  # of the first question
        j = messages.index(next(m for m in messages if m["role"] == "user"))
        said = messages[j]["content"]
        parts = [text(said)] if isinstance(said, str) else said
        messages = [*messages[:j], user(*parts, part(images[0].read_bytes())), *messages[j + 1 :]]
    body = {"model": "tiny"} | fields | {"messages": messages}
    if fields.get("stream"):
        headers, said = server.stream(body)
    else:
        status, headers, answer = server.post(body, X_OpenWebUI_User_Name="Bo")
        assert status == 200, answer
        said = answer["choices"][0]["message"]["content"]
    assert said and headers.get("x-ignored-fields", "") == ", ".join(named)


def test_options_that_no_request_could_match_are_refused():
    for web, said in (
        ({"cors": ("chat.example",)}, "cors=chat.example: give an origin"),
        ({"cors": ("https://chat.example/page",)}, "without a path"),
        ({"root_path": "llava"}, "root_path=llava: must begin with a /"),
    ):
        with pytest.raises(ValueError, match=said):
            Web(**web)
    assert Web(host="0.0.0.0").allowed_hosts == () and Web(host="0.0.0.0", hosts=("x",)).allowed_hosts[-1] == "x"
