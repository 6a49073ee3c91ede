"""The one thread that computes. Requests reach it by a queue, and their pieces leave by a call that never waits."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llava_fn.generate.assistant import Assistant
from llava_fn.serve import engine
from llava_fn.serve.ask import Refused
from llava_fn.serve.engine import Job, Piece
from llava_fn.serve.options import Limits

Emit = Callable[[Piece | Refused], None]


@dataclass(frozen=True)
class Ticket:
    """A request on its way. emit: called by the thread with each piece, or with why there are no more."""

    name: str
    jobs: tuple[Job, ...]
    emit: Emit
    deadline: float  # of time.monotonic

    @staticmethod
    def of(name: str, jobs: tuple[Job, ...], emit: Emit, seconds: float) -> Ticket:
        """One that has `seconds` from now."""
        return Ticket(name, jobs, emit, time.monotonic() + seconds)


class Worker:
    """Owns the model's thread. `submit` and `cancel` may be called from any other, and return at once."""

    def __init__(self, a: Assistant, slots: int, limits: Limits, crashed: Callable[[], None] = lambda: None) -> None:
        """crashed: called if the thread ends by an error, which `error` then holds."""
        self._a, self._limits, self._crashed = a, limits, crashed
        self._desk = engine.empty(a, slots)
        self._inbox: queue.SimpleQueue[Ticket | str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: set[str] = set()  # names of requests that have no slot yet
        self._open = True
        self._tickets: dict[str, Ticket] = {}  # from here on the thread's own
        self._left: dict[str, int] = {}
        self._jobs: deque[Job] = deque()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine")

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Answer a request. Raises Refused if too many wait already, or if the thread has ended."""
        with self._lock:
            if not self._open:
                raise Refused(503, "the server is stopping, or its model has failed", code="stopped")
            if len(self._waiting) >= self._limits.queue:
                raise Refused(429, f"{len(self._waiting)} requests are waiting already; try again later", code="busy")
            self._waiting.add(ticket.name)
            self._inbox.put(ticket)

    def cancel(self, name: str) -> None:
        """Nobody waits for this request any more: its slots are free at the next step. It may be done already."""
        self._begun(name)
        self._inbox.put(name)

    def stop(self) -> None:
        """End the thread; what is still under way is refused."""
        self._inbox.put(None)
        self._thread.join()

    def figures(self) -> dict[str, int]:
        """How many slots are free and how many requests wait."""
        return {"slots": len(self._desk.seats), "free": self._desk.free, "waiting": len(self._waiting)}

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
            self._crashed()

    def _messages(self) -> Iterator[Ticket | str | None]:
        """What has come in; waits for something if there is nothing to do."""
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
            self._left[message.name] = len(message.jobs)
            self._jobs.extend(message.jobs)
        elif message is not None:
            self._drop(message)
        return message is not None

    def _drop(self, name: str) -> Ticket | None:
        self._begun(name)
        self._jobs = deque(job for job in self._jobs if job.name[0] != name)
        self._desk = engine.release(self._desk, name)
        self._left.pop(name, None)
        return self._tickets.pop(name, None)

    def _begun(self, name: str) -> None:
        with self._lock:
            self._waiting.discard(name)

    def _expire(self) -> None:
        now, limit = time.monotonic(), self._limits.seconds
        for name in [t.name for t in self._tickets.values() if t.deadline < now]:
            why = f"not done within this server's limit of {limit:g} seconds"
            self._drop(name).emit(Refused(504, why, code="time"))

    def _work(self) -> None:
        """One job more, if there is a slot, and one step: those that are being answered never wait for two prompts."""
        if self._jobs and self._desk.free:
            job = self._jobs.popleft()
            self._begun(job.name[0])
            self._desk = engine.admit(self._a, self._desk, job)
        self._desk, pieces = engine.step(self._a, self._desk)
        for piece in pieces:
            name = piece.name[0]
            self._tickets[name].emit(piece)
            self._left[name] -= piece.finish is not None
            if not self._left[name]:
                self._drop(name)
