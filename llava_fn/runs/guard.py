"""What stands around a run: a lock on its folder, so that a second run is refused, and the watchdog."""

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
    with lock(folder, world), watching(world, parallel.silence) as watch:
        yield watch


@contextmanager
def lock(folder: Path, world: World) -> Iterator[None]:
    """Hold the folder's lock on rank 0 while the body runs. The system frees it when the process ends, however it ends.

    ValueError names the process that holds it. On NFS the lock holds between machines where the server locks files; a
    filesystem without locks is warned of.
    """
    if not world.first:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            f.seek(0)
            raise ValueError(
                f"{folder} is in use by {f.read() or 'another process'}; wait for its end, or choose another run folder"
            ) from error
        except OSError as error:
            print(
                f"warning: the filesystem of {folder} has no locks ({error}); see to it that no other run writes there",
                file=sys.stderr,
            )
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        yield
