"""A server of this process, for tests of the API and of the page."""

import base64
import contextlib
import dataclasses
import json
import os
import shlex
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import openai
import uvicorn
from warm import Warm, until

from llava_fn.generate import conversation
from llava_fn.generate.family import Family
from llava_fn.serve import engine
from llava_fn.serve import worker as worker_of
from llava_fn.serve.app import Service, build
from llava_fn.serve.ask import Offer
from llava_fn.serve.options import Limits, Web
from llava_fn.serve.worker import Worker


@dataclasses.dataclass(frozen=True)
class Running:
    url: str
    service: Service

    def client(self, key="none", **more):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **more)

    def post(self, body, path="/v1/chat/completions", **headers):
        """Status, headers and JSON of a request that no well-made client sends."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as response:
                return response.status, response.headers, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, error.headers, json.load(error)

    def stream(self, body, path="/v1/chat/completions"):
        """Headers and text of an answer that comes in events."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            events = response.read().decode().removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
        return response.headers, "".join(pieces)

    def free(self, slots, waiting=0):
        """Wait until so many slots are free."""
        figures = self.service.worker.figures
        return until(lambda: (figures()["free"], figures()["waiting"]) == (slots, waiting), seconds=100)


@dataclasses.dataclass(frozen=True)
class Started:
    """recipes/serve.py in a process of its own. told: its first line."""

    warm: Warm
    pid: int
    told: str
    out: Path
    err: Path

    @property
    def url(self):
        return self.told.split()[-1]

    def end(self, number):
        """Its exit status, and all that it says, after a signal."""
        os.kill(self.pid, number)
        return self.warm.wait(self.pid), self.out.read_text(), self.err.read_text()


def start(warm, command, folder, env, name="server"):
    """A command of the docs, on a free port."""
    out, err = folder / f"{name}.out", folder / f"{name}.err"
    pid = warm.start([*shlex.split(command)[1:], "--port", "0"], folder, env, out, err)
    assert until(lambda: out.exists() and "\n" in out.read_text(), pid), err.read_text()
    return Started(warm, pid, out.read_text().strip(), out, err)


@contextlib.contextmanager
def serving(a, key=None, web=Web(), strict=False, **limits):
    """4 slots on a free port."""
    f = a if isinstance(a, Family) else Family(a)
    worker = Worker(f, 4, Limits(**limits))
    service = Service(Offer(f, "tiny", worker._limits, strict), worker, key)
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what is not read soon fills it
    options = {"log_level": "error", "ws": "none", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(build(service, web), **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    worker.start()
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join()
        worker.stop()


def steps_take(monkeypatch, seconds):
    """Each step takes so many seconds of the clock by which requests expire, however fast the machine is."""
    clock, step = [0.0], engine.step

    def timed(a, desk):
        clock[0] += seconds
        return step(a, desk)

    monkeypatch.setattr(engine, "step", timed)
    monkeypatch.setattr(worker_of, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter))


def alone(a, chat, d):
    """The text of one answer, by the functions that answer one batch at a time."""
    chat = dataclasses.replace(chat, feats=conversation.features(a, chat.pictures, {}))
    return conversation.answers(a, [chat], d)[0][0].text


def text(value):
    return {"type": "text", "text": value}


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(data, kind="png"):
    return {"type": "image_url", "image_url": {"url": data_url(data, kind)}}


def user(*parts):
    return {"role": "user", "content": list(parts)}
