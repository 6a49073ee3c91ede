"""Tokens a second of the server, over HTTP: one client alone, and several at once.

python bench/serve.py --weights runs/emoji --clients 8
"""

from __future__ import annotations

import asyncio
import base64
import io
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import openai
import tyro
from PIL import Image

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Bench:
    """How many clients ask for how many tokens."""

    weights: tuple[Path, ...]
    clients: int = 8
    requests: int = 5  # of each client, one after another
    tokens: int = 64  # of an answer at most
    template: str = "vicuna_v1"  # one whose answers are not a caption's few words


async def client(api: openai.AsyncOpenAI, c: Bench, number: int) -> int:
    """One client's requests, each about another picture. Returns how many tokens it was given."""
    tokens = 0
    for j in range(c.requests):
        png = io.BytesIO()
        Image.new("RGB", (48, 48), (number * 20, j * 40, 99)).save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"What is {j}?"}]
        messages = [{"role": "user", "content": content}]
        answer = await api.chat.completions.create(
            model="m", messages=messages, max_tokens=c.tokens, temperature=2, top_p=1, seed=number
        )
        tokens += answer.usage.completion_tokens
    return tokens


async def measure(api: openai.AsyncOpenAI, c: Bench, clients: int) -> str:
    """A line of figures."""
    await client(api, c, 99)
    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*(client(api, c, j) for j in range(clients))))
    seconds = time.perf_counter() - start
    rate = clients * c.requests / seconds
    return f"{clients:3} at once: {tokens / seconds:8.0f} tokens/s {rate:7.1f} requests/s ({tokens} tokens)"


async def figures(url: str, c: Bench) -> list[str]:
    """Alone, then all at once."""
    api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return [await measure(api, c, clients) for clients in (1, c.clients)]


def main(c: Bench) -> None:
    """Start the recipe, ask it, and stop it."""
    command = [sys.executable, ROOT / "recipes/serve.py", "--weights", *c.weights, "--template", c.template]
    with subprocess.Popen([*map(str, command), "--port", "0", "--name", "m"], stdout=subprocess.PIPE, text=True) as p:
        try:
            print("\n".join(asyncio.run(figures(p.stdout.readline().split()[1], c))))
        finally:
            p.terminate()


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
