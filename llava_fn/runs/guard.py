"""What stands around a run: a lock on what it writes, so that a second run is refused, and the watchdog."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_fn.config import Parallel
from llava_fn.launch.processes import World
from llava_fn.launch.watchdog import Watch, watching


@contextmanager
def guard(folder: Path, world: World, parallel: Parallel) -> Iterator[Watch]:
    """The watch of a run, while its folder is locked. ValueError as of `lock`."""
    with lock(folder, folder / "lock", world), watching(world, parallel.silence) as watch:
        yield watch


@contextmanager
def lock(what: Path, file: Path, world: World) -> Iterator[None]:
    """Hold the lock of what is written on rank 0 while the body runs. The system frees it however the process ends.

    file: is locked, and names the process that holds it, as ValueError does. On NFS the lock holds between machines
    where the server locks files; a filesystem without locks is warned of.
    """
    if not world.first:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            f.seek(0)
            raise ValueError(
                f"{what} is in use by {f.read() or 'another process'}; wait for its end, or name another place to write"
            ) from error
        except OSError as error:
            print(
                f"warning: the filesystem of {what} has no locks ({error}); see that no other command writes there",
                file=sys.stderr,
            )
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        yield
