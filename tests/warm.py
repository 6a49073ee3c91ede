"""Recipes for tests, without the seconds of their imports: a process that has imported torch forks for each command.

    with Warm() as warm:
        done = warm.run("python recipes/infer.py --help", folder, env)
"""

import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTS = "torch tensordict tyro matplotlib.pyplot PIL.Image sentencepiece torchdata.nodes safetensors.torch einops"


class Warm:
    """One warm process, for commands `python FILE args` and `python -m MODULE args`."""

    def __enter__(self) -> "Warm":
        env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, command: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
        """The command in folder `cwd`, with an empty standard input. No shell reads it."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            job = {"argv": shlex.split(command)[1:], "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())


def child(job: dict) -> None:
    """The command, in this process: never returns."""
    status = 1
    for number, name in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # the one that there is has read this process's jobs
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    module = job["argv"][0] == "-m"
    sys.argv = job["argv"][module:]
    try:
        if module:
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
        os._exit(status)


if __name__ == "__main__":
    for name in IMPORTS.split():
        __import__(name)
    for line in sys.stdin:
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        else:
            child(json.loads(line))
