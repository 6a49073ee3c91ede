"""Requests a second, tokens a second, and times to tokens of the server, over HTTP, at several numbers of clients.

    python bench/serve.py --weights runs/emoji
    python bench/serve.py --weights runs/emoji --trees . ../before --clients 8 32
    python bench/serve.py --weights llava-1.5-7b-hf --slots 32 --context 2048 --cache-tokens 24576 --json

Each client asks for one streamed answer after the other, each about a picture that nobody has asked about before. The
time to the first token begins when a request is sent, and the time per token is that between two events of a stream.
Several `trees`, folders of this project, are measured in turns, round by round. Where /proc is, CPU seconds of the
server are told too: work done, whatever else the machine does.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path

import tyro
from PIL import Image

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Bench:
    """How many clients ask for how many tokens."""

    weights: tuple[Path, ...]
    clients: tuple[int, ...] = (1, 8, 32, 128)
    requests: int = 128  # of all clients together in a round, but at least two a client
    tokens: int = 64  # of an answer at most
    rounds: int = 3
    slots: int = 8
    context: int = 512  # tokens of a slot
    cache_tokens: int | None = None  # of all slots together; unless given, slots times context
    template: str = "vicuna_v1"  # one whose answers are not a caption's few words
    trees: tuple[Path, ...] = (ROOT,)
    json: bool = False


@dataclass(frozen=True)
class Streamed:
    """What a client saw of a request. times: of sending it, and of each event that brought text. tokens: in total."""

    times: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class Server:
    """One that runs. tree: the folder of its code."""

    tree: Path
    port: int
    pid: int

    def seconds(self) -> float:
        """CPU seconds that it has used, NaN where there is no /proc."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def body(c: Bench, number: int) -> bytes:
    """A request about a picture of its own."""
    png = io.BytesIO()
    Image.new("RGB", (48, 48), (number % 256, number // 256 % 256, number // 65536)).save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is shown?"}]
    return json.dumps({
        "model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": c.tokens, "temperature": 2,
        "seed": number, "stream": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip


async def request(port: int, data: bytes) -> Streamed:
    """One request on a connection of its own. RuntimeError if it is not answered to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    times, tokens, lines = [time.perf_counter()], 0, []
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    async for line in reader:
        if b'"content": "' in line and b'"content": ""' not in line:
            times.append(time.perf_counter())
        elif b'"usage": {' in line:
            tokens = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
        lines = [*lines[-9:], line]
    writer.close()
    if b"data: [DONE]\n" not in lines:
        raise RuntimeError(f"a request was not answered: {b''.join(lines).decode()}")
    return Streamed(tuple(times), tokens)


async def load(c: Bench, port: int, clients: int, numbers: Iterator[int]) -> list[Streamed]:
    """What all clients saw, each asking again when it has its answer."""
    left = iter(range(max(c.requests, 2 * clients)))

    async def client() -> list[Streamed]:
        return [await request(port, body(c, next(numbers))) for _ in left]

    return [s for each in await asyncio.gather(*(client() for _ in range(clients))) for s in each]


def quantile(values: list[float], q: float) -> float:
    """The value below which a share q lies; NaN of none."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


def measure(c: Bench, server: Server, clients: int, numbers: Iterator[int]) -> dict:
    """A row of figures of one round."""
    start, cpu = time.perf_counter(), server.seconds()
    seen = asyncio.run(load(c, server.port, clients, numbers))
    seconds, cpu = time.perf_counter() - start, server.seconds() - cpu
    tokens = sum(s.tokens for s in seen)
    return {
        "requests_s": len(seen) / seconds, "tokens_s": tokens / seconds, "cpu_ms_token": cpu / tokens * 1e3,
        "first": [s.times[1] - s.times[0] for s in seen if len(s.times) > 1],
        "each": [b - a for s in seen for a, b in pairwise(s.times[1:])],
    }  # fmt: skip


def combine(tree: Path, clients: int, rounds: list[dict]) -> dict:
    """Medians of rates over the rounds; quantiles, in milliseconds, over the requests of all rounds."""
    row: dict = {"tree": str(tree), "clients": clients, "requests": sum(len(r["first"]) for r in rounds)}
    row |= {name: quantile([r[name] for r in rounds], 0.5) for name in ("requests_s", "tokens_s", "cpu_ms_token")}
    for name in ("first", "each"):
        times = [t * 1e3 for r in rounds for t in r[name]]
        row |= {f"{name}_p50_ms": quantile(times, 0.5), f"{name}_p99_ms": quantile(times, 0.99)}
    return row


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    names = list(rows[0])
    cells = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, ["---"] * len(names), *cells))


@contextmanager
def serving(c: Bench, tree: Path) -> Iterator[Server]:
    """The recipe of a tree, until the figures are taken."""
    options = ["--template", c.template, "--slots", str(c.slots), "--context", str(c.context), "--port", "0"]
    options += ["--cache-tokens", str(c.cache_tokens)] if c.cache_tokens is not None else []
    most = ["--limits.prompt", str(c.context - c.tokens), "--limits.queue", str(max(c.clients) + 1)]
    command = [sys.executable, str(tree / "recipes/serve.py"), "--weights", *map(str, c.weights), *options, *most]
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
    with subprocess.Popen([*command, "--name", "m"], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("m: http"):
                    yield Server(tree, int(line.rpartition(":")[2]), process.pid)
                    return
            raise RuntimeError(f"the server of {tree} ended before it listened")
        finally:
            process.terminate()


def main(c: Bench) -> None:
    """Start the servers, ask them in turns, and stop them."""
    numbers = count()
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(c, tree)) for tree in c.trees]
        for s in servers:
            measure(c, s, 1, iter(range(2**23, 2**24)))
        rows = []
        for clients in c.clients:
            rounds = [[measure(c, s, clients, numbers) for s in servers] for _ in range(c.rounds)]
            rows += [
                combine(s.tree, clients, list(own)) for s, own in zip(servers, zip(*rounds, strict=True), strict=True)
            ]
    print(json.dumps({"bench": asdict(c), "rows": rows}, default=str) if c.json else table(rows))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
