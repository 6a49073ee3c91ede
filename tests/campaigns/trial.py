"""One spoiled input, read in a process of its own limits, and what may come of it.

A worker is forked from a process that has imported everything, and reads one input after another. What ends it (an
input that takes too long, or makes a library fall) is that input's violation, and a new worker goes on behind it.
"""

import json
import os
import re
import resource
import selectors
import shutil
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import IO

from mutations import mutate
from subjects import Subject, digest, digestible

from llava_fn import errors

DOCUMENTED = (ValueError, *(kind for kind in vars(errors).values() if isinstance(kind, type)))
LONGEST = 20_000  # characters of a message that a person may be given
TELLS = re.compile(r"alloc|out of memory|Cannot map", re.IGNORECASE)  # in what libraries say of too little memory


@dataclass(frozen=True)
class Limits:
    """Of one input."""

    seconds: int = 10
    memory: int = 2 * 2**30  # bytes of the process


@dataclass(frozen=True)
class Outcome:
    """verdict: equal, error, changed (and the format cannot tell) or violation. detail: the error, or what is wrong."""

    index: int
    subject: str
    mutation: str
    file: str
    verdict: str
    detail: str = ""


@dataclass(frozen=True)
class Campaign:
    """inputs: subject -> its valid input, and the digest of what is read from it."""

    subjects: Sequence[Subject]
    inputs: dict[str, tuple[Path, str]]
    seed: int
    limits: Limits
    work: Path  # a folder for the copies of the workers


def prepare(subjects: Sequence[Subject], seed: int, limits: Limits, work: Path) -> Campaign:
    """Write the valid inputs and read each once."""
    inputs = {}
    for j, subject in enumerate(subjects):
        folder = work / f"valid{j}/in"
        folder.mkdir(parents=True)
        subject.make(folder)
        value = subject.read(folder)
        subject.use(value)
        inputs[subject.name] = folder, digest(digestible(value))
    return Campaign(subjects, inputs, seed, limits, work)


# ---- one input


def spoil(c: Campaign, index: int, folder: Path) -> tuple[Subject, str, str, bool]:
    """Write input `index` over its copy in `folder`. -> subject, mutation, file, whether its sums were mended."""
    rng = Random(f"{c.seed}:{index}")
    subject = c.subjects[index % len(c.subjects)]
    name = rng.choice(subject.files)
    path = folder / name
    mutation, content = mutate(rng, path.name, path.read_bytes())
    path.unlink()  # what is mapped keeps its file
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content != "missing":
        {"empty": path.touch, "a folder": path.mkdir, "a link to itself": lambda: path.symlink_to(path),
         "a pipe": lambda: os.mkfifo(path), "/dev/zero": lambda: path.symlink_to("/dev/zero")}[content]()  # fmt: skip
        return subject, content, name, False
    sealed = subject.seal is not None and path.name != "SHA256SUMS" and rng.random() < 0.7
    if sealed:
        subject.seal(folder)
    return subject, mutation.name, name, sealed or mutation.seals


def judge(c: Campaign, subject: Subject, folder: Path, sealed: bool) -> tuple[str, str]:
    """Verdict and detail of what the reader makes of the folder."""
    step = "reading"
    try:
        value = subject.read(folder)
        if digest(digestible(value)) == c.inputs[subject.name][1]:
            return "equal", ""
        step = "using what was read without an error"
        subject.use(value)
    except BaseException as error:
        wrong = _undocumented(error, folder)
        where = "".join(traceback.format_exception(error)[-6:])[-3000:]
        return ("violation", f"{step}: {wrong}\n{where}") if wrong else ("error", str(error)[:LONGEST])
    if not subject.free and not sealed:
        return "violation", "another value was read, though a sum of the format says that it is wrong"
    return "changed", subject.free or "the sums were mended, so that the input says that it is so"


