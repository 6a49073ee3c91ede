"""Hostile requests to the server, all at once, and among them good ones that must be answered as if they were alone.

    python tests/campaigns/hostile_requests.py --n 200 --seed 0

The server has to stay up in bounded memory, give each request an answer, a documented error or a closed connection,
and have no slot, thread or descriptor of a request left when the storm is over. The exit status is 1 if it fails.
(The file is not called requests.py, which another package's name would hide.)
"""

import argparse
import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

from mutations import DEEP, hostile, mutate
from PIL import Image
from subjects import save_checkpoint

ROOT = Path(__file__).parents[2]
VERDICTS = ("answered", "refused", "closed", "violation")
PATH = "/v1/chat/completions"
PATIENCE = 120.0  # seconds that a client waits for an answer that must come
# the main one, the engine's, two that read requests, and those of asyncio's pool, which come when they are first wanted
THREADS = 4 + min(32, (os.cpu_count() or 1) + 4)
SETTLED = 20.0  # seconds after which nothing of a request may be left
SHORT = 5.0  # and for one that the server may owe or not, since the request has no end that both see alike
ENDLESS = ("wrong lengths", "garbage", "routes and methods")
MEMORY = 2 * 2**30  # bytes
ERRORS = (400, 404, 405, 408, 413, 415, 429, 503, 504)  # of docs/serve.md, and of HTTP itself


@dataclass(frozen=True)
class Outcome:
    index: int
    kind: str
    verdict: str
    detail: str = ""


# ---- good requests


def _png(width: int, height: int, colour: object = (9, 99, 200)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


def _image(content: bytes) -> dict:
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _ask(*parts: object, **more: object) -> dict:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    fields = {"model": "m", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 12}
    return fields | more


GOOD = (
    _ask("Say a word or two."),
    _ask(_image(_png(24, 18)), "What is this?"),
    _ask("Tell me more.", stream=True, max_tokens=30),
    _ask("And now?", temperature=1.2, seed=7, n=2),
)


def _post(body: bytes, *headers: str, length: object = None) -> bytes:
    length = len(body) if length is None else length
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {length}",
             *(headers or ("Content-Type: application/json",))]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def text(port: int, fields: dict) -> str:
    """The texts of an answer. It asks again where the server is busy, as a client should."""
    end = time.monotonic() + PATIENCE
    while True:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        client.request("POST", PATH, json.dumps(fields), {"Content-Type": "application/json"})
        reply = client.getresponse()
        body = reply.read().decode()
        client.close()
        if reply.status == 200:
            break
        if reply.status != 429 or time.monotonic() > end:
            raise ValueError(f"{reply.status}: {body[:300]}")
        time.sleep(0.2)
    if not fields.get("stream"):
        return json.dumps([choice["message"]["content"] for choice in json.loads(body)["choices"]])
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


# ---- hostile ones: each gives what it sends, or does it itself with the open socket

Deed = Callable[[Random, socket.socket], bytes | None]


def _mutated(rng: Random, sock: socket.socket) -> bytes:
    body = json.dumps(_ask("Say.", _image(_png(8, 8)), stop=["x"], seed=1, stream=rng.random() < 0.5)).encode()
    content = mutate(rng, "body.json", body)[1]
    return _post(content if isinstance(content, bytes) else b"")


def _fields(rng: Random, sock: socket.socket) -> bytes:
    name = rng.choice(
        ("n", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "logprobs", "messages", "x")
    )
    return _post(json.dumps(_ask("Say.") | {name: hostile(rng, 1)}).encode())


def _deep(rng: Random, sock: socket.socket) -> bytes:
    return _post(rng.choice((b"[" * DEEP, b'{"a":' * DEEP, b'{"messages":' + b"[" * DEEP + b"]" * DEEP + b"}")))


