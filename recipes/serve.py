"""Serve a model: OpenAI's chat API at /v1, and a chat page at /.

    python recipes/serve.py --weights runs/emoji

Requests are answered side by side, from one cache. After SIGINT or SIGTERM the server accepts no more,
gives the requests under way `--grace` seconds to finish, and ends with exit status 0.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llava_fn.generate.options import ChatOptions
from llava_fn.launch import cli
from llava_fn.serve.options import LOOPBACK, Limits, Web


@dataclass(frozen=True)
class Serve:
    """Which model, where, and how much a request may ask for."""

    model: Annotated[ChatOptions, tyro.conf.arg(name="")]
    name: str | None = None  # of the model in requests; its folder's, unless given
    adapters: tuple[str, ...] = ()  # NAME=PATH: PEFT folders or runs on the same weights; a request's model picks one
    web: Annotated[Web, tyro.conf.arg(name="")] = Web()
    port: int = 8000  # 0: one that is free
    api_key: str | None = None  # requests without it are refused
    strict: bool = False  # refuse fields of requests that this server does not know; else they are logged and named
    slots: int = 8  # answers at a time
    cache_tokens: int | None = None  # of all answers together; unless given, --context for each slot
    limits: Limits = Limits()
    grace: float = 10.0  # seconds for requests under way after a signal

    def __post_init__(self) -> None:
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise ValueError(f"cache_tokens={self.cache_tokens}: must be at least 1")
        if self.api_key == "":
            raise ValueError("--api-key is empty; give one, or leave it out")
        names = [text.partition("=")[0] for text in self.adapters]
        if len(set(names)) < len(names) or any(not all(text.partition("=")) for text in self.adapters):
            raise ValueError(f"adapters={' '.join(self.adapters)}: give each as NAME=PATH, with a name of its own")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: must be from 0, which is one that is free, to 65535")


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address. OSError names the address if it is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); give another --port or --host") from error
    return sock


def main(c: Serve) -> None:
    """Load the model and answer until a signal comes. ValueError if the model fails meanwhile."""
    # imports stand where they are used: torch takes seconds, and --help does without
    from llava_fn.generate import assistant, family
    from llava_fn.serve.worker import Worker

    try:
        import uvicorn

        from llava_fn.serve.app import Service, build
        from llava_fn.serve.ask import Offer
    except ImportError as error:
        raise ValueError(f"the server wants more packages ({error}): pip install 'llava_fn[serve]'") from error
    sock = bind(c.web.host, c.port)
    f = family.load(c.model, {name: Path(path) for name, _, path in (text.partition("=") for text in c.adapters)})
    if c.web.host not in (*LOOPBACK, "::1") and c.api_key is None:
        print(f"warning: anybody who reaches {c.web.host} can use this server; give --api-key", file=sys.stderr)
    if warning := assistant.warning(f.base):
        print(warning, file=sys.stderr)
    name = c.name or c.model.weights[-1].resolve().name
    if name in f.adapters:
        raise ValueError(f"the base and an adapter are both called {name}; give the base another --name")
    worker = Worker(f, c.slots, c.limits, lambda: os.kill(os.getpid(), signal.SIGTERM), c.cache_tokens)
    app = build(Service(Offer(f, name, c.limits, c.strict, worker.room), worker, c.api_key), c.web)
    config = uvicorn.Config(app, log_level="warning", ws="none", server_header=False)
    config.timeout_graceful_shutdown = c.grace  # pyright: ignore[reportAttributeAccessIssue]  # it is for asyncio
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn takes them over, and raises them again when it is done
    print(worker.warm(), file=sys.stderr)
    sock.listen()
    worker.start()
    host, port = sock.getsockname()[:2]
    print(f"{', '.join((name, *f.adapters))}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    try:
        server.run(sockets=[sock])
    finally:
        worker.stop()
    if worker.error:
        traceback.print_exception(worker.error)
        raise ValueError(f"the model failed: {worker.error!r}")


if __name__ == "__main__":
    cli.run(main, tyro.cli(Serve, description=__doc__))
