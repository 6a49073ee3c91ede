"""The one thread that computes. Requests reach it by a queue, and their deltas leave by a call that never blocks."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llava_fn.generate.family import Family
from llava_fn.serve import engine
from llava_fn.serve.options import Limits
from llava_fn.serve.refused import Refused
from llava_fn.serve.seat import AnswerRequest, Delta

Emit = Callable[[Delta | Refused], object]


@dataclass(frozen=True)
class Ticket:
    """An HTTP request on its way through the worker.

    emit: called by the worker's thread with each delta, and with a Refused if the answer ends before its time.
    """

    name: str
    answers: tuple[AnswerRequest, ...]
    emit: Emit
    deadline: float  # by time.monotonic

    @staticmethod
    def of(name: str, answers: tuple[AnswerRequest, ...], emit: Emit, seconds: float) -> Ticket:
        """A ticket whose deadline is in `seconds`."""
        return Ticket(name, answers, emit, time.monotonic() + seconds)


class Worker:
    """Owns the model's thread. `submit` and `cancel` may be called from any other, and return at once."""

    def __init__(
        self, f: Family, slots: int, limits: Limits, on_crash: Callable[[], None] = lambda: None,
        cache_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """cache_tokens: of engine.pages_for. on_crash: called if the thread ends by an error, which is in `error`."""
        self._family, self._limits, self._on_crash = f, limits, on_crash
        self._desk = engine.empty(f, slots, limits.chunk, pages=engine.pages_for(f, slots, cache_tokens))
        self._inbox: queue.SimpleQueue[Ticket | str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: set[str] = set()  # names of requests that have no slot yet
        self._open = True
        self._tickets: dict[str, Ticket] = {}  # this and the next two are used by the thread alone
        self._unfinished: dict[str, int] = {}  # name of a request -> number of its answers that are not done
        self._pending: deque[AnswerRequest] = deque()  # answers that have no slot yet
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine")

    def warm(self) -> str:
        """Run each kind of step once, before `start`. Returns what that took, and the memory of the slots."""
        start = time.perf_counter()
        self._desk = engine.warm(self._family, self._desk)
        seconds, slots = time.perf_counter() - start, len(self._desk.seats)
        room = f"{slots} slots, a cache of {self.room} tokens: {self._desk.bytes / 2**30:.2f} GiB"
        return f"{room}; warmed up in {seconds:.1f} s"

    @property
    def room(self) -> int:
        """Tokens of the cache."""
        return self._desk.pages.count * self._desk.pages.size

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Answer a request. Raises Refused if it never fits, if too many wait already, or if the thread has ended."""
        for answer in ticket.answers:
            if not engine.fits(self._desk, answer):
                prompt, tokens = len(answer.ids), answer.decoding.tokens
                what = f"the prompt has {prompt} tokens; with {tokens} for the answer that is over"
                raise Refused(
                    400, f"{what} this server's cache of {self.room} (--cache-tokens); shorten it or ask for fewer",
                    "max_tokens",
                )  # fmt: skip
        with self._lock:
            if not self._open:
                raise Refused(503, "the server is stopping, or its model has failed", code="stopped")
            if len(self._waiting) >= self._limits.queue:
                raise Refused(429, f"{len(self._waiting)} requests are waiting already; try again later", code="busy")
            self._waiting.add(ticket.name)
            self._inbox.put(ticket)

    def cancel(self, name: str) -> None:
        """Give up a request, which may be done already. Its slots are free at the next step."""
        self._leave_queue(name)
        self._inbox.put(name)

    def stop(self) -> None:
        """End the thread; requests that are not done get a Refused."""
        self._inbox.put(None)
        self._thread.join()

    def figures(self) -> dict[str, int]:
        """Numbers of slots, of free slots, of requests that wait for a slot, and of the cache's pages."""
        desk = self._desk
        figures = {"slots": len(desk.seats), "free": desk.free, "waiting": len(self._waiting)}
        return figures | desk.pages.figures(desk.running)

    def _run(self) -> None:
        why = Refused(503, "the server is stopping", code="stopped")
        try:
            while all(self._receive(message) for message in self._messages()):
                self._expire()
                self._work()
        except Exception as error:
            self.error, why = error, Refused(500, "the model has failed; see the server's log", code="failed")
        with self._lock:
            self._open = False
        for message in self._drain():
            if isinstance(message, Ticket):
                message.emit(why)
        for ticket in self._tickets.values():
            ticket.emit(why)
        if self.error:
            self._on_crash()

    def _messages(self) -> Iterator[Ticket | str | None]:
        """What is in the inbox; blocks until something comes if there is nothing to compute."""
        if not self._tickets:
            yield self._inbox.get()
        yield from self._drain()

    def _drain(self) -> Iterator[Ticket | str | None]:
        while True:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return

    def _receive(self, message: Ticket | str | None) -> bool:
        if isinstance(message, Ticket):
            self._tickets[message.name] = message
            self._unfinished[message.name] = len(message.answers)
            self._pending.extend(message.answers)
        elif message is not None:
            self._remove(message)
        return message is not None

    def _remove(self, name: str) -> None:
        self._leave_queue(name)
        self._pending = deque(answer for answer in self._pending if answer.name[0] != name)
        self._desk = engine.release(self._desk, name)
        self._unfinished.pop(name, None)
        self._tickets.pop(name, None)

    def _leave_queue(self, name: str) -> None:
        with self._lock:
            self._waiting.discard(name)

    def _expire(self) -> None:
        now, limit = time.monotonic(), self._limits.seconds
        for ticket in [t for t in self._tickets.values() if t.deadline < now]:
            self._remove(ticket.name)
            ticket.emit(Refused(504, f"not done within this server's limit of {limit:g} seconds", code="time"))

    def _work(self) -> None:
        """Admit what the next step can begin to prefill, and one step."""
        while self._pending and engine.takes(self._desk, self._pending[0]):
            request = self._pending.popleft()
            self._leave_queue(request.name[0])
            self._desk = engine.admit(self._family, self._desk, request)
        self._desk, deltas = engine.step(self._family, self._desk)
        for delta in deltas:
            name = delta.name[0]
            self._tickets[name].emit(delta)
            self._unfinished[name] -= delta.finish is not None
            if not self._unfinished[name]:
                self._remove(name)
