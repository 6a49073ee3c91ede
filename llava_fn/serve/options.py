"""What a request may ask of the server. Nothing here imports torch, so that the recipe can show its options at once."""

from __future__ import annotations

from dataclasses import dataclass

from llava_fn.data.options import MAX_PIXELS


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most."""

    pixels: int = 40_000_000  # of an image, width * height
    prompt: int = 3072  # tokens, image positions included
    tokens: int = 1024  # of an answer
    samples: int = 8  # answers to a request
    queue: int = 128  # requests that wait for a slot, and as many that are being read
    body: int = 20 * 2**20  # bytes of a request
    seconds: float = 300.0  # from a request's arrival to the end of its answer

    def __post_init__(self) -> None:
        """ValueError names a limit that leaves nothing."""
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name}={value}: must be above 0")
        if self.pixels > MAX_PIXELS:
            raise ValueError(f"limits.pixels={self.pixels}: must be at most {MAX_PIXELS}")
