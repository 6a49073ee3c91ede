"""Work on many items in worker processes, in order, that notices when a worker is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from threading import Thread
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from torchdata.nodes import IterableWrapper, Loader, Mapper, Prefetcher

X = TypeVar("X")
Y = TypeVar("Y")
Outcome = tuple[Any, Exception | None]  # a result, or None and the error that there is instead
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # what a terminal or a cluster sends to all processes at once


def mapped(work: Callable[[X], Y], items: Iterable[X], workers: int) -> Iterator[Y]:
    """work(item) of each item, in order, from `workers` processes that work ahead; 0: from a thread.

    work: is pickled. A ValueError or OSError that it raises is raised here, as it was. ChildProcessError if a worker
    has ended, as by the system for lack of memory.
    """
    pairs = _from_processes(work, items, workers) if workers else _from_a_thread(work, items)
    for result, error in pairs:
        if error is not None:
            raise error
        yield result


def _from_a_thread(work: Callable[[X], Y], items: Iterable[X]) -> Iterable[Outcome]:
    return Loader(Prefetcher(Mapper(IterableWrapper(items), _Work(work).__getitem__), 2))


def _from_processes(work: Callable[[X], Y], items: Iterable[X], workers: int) -> Iterator[Outcome]:
    loader = DataLoader(
        _Work(work), batch_size=None, sampler=items, num_workers=workers, collate_fn=_same,
        multiprocessing_context="forkserver", worker_init_fn=_end_with_parent, generator=torch.Generator(),
    )  # fmt: skip
    try:
        with _without_signals(), _without_accelerator():
            results = iter(loader)
        yield from results
    except (RuntimeError, OSError, EOFError) as lost:  # of the loader, not of the work
        raise ChildProcessError(
            f"a process that reads data has failed: {lost}. If the machine ran out of memory, use fewer of them "
            "(data.workers); a run that is started again goes on from its last checkpoint"
        ) from lost


@dataclass(frozen=True)
class _Work(Dataset):
    """What a worker process holds: an item in, its outcome out."""

    work: Callable[[Any], object]

    def __getitem__(self, item: object) -> Outcome:
        try:
            return self.work(item), None
        except (ValueError, OSError) as error:
            return None, error


def _same(result: Y) -> Y:
    return result


@contextmanager
def _without_signals() -> Iterator[None]:
    """What starts inside does not see SIGNALS: the process that started it decides when all of them end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    resource_tracker.ensure_running()  # whose start unblocks some of them
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_accelerator() -> Iterator[None]:
    """What starts inside does not import torch_npu with torch: a worker has no use for it, and it takes seconds."""
    name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    before = {key: value for key, value in os.environ.items() if key == name}
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ |= before


def _end_with_parent(_: int) -> None:
    """In a worker process: end with the process that started it, which may be killed, and at its SIGTERM.

    It blocks SIGNALS too: the server that workers are forked from may have been started where they were not blocked.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def until_told() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
            pass  # of a cluster
        os._exit(1)

    Thread(target=until_told, daemon=True).start()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
