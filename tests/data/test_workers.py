"""Worker processes: order, errors, signals, and their death."""

import os
import signal
import time
from multiprocessing import forkserver, get_context

import pytest

from llava_fn.data.workers import SIGNALS, mapped


def work(item):
    """Squares; -1 is a bad item, -2 a bug, and -9 is killed."""
    if item == -9:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == -2:
        raise ZeroDivisionError("a bug")
    if item < 0:
        raise ValueError(f"item {item} is bad")
    return item * item


def blocked(_):
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_errors_as_they_were(workers):
    results = mapped(work, iter([3, 1, 2, -1]), workers)
    assert [next(results) for _ in range(3)] == [9, 1, 4]
    with pytest.raises(ValueError, match="^item -1 is bad"):
        next(results)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(mapped(work, [-2], workers))


def test_a_killed_worker_is_noticed(recwarn):
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match="exited unexpectedly.*use fewer of them"):
        list(mapped(work, [1, -9, *range(20)], 2))
    assert time.monotonic() - start < 60  # and not never


def test_workers_do_not_see_the_signals_of_a_cluster():
    earlier = get_context("forkserver").Process(target=int)  # the server that it leaves behind blocks nothing
    earlier.start()
    earlier.join()
    (seen,) = mapped(blocked, [0], 1)
    assert set(SIGNALS) <= seen and not set(SIGNALS) & blocked(0)


def test_workers_do_not_load_the_package_of_an_accelerator(monkeypatch):
    name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    monkeypatch.setenv(name, "1")
    new = forkserver.ForkServer()  # a run has none yet
    monkeypatch.setattr(forkserver, "connect_to_new_process", new.connect_to_new_process)
    assert list(mapped(os.getenv, [name], 1)) == ["0"] and os.environ[name] == "1"
