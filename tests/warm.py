"""Recipes for tests, without the seconds of their imports: a process that has imported everything forks for each.

The fixture `warm` is one such process for each worker of pytest:

    done = warm.run("python recipes/infer.py --help", folder, env)
    pids = warm.start_ranks(2, lambda rank: ["recipes/pretrain.py"], folder, env, lambda rank: folder / f"log{rank}")
    assert warm.statuses(pids) == [0, 0]
"""

import ctypes
import importlib.util
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
IMPORTS = """torch tensordict tyro matplotlib.pyplot PIL.Image sentencepiece torchdata.nodes safetensors.torch einops
llava_fn.evaluate.task llava_fn.evaluate.finish llava_fn.runs.answers llava_fn.runs.run llava_fn.launch.cli uvicorn
llava_fn.serve.app"""


# A signal for a process, and for all that it has started, once files of its folder that match a pattern have so many
# lines together; a folder counts as one.
Strike = tuple[int, str, int]


class Warm:
    """One warm process, for commands `python FILE args` and `python -m MODULE args`."""

    def __enter__(self) -> "Warm":
        # one thread, as of torchrun's processes: sums of two threads round otherwise, and no thread survives a fork
        env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, **job: object) -> int:
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(
        self, argv: Sequence, cwd: Path, env: dict[str, str], out: Path, err: Path | None = None,
        strike: Strike | None = None,
    ) -> int:  # fmt: skip
        """`python ARGV` in folder `cwd` with an empty standard input and no other variables than `env`. -> its id.

        Without `err`, both streams go to `out`. The process can be killed by its id; `wait` takes its status. strike:
        the process gets a signal at an instant of its own work, which it cannot have passed when the signal comes.
        """
        words = [str(word) for word in argv]
        return self._ask(argv=words, cwd=str(cwd), env=env, out=str(out), err=str(err or out), strike=strike)

    def wait(self, pid: int) -> int:
        """The exit status, or minus the signal that ended the process."""
        return self._ask(wait=pid)

    def statuses(self, pids: list[int]) -> list[int]:
        return [self.wait(pid) for pid in pids]

    def run(self, command: str | Sequence, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
        """A command that begins with `python`, from its start to its end. No shell reads it."""
        words = shlex.split(command) if isinstance(command, str) else command
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            status = self.wait(self.start(words[1:], cwd, env, out, err))
            return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())

    def start_ranks(
        self, world: int, argv: Callable[[int], Sequence], cwd: Path, env: dict[str, str], out: Callable[[int], Path],
        strike: Strike | None = None,
    ) -> list[int]:  # fmt: skip
        """The ids of `world` processes that find each other; argv and out: by rank. strike: of the last rank."""
        self.store, variables = rendezvous(world)  # that of the ranks before ends here
        return [
            self.start(argv(r), cwd, env | own, out(r), strike=strike if r == world - 1 else None)
            for r, own in enumerate(variables)
        ]


def rendezvous(world: int):
    """The store of `world` processes, and the variables of each, as torchrun's agent gives them.

    The store takes a free port when it binds it, so no other program can take that port in between. Keep the store
    until the processes have ended.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"TORCHELASTIC_RUN_ID": f"test-{store.port}", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
    return store, [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]


def ranks(worker: Callable, args: tuple, world: int) -> None:
    """worker(rank, *args) in `world` processes, forked from one that has imported torch (conftest.py), to their end.

    An exception in one ends the others and is raised here.
    """
    from torch.multiprocessing import start_processes

    start_processes(worker, args, world, start_method="forkserver")


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def family(pid: int) -> list[int]:
    """All processes that this one and those started."""
    return [p for child in children(pid) for p in (child, *family(child))]


def lines(paths: Iterable[Path]) -> int:
    """Lines of those files that are there."""
    return sum(path.read_bytes().count(b"\n") for path in paths if path.is_file())


def ended(pid: int) -> bool:
    """Whether a process that was started, and not waited for, has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def until(condition: Callable, *processes: int, seconds: float = 300.0) -> bool:
    """Look again and again. -> False if a process ended before."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        if any(map(ended, processes)):
            return bool(condition())
        time.sleep(0.0005)
    return True


def recipe(name: str):
    """A recipe as a module, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / f"recipes/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _strike(number: int, pattern: str, count: int) -> None:
    """Beside the work of this process, which waits for the signal: watched from elsewhere, it could come too late."""
    while lines(found := list(Path().glob(pattern))) + sum(map(Path.is_dir, found)) < count:
        time.sleep(0.0005)
    all_of_them = (os.getpid(), *family(os.getpid()))
    helper = os.fork()  # a worker takes what its parent sends for the parent's own word
    if not helper:
        for pid in all_of_them:
            os.kill(pid, number)
        os._exit(0)
    ctypes.PyDLL(None).waitpid(helper, None, 0)  # and keeps the interpreter's lock meanwhile


def _child(job: dict) -> None:
    """The command, in this process: never returns."""
    status, flags = 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOCTTY
    for number, name in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(name, flags), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # the one that there is has read this process's jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    if job["strike"]:
        threading.Thread(target=_strike, args=job["strike"], daemon=True).start()
    module = job["argv"][0] == "-m"
    sys.argv = job["argv"][module:]
    try:
        if module:
            sys.path[0] = job["cwd"]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the interpreter takes a second to take itself apart


if __name__ == "__main__":
    for name in IMPORTS.split():
        __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in what is forked"
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            _child(job)