def _huge(rng: Random, sock: socket.socket) -> bytes:
    size = rng.choice((19_000_000, 19_000_000, 25_000_000))
    return _post(json.dumps(_ask("word " * (size // 5))).encode())


def _bomb(rng: Random, sock: socket.socket) -> bytes:
    small = _png(2, 2)
    header = b"IHDR" + struct.pack(">II", *rng.choice(((30_000, 30_000), (2**31 - 1, 1), (60_000, 600)))) + small[24:29]
    lie = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    content = rng.choice((lie, lie, _png(6300, 6300), _png(16_000, 2), b"", small[:40], rng.randbytes(5000)))
    return _post(json.dumps(_ask(*[_image(content)] * rng.choice((1, 1, 3)), "What?")).encode())


def _many_images(rng: Random, sock: socket.socket) -> bytes:
    return _post(json.dumps(_ask(*[_image(_png(16, 16))] * 1000, "What?")).encode())


def _length(rng: Random, sock: socket.socket) -> bytes:
    body = json.dumps(_ask("Say.")).encode()
    more = ("Content-Type: application/json", "Content-Length: 3") if rng.random() < 0.2 else ()
    return _post(body, *more, length=rng.choice((-1, "x", "", 2**70, 5, "1e3", "0x10", "+5", 0, "5, 6")))


def _half(rng: Random, sock: socket.socket) -> None:
    body = _post(json.dumps(_ask("Say.")).encode())
    sock.sendall(body[: rng.randrange(1, len(body))])
    time.sleep(rng.uniform(0, 5))


def _silent(rng: Random, sock: socket.socket) -> None:
    time.sleep(rng.uniform(0, 8))


def _slow_writer(rng: Random, sock: socket.socket) -> bytes:
    body = _post(json.dumps(_ask("Say.")).encode())
    for at in range(0, len(body) - 1, 20):
        sock.sendall(body[at : min(at + 20, len(body) - 1)])
        time.sleep(0.2)
    return body[-1:]


def _unread(rng: Random, sock: socket.socket) -> None:
    """An answer that is asked for and not read, or slowly, until the client goes."""
    sock.sendall(_post(json.dumps(_ask("Tell me.", stream=True, max_tokens=500, temperature=2, seed=1, n=4)).encode()))
    for _ in range(rng.randrange(0, 6)):
        time.sleep(1)
        sock.recv(rng.choice((1, 10)))


def _reset(rng: Random, sock: socket.socket) -> None:
    """Gone in the middle, with a reset."""
    sock.sendall(_post(json.dumps(_ask("Tell me.", stream=rng.random() < 0.7, max_tokens=400, temperature=1)).encode()))
    time.sleep(rng.uniform(0, 1))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _pipelined(rng: Random, sock: socket.socket) -> bytes:
    one = _post(json.dumps(_ask("Say.", max_tokens=2)).encode()).replace(b"Connection: close\r\n", b"")
    return one * rng.choice((2, 5)) + rng.choice((b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\0\1\2"))


def _garbage(rng: Random, sock: socket.socket) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n".encode()
    return rng.choice((
        rng.randbytes(2000), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET " + b"a" * 200_000, head + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        head + b"".join(b"X%d: 1\r\n" % i for i in range(5000)) + b"\r\n", b"\r\n" * 5000, b"GET / HTTP/9.9\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nZZZ\r\n",
        head + b"Transfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nffffffffffffffff\r\n{}",
        head + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\nContent-Type: application/json\r\n\r\n0\r\n\r\n",
    ))  # fmt: skip


def _text(rng: Random, sock: socket.socket) -> bytes:
    bad = rng.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\xc3", b"</s>", b"<image>", b"\x00"))
    return _post(json.dumps(_ask("@")).encode().replace(b"@", bad * rng.choice((1, 100))))


def _route(rng: Random, sock: socket.socket) -> bytes:
    path = rng.choice(("/../../etc/passwd", "/v1/models/%00", "/v1/models/../../x", "/v1/chat/completions/", "//", "*",
                       "/v1/embeddings", "http://evil.example/", "/%ff%fe", "/metrics?x=" + "y" * 5000))  # fmt: skip
    method = rng.choice(("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT", "BREW", "POST"))
    more = rng.choice(
        ("", "Upgrade: websocket\r\nConnection: Upgrade\r\n", "Expect: 100-continue\r\n", "Host: evil\r\n")
    )
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{more}Content-Length: 0\r\n\r\n".encode()


HOSTILE: dict[str, Deed] = {
    "mutated JSON": _mutated, "hostile fields": _fields, "deep nesting": _deep, "huge JSON": _huge,
    "image bombs": _bomb, "1000 images": _many_images, "wrong lengths": _length, "half a body": _half,
    "silence": _silent, "slow writer": _slow_writer, "slow or no reader": _unread, "reset": _reset,
    "pipelined": _pipelined, "garbage": _garbage, "broken text": _text, "routes and methods": _route,
}  # fmt: skip


def _heard(sock: socket.socket, whole: bool) -> tuple[str, str]:
    """Verdict and detail of what comes back until the server closes. whole: whether the request has an end."""
    sock.settimeout(PATIENCE if whole else SHORT)
    content = b""
    try:
        while part := sock.recv(2**16):
            content += part
    except ConnectionError:
        pass  # it was closed with bytes on their way
    except TimeoutError:
        if whole:
            return "violation", f"neither an answer nor an end after {PATIENCE:g} s: {content[:200]!r}"
    if not content:
        return "closed", ""
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", content)
    if status is None or int(status[1]) >= 500 and int(status[1]) not in ERRORS:
        return "violation", f"it answers {content[:300]!r}"
    return ("answered" if int(status[1]) < 300 else "refused"), content[:100].decode("latin-1")


def client(index: int, kind: str, seed: str, port: int, alone: Sequence[str]) -> Outcome:
    """One request, and what came of it."""
    rng = Random(f"{seed}:{index}")
    if kind == "good":
        j = rng.randrange(len(GOOD))
        try:
            got = text(port, GOOD[j])
        except (OSError, ValueError, http.client.HTTPException) as error:
            return Outcome(index, kind, "violation", f"request {j}: {error!r}")
        same = got == alone[j]
        return Outcome(index, kind, "answered" if same else "violation", "" if same else f"{got!r}, not {alone[j]!r}")
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
            data = HOSTILE[kind](rng, sock)
            if data is None:
                return Outcome(index, kind, "closed", "by the client")
            try:
                sock.sendall(data)
            except ConnectionError:
                pass  # it was refused before it was read
            return Outcome(index, kind, *_heard(sock, kind not in ENDLESS))
    except ConnectionError as error:
        return Outcome(index, kind, "closed", repr(error))
    except OSError as error:
        return Outcome(index, kind, "violation", repr(error))


# ---- the server


@dataclass(frozen=True)
class Use:
    """What a process has taken. free: of its slots."""

    threads: int
    files: tuple[str, ...]
    free: int
    waiting: int
    peak: int = 0  # bytes of memory


def _target(file: Path) -> str:
    try:
        return os.readlink(file)
    except FileNotFoundError:
        return "closed meanwhile"


def use(pid: int, port: int) -> Use:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    client.request("GET", "/health", headers={"Connection": "close"})
    health = json.load(client.getresponse())
    client.close()
    time.sleep(0.3)  # until the server has closed this connection too
    status = Path(f"/proc/{pid}/status").read_text()
    of = lambda name: int(re.search(rf"{name}:\s+(\d+)", status)[1])  # noqa: E731
    at = Path(f"/proc/{pid}")
    files = sorted(re.sub(r"\d+", "", _target(file)) for file in (at / "fd").iterdir())
    return Use(of("Threads"), tuple(files), health["free"], health["waiting"], of("VmHWM") * 1024)


def _more(now: Use, before: Use) -> list[str]:
    """The files that a process has more of, and its threads if they are more than it may ever have."""
    files = Counter(now.files) - Counter(before.files)
    return [str(files)] * bool(files) + [f"{now.threads} threads"] * (now.threads > THREADS)


def settled(pid: int, port: int, before: Use) -> Use:
    """The figures once they are no more than before, or after `SETTLED` seconds."""
    end = time.monotonic() + SETTLED
    while True:
        now = use(pid, port)
        fine = not _more(now, before) and now.free == before.free
        if (fine and not now.waiting) or time.monotonic() > end:
            return now
        time.sleep(0.5)


def recipe(folder: Path) -> list:
    """The recipe on a tiny model."""
    save_checkpoint(folder)
    named = ["--weights", folder / "000007", "--name", "m", "--port", 0, "--context", 1024]
    return [ROOT / "recipes/serve.py", *named, "--limits.prompt", 512, "--limits.tokens", 512]


def start(folder: Path, server: Callable[[Path], list]) -> tuple[subprocess.Popen, int]:
    """A server's process and port. It writes a line with the port, and its errors to the file log of the folder."""
    command = list(map(str, [sys.executable, *server(folder)]))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
    line = process.stdout.readline()
    assert line.startswith("m: http://"), (folder / "log").read_text()
    return process, int(line.rpartition(":")[2])


def storm(n: int, seed: int, kinds: Sequence[str], process: subprocess.Popen, port: int) -> list[Outcome]:
    """n requests at once; the last outcomes are the server's own."""
    alone = [text(port, fields) for fields in GOOD]
    before = use(process.pid, port)
    found = _at_once(n, str(seed), kinds, port, alone)
    return found + [_after(process, port, before, alone)]


def _at_once(n: int, seed: str, kinds: Sequence[str], port: int, alone: Sequence[str]) -> list[Outcome]:
    together = threading.Barrier(n)

    def one(index: int) -> Outcome:
        kind = kinds[index % len(kinds)]
        together.wait()
        return client(index, kind, seed, port, alone)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


def _after(process: subprocess.Popen, port: int, before: Use, alone: Sequence[str]) -> Outcome:
    """What the storm has left of the server."""
    if process.poll() is not None:
        return Outcome(-1, "the server", "violation", f"it has ended with status {process.returncode}")
    now = settled(process.pid, port, before)
    said = f"before {before}, after {now}"
    wrong = _more(now, before)
    wrong += ["slots"] * (now.free < before.free or now.waiting > 0) + ["memory"] * (now.peak > MEMORY)
    wrong += ["answers"] * ([text(port, fields) for fields in GOOD] != list(alone))
    process.send_signal(signal.SIGTERM)
    if (status := process.wait(60)) != 0:
        wrong.append(f"exit status {status}")
    return Outcome(-1, "the server", "violation" if wrong else "answered", f"{', '.join(wrong)} {said}".strip())


def table(found: Sequence[Outcome]) -> str:
    """A row for each kind, their sum, and the server's figures."""
    counts = Counter((o.kind, o.verdict) for o in found[:-1])
    kinds = dict.fromkeys(o.kind for o in found[:-1])
    rows = [(kind, *(counts[kind, v] for v in VERDICTS)) for kind in kinds]
    rows.append(("all", *(sum(row[j] for row in rows) for j in range(1, 5))))
    lines = [f"| {'kind':20} | requests | " + " | ".join(VERDICTS) + " |", "|---|---:|" + "---:|" * 4]
    for name, *numbers in rows:
        cells = " | ".join(f"{n:{len(v)}}" for n, v in zip(numbers, VERDICTS, strict=True))
        lines.append(f"| {name:20} | {sum(numbers):8} | {cells} |")
    return "\n".join([*lines, "", f"the server: {found[-1].verdict}: {found[-1].detail}"])


def campaign(args: argparse.Namespace, server: Callable[[Path], list] = recipe) -> list[Outcome]:
    """The storm on a server of its own."""
    kinds = (args.kind,) if args.kind else ("good", *HOSTILE, "good", "good")
    with tempfile.TemporaryDirectory() as folder:
        process, port = start(Path(folder), server)
        try:
            clock = time.monotonic()
            found = storm(args.n, args.seed, kinds, process, port)
        finally:
            process.kill()
            process.wait()
        log = (Path(folder) / "log").read_text()
    if "Traceback" in log:
        found[-1] = replace(found[-1], verdict="violation", detail=f"{found[-1].detail}; its log: {log[-3000:]}")
    for outcome in found:
        if outcome.verdict == "violation":
            print(f"{outcome.index}: {outcome.kind}: {outcome.detail}\n")
    print(table(found))
    print(f"\n{args.n} requests at once, seed {args.seed}, {time.monotonic() - clock:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"n": args.n, "seed": args.seed, "outcomes": list(map(asdict, found))}) + "\n")
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=200, help="requests")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kind", choices=("good", *HOSTILE), help="of all requests")
    p.add_argument("--json", type=Path, help="file for all outcomes")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(any(o.verdict == "violation" for o in campaign(parse(sys.argv[1:]))))
