"""What the server counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llava_fn.serve.ask import Asked
from llava_fn.serve.refused import Refused
from llava_fn.serve.seat import AnswerName, Delta

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
EACH = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class ServerMetrics:
    """Counters, gauges and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.requests = Counter(
            "llava_fn_requests", "Requests that have ended; 499: the client had gone", ("endpoint", "status"),
            registry=r,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "llava_fn_prompt_tokens", "Tokens of prompts, image positions included", registry=r
        )
        self.generated_tokens = Counter("llava_fn_generated_tokens", "Tokens of answers", registry=r)
        self.images = Counter("llava_fn_images", "Images in prompts", registry=r)
        self.first = Histogram(
            "llava_fn_time_to_first_token_seconds", "From a request's arrival to each answer's first token",
            registry=r, buckets=FIRST,
        )  # fmt: skip
        self.each = Histogram(
            "llava_fn_time_per_token_seconds", "Between two tokens of an answer", registry=r, buckets=EACH
        )
        self.waiting = Gauge("llava_fn_requests_waiting", "Requests that have no slot yet", registry=r)
        self.slots = Gauge("llava_fn_slots", "Slots for answers", ("state",), registry=r)
        self.pages = Gauge(
            "llava_fn_cache_pages", "Pages of the cache; kept: of finished answers alone", ("state",), registry=r
        )

    def ended(self, endpoint: str, status: int) -> None:
        """Count a request."""
        self.requests.labels(endpoint, str(status)).inc()

    def accepted(self, asked: Asked) -> None:
        """Count what a request brings."""
        self.prompt_tokens.inc(sum(len(answer.ids) for answer in asked.distinct))
        self.images.inc(sum(len(answer.pictures) for answer in asked.distinct))

    def text(self, figures: Mapping[str, int]) -> bytes:
        """All of it in the text format 0.0.4. figures: the worker's."""
        self.waiting.set(figures["waiting"])
        self.slots.labels("free").set(figures["free"])
        self.slots.labels("busy").set(figures["slots"] - figures["free"])
        busy, kept = figures["busy_pages"], figures["kept_pages"]
        for state, pages in (("free", figures["pages"] - busy - kept), ("busy", busy), ("kept", kept)):
            self.pages.labels(state).set(pages)
        return generate_latest(self.registry)


@dataclass(frozen=True)
class Timed:
    """Hands on the deltas of a request, and measures them in the thread that writes them. arrived: the request."""

    metrics: ServerMetrics
    emit: Callable[[Delta | Refused], object]
    arrived: float = field(default_factory=time.perf_counter)
    last: dict[AnswerName, float] = field(default_factory=dict)

    def __call__(self, delta: Delta | Refused) -> None:
        if isinstance(delta, Delta):
            now, before = time.perf_counter(), self.last.get(delta.name)
            histogram = self.metrics.first if before is None else self.metrics.each
            histogram.observe(now - (self.arrived if before is None else before))
            self.metrics.generated_tokens.inc(len(delta.ids))
            self.last[delta.name] = now
        self.emit(delta)
