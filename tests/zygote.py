"""Ranks for tests, cheap: a process that has imported everything, and forks as many processes as it is asked for.

    python tests/zygote.py recipes/evaluate.py llava_fn.evaluate.finish

The modules after the recipe are those that it imports only when it runs.
A line on stdin is [world, port, argv, log]; the answer is the list of process ids, and on "wait" their exit statuses.
"""

import importlib
import importlib.util
import json
import os
import runpy
import sys

ENTRY = sys.argv[1]


def imported(path):
    """Import what the recipe imports, without running it, and what it imports when it runs."""
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe"] = module
    spec.loader.exec_module(module)
    for name in sys.argv[2:]:
        importlib.import_module(name)


def rank(number, world, port, argv, log):
    """One process of a job: never returns."""
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if world > 1:
            one = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in one.items()})
        sys.argv = [ENTRY, *argv]
        runpy.run_path(ENTRY, run_name="__main__")
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else 1 if error.code else 0
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(status)


imported(ENTRY)
print("ready", flush=True)
pids = []
for line in sys.stdin:
    if line.strip() == "wait":
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
        continue
    world, port, argv, log = json.loads(line)
    pids = []
    for number in range(world):
        pid = os.fork()
        if not pid:
            rank(number, world, port, argv, log)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
