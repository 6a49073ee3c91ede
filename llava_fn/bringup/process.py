"""A part in a process of its own with a time limit: one that crashes or hangs costs its own rows."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

ROW = '{"part": '  # what a line of a part's standard output begins with, if it is a row: JSON
DEADLINE = "LLAVA_FN_DEADLINE"  # the variable with the time.time() at which a part shows the places of its threads


def show(part: str, row: Mapping) -> None:
    """Print a row, as `run` reads it."""
    print(json.dumps({"part": part, **row}, default=str), flush=True)


@contextlib.contextmanager
def telling(part: str) -> Iterator[None]:
    """An error inside is shown as a row with the key "raised", and goes on.

    Shortly before `run` ends this process, the places of its threads go to the standard error.
    """
    if DEADLINE in os.environ:
        faulthandler.dump_traceback_later(max(1.0, float(os.environ[DEADLINE]) - time.time()))
    try:
        yield
    except Exception as error:
        show(part, {"what": "an error", "raised": f"{type(error).__name__}: {error}"})
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


def run(command: Sequence[str], limit: float, row: Callable[[str], object], log: IO[str]) -> str:
    """Runs a part; row(line) takes each row as it comes, and the log all else. Returns why it failed, or "".

    What the part itself has started ends with it at the limit, in seconds.
    """
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path[1:])), DEADLINE: str(time.time() + 0.9 * limit)}
    p = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=os.environ | own
    )
    over = threading.Event()

    def kill() -> None:
        over.set()
        os.killpg(p.pid, signal.SIGKILL)

    timer = threading.Timer(limit, kill)
    timer.start()
    assert p.stdout
    try:
        for line in p.stdout:
            if line.startswith(ROW):
                row(line)
            else:
                log.write(line)
                log.flush()
        status = p.wait()
    except BaseException:  # Ctrl-C does not reach the part's session
        os.killpg(p.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    if over.is_set():
        return f"over its limit of {limit:.0f} s"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}" if status else ""