def _undocumented(error: BaseException, folder: Path) -> str:
    """What is wrong with an error, or "": it has to be of a documented kind and to name a file of the input."""
    chain, message = [error], str(error)
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    short = [e for e in chain if isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and TELLS.search(str(e)))]
    if short:
        return f"it wanted more memory than the limit ({short[0]!r:.200})"
    if type(error) not in DOCUMENTED and not (isinstance(error, OSError) and error.filename):
        return f"{type(error).__name__} is no documented error"
    names = [str(folder), *(path.name for path in folder.rglob("*"))]
    if not any(name in message for name in names):
        return "its message names no file of the input"
    return f"its message has {len(message)} characters" if len(message) > LONGEST else ""


# ---- workers


def _memory(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _one(c: Campaign, index: int, at: Path) -> Outcome:
    shutil.rmtree(at, ignore_errors=True)
    source, _ = c.inputs[c.subjects[index % len(c.subjects)].name]
    folder = Path(shutil.copytree(source, at, symlinks=True))
    subject, mutation, file, sealed = spoil(c, index, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process's memory begins anew
    signal.alarm(c.limits.seconds)  # its default action ends the process
    verdict, detail = judge(c, subject, folder, sealed)
    signal.alarm(0)
    if (peak := _memory("VmHWM")) > c.limits.memory:
        verdict, detail = "violation", f"{peak / 2**20:.0f} MiB of memory; {verdict}: {detail}"
    return Outcome(index, subject.name, mutation, file, verdict, detail.replace(str(folder), "IN"))


def _work(c: Campaign, indices: Sequence[int], at: Path, out: IO[str]) -> None:
    limit = _memory("VmData") + c.limits.memory - _memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(os.open(at.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)  # libraries' own messages
    for index in indices:
        print(json.dumps(asdict(_one(c, index, at))), file=out, flush=True)


def _fork(c: Campaign, indices: Sequence[int], at: Path) -> tuple[int, IO[bytes]]:
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, os.fdopen(read, "rb", buffering=0)  # what is not read stays in the pipe, where a selector sees it
    try:
        os.close(read)
        with os.fdopen(write, "w") as out:
            _work(c, indices, at, out)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def outcomes(c: Campaign, indices: Sequence[int], processes: int) -> Iterator[Outcome]:
    """The outcome of each input, as they come from workers beside each other."""
    left = [list(indices[j::processes]) for j in range(processes)]
    with selectors.DefaultSelector() as selector:
        for j in range(processes):
            _start(c, left[j], j, selector)
        while selector.get_map():
            for key, _ in selector.select():
                yield from _heard(c, left[key.data[0]], key, selector)


def _start(c: Campaign, indices: list[int], j: int, selector: selectors.BaseSelector) -> None:
    if indices:
        pid, lines = _fork(c, indices, c.work / f"worker{j}")
        selector.register(lines, selectors.EVENT_READ, (j, pid))


def _heard(
    c: Campaign, indices: list[int], key: selectors.SelectorKey, selector: selectors.BaseSelector
) -> Iterator[Outcome]:
    """The outcome of a worker's next input. Where it has fallen, another worker goes on. indices: those without one."""
    (j, pid), lines = key.data, key.fileobj
    if line := lines.readline():
        indices.pop(0)
        yield Outcome(**json.loads(line))
        return
    selector.unregister(lines)
    lines.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if indices:
        yield _fallen(c, indices.pop(0), c.work / f"worker{j}", status)
    _start(c, indices, j, selector)


def _fallen(c: Campaign, index: int, at: Path, status: int) -> Outcome:
    """The outcome of an input that ended its worker."""
    why = {-signal.SIGALRM: f"not done after {c.limits.seconds} s", 1: "the campaign itself failed"}
    said = at.with_suffix(".log").read_text(errors="replace")[-1000:]
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    shutil.rmtree(at, ignore_errors=True)
    folder = Path(shutil.copytree(c.inputs[c.subjects[index % len(c.subjects)].name][0], at))
    subject, mutation, file, _ = spoil(c, index, folder)
    detail = f"{why.get(status, f'the process ended by {name}')}\n{said}"
    return Outcome(index, subject.name, mutation, file, "violation", detail)
