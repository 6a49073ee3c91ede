"""A server of this process, for tests of the API and of the page."""

import contextlib
import dataclasses
import socket
import threading
import time

import openai
import uvicorn

from llava_fn.generate import conversation
from llava_fn.generate.family import Family
from llava_fn.serve.app import Service, build
from llava_fn.serve.options import Limits
from llava_fn.serve.worker import Worker


@dataclasses.dataclass(frozen=True)
class Running:
    url: str
    service: Service

    def client(self, key="none", **more):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **more)

    def free(self, slots, waiting=0):
        """Wait until so many slots are free."""
        for _ in range(1000):
            if self.service.worker.figures() == {"slots": 4, "free": slots, "waiting": waiting}:
                return True
            time.sleep(0.02)
        return False


@contextlib.contextmanager
def serving(a, key=None, host="127.0.0.1", **limits):
    """4 slots on a free port."""
    f = a if isinstance(a, Family) else Family(a)
    worker = Worker(f, 4, Limits(**limits))
    service = Service(f, "tiny", worker, worker._limits, key)
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what is not read soon fills it
    options = {"log_level": "error", "ws": "none", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(build(service, host), **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    worker.start()
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join()
        worker.stop()


def alone(a, chat, d):
    """The text of one answer, by the functions that answer one batch at a time."""
    chat = dataclasses.replace(chat, feats=conversation.features(a, chat.pictures, {}))
    return conversation.answers(a, [chat], d)[0][0].text
