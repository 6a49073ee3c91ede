"""What a request may ask of the server. Nothing here imports torch, so that the recipe can show its options at once."""

from __future__ import annotations

from dataclasses import dataclass

from llava_fn.data.options import MAX_PIXELS

LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Web:
    """Who may reach the server, and by which names."""

    host: str = "127.0.0.1"  # 0.0.0.0: other machines can reach it
    hosts: tuple[str, ...] = ()  # more names of this machine in requests, as a proxy in front passes them on
    cors: tuple[str, ...] = ()  # origins whose pages may ask, as https://example.org; *: all
    root_path: str = ""  # the path under which a proxy in front shows this server

    def __post_init__(self) -> None:
        """ValueError names an option that no request could match."""
        for origin in self.cors:
            if origin != "*" and ("://" not in origin or origin.count("/") != 2):
                raise ValueError(f"cors={origin}: give an origin as https://example.org, without a path, or *")
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"root_path={self.root_path}: must begin with a /")

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """The names that requests must use; none if they may use any, as where other machines reach it."""
        return (*LOOPBACK, *self.hosts) if self.host in LOOPBACK or self.hosts else ()


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most."""

    pixels: int = 40_000_000  # of an image, width * height
    prompt: int = 3072  # tokens, image positions included
    tokens: int = 1024  # of an answer
    samples: int = 8  # answers to a request
    chunk: int = 1024  # tokens of prompts that are computed between two tokens of the answers under way
    queue: int = 128  # requests that wait for a slot, and as many that are being read
    body: int = 20 * 2**20  # bytes of a request
    bodies: int = 256 * 2**20  # bytes of all requests that are being read
    seconds: float = 300.0  # from a request's arrival to the end of its answer

    def __post_init__(self) -> None:
        """ValueError names a limit that leaves nothing."""
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name}={value}: must be above 0")
        if self.pixels > MAX_PIXELS:
            raise ValueError(f"limits.pixels={self.pixels}: must be at most {MAX_PIXELS}")

    @property
    def characters(self) -> int:
        """More than a prompt's text can have: to tokenize megabytes takes minutes. No token has 64 characters."""
        return 64 * self.prompt
