"""A part in a process of its own with a time limit: one that crashes or hangs costs its own rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO

ROW = '{"part": '  # what a line of a part's standard output begins with, if it is a row: JSON


def run(command: Sequence[str], limit: float, row: Callable[[str], object], log: IO[str]) -> str:
    """Runs a part; row(line) takes each row as it comes, and the log all else. Returns why it failed, or "".

    What the part itself has started ends with it at the limit, in seconds.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path[1:]))}
    p = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=environment
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
