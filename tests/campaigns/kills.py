"""Training and evaluation, killed at random instants again and again: what comes of it equals what nothing disturbed.

    python tests/campaigns/kills.py --train 1000 --evaluate 300 --seed 0

A command is started, one or all of its processes are killed with signal 9, and it is started again, until it ends.
After every kill each checkpoint that is there must be that of an undisturbed run, to the bit; at the end all figures,
parameters and moments, or all results. A run whose data worker is killed must end by itself, with the error that says
so, or as usual if it has had all its data. All else is a violation, which is printed with what the processes wrote. The
exit status is 1 if there is one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import pretraining  # noqa: E402
import tsvs  # noqa: E402
import warm as warmth  # noqa: E402
from warm import ROOT, Warm, children, ended, lines, until  # noqa: E402

from llava_fn import config  # noqa: E402
from llava_fn.checkpoint import folder as checkpoint  # noqa: E402
from llava_fn.config import Lora, Parallel  # noqa: E402
from llava_fn.data import emoji, emoji_chat  # noqa: E402
from llava_fn.data.options import Data, Source  # noqa: E402
from llava_fn.runs.options import Heldout, Saving  # noqa: E402

MODEL = config.Llava(
    config.Vision(image=16, patch=8, width=16, blocks=2, heads=2, ffn=32),
    config.Llama(vocab=512, width=16, blocks=2, heads=4, kv_heads=2, ffn=32),
)
FINAL = (".xlsx", "_acc.csv", "_summary.json")  # results that say nothing of time
WORKER = "a process that reads data has failed"
PLACES = ("start", "work", "save", "worker")
STARTING = 4  # lines that a command says before it works
HANG = 120.0  # seconds that a run may take to end after the death of a worker; it looks every 5, on a busy machine


@dataclass(frozen=True)
class Kind:
    """A command that is killed.

    argv: of all its processes, in a folder of its own; whole: more words for the undisturbed one. begun: how much of
    its work is done in a folder. wrong: what differs in a folder from the undisturbed one; of a command that has ended,
    or of one on the way.
    """

    name: str
    argv: Sequence[str]
    whole: Sequence[str]
    world: int
    places: Sequence[str]  # of PLACES
    begun: Callable[[Path], int]
    wrong: Callable[[Path, Path, bool], str]


def trained(folder: Path) -> int:
    """Updates that a run has logged."""
    return lines([folder / "run/metrics.jsonl"])


def answered(folder: Path) -> int:
    """Answers that an evaluation has written."""
    return lines(sorted(folder.glob("out/*/predictions/*.jsonl")))


def other_run(folder: Path, whole: Path, over: bool) -> str:
    """What a run has that an undisturbed one has not."""
    for step in checkpoint.steps(folder / "run/checkpoints"):
        at = f"run/checkpoints/{step:06d}"
        one, two = (checkpoint.load(place / at, moments=True) for place in (folder, whole))
        for a, b in ((one.params, two.params), *zip(one.moments, two.moments, strict=True)):
            try:
                pretraining.same(a, b)
            except AssertionError:
                return f"{at} has other numbers"
    if over and pretraining.figures(folder) != pretraining.figures(whole):
        return "metrics.jsonl has other figures"
    if over and pretraining.rows(folder, "skipped.jsonl") != pretraining.rows(whole, "skipped.jsonl"):
        return "skipped.jsonl has other records"
    return ""


def other_results(folder: Path, whole: Path, over: bool) -> str:
    """What results there are that an undisturbed evaluation has not."""
    one, two = ({p.name: p.read_bytes() for p in (f / "out").glob("*.*")} for f in (folder, whole))
    other = [name for name in two if over and name.endswith(FINAL) and one.get(name) != two[name]]
    return f"{', '.join(other)}: other results" if other else ""


def strike(kind: Kind, place: str, pids: list[int], folder: Path, whole: Path, rng: random.Random) -> bool:
    """Wait for an instant, and kill. -> False if the command ended before.

    The instant is drawn over what is left of the work, or over what a command says before it works.
    """
    done, total, checkpoints = kind.begun(folder), kind.begun(whole), folder / "run/checkpoints"
    if place == "start":
        said = rng.randint(0, STARTING)
        there = until(lambda: lines([folder / "log0"]) >= said, *pids)
    else:
        target = rng.randint(min(done + (place != "save"), total), total)
        there = until(lambda: kind.begun(folder) >= target, *pids)
    if place == "save":
        there = there and until(lambda: any(checkpoints.glob(checkpoint.TEMPORARY + "*")), *pids)
    time.sleep(rng.uniform(0, 0.004 if place == "save" else 0.05))
    if not there or any(map(ended, pids)):
        return False
    victims = pids
    if place == "worker":  # which the forkserver, a child, has started
        victims = [worker for child in children(pids[0]) for worker in children(child)][:1]
    for pid in rng.sample(victims, rng.randint(min(1, len(victims)), len(victims))):
        os.kill(pid, signal.SIGKILL)
    return bool(victims)


def finish(warm: Warm, pids: list[int], place: str, rng: random.Random) -> list[int]:
    """The statuses of all processes. The others are killed a moment later, as torchrun does; a worker's run is not."""
    if place == "worker":
        end = time.monotonic() + HANG
        while not all(map(ended, pids)) and time.monotonic() < end:
            time.sleep(0.05)
    else:
        time.sleep(rng.uniform(0, 0.3))
    for pid in pids:
        if not ended(pid):
            os.kill(pid, signal.SIGKILL)
    return warm.statuses(pids)


def start(warm: Warm, kind: Kind, folder: Path, *more: str) -> list[int]:
    env, argv = {**os.environ, "OMP_NUM_THREADS": "1"}, [*kind.argv, *more]
    if kind.world == 1:
        return [warm.start(argv, folder, env, folder / "log0")]
    return warm.start_ranks(kind.world, lambda _: argv, folder, env, lambda rank: folder / f"log{rank}")


def judge(kind: Kind, place: str, struck: bool, statuses: list[int], folder: Path, whole: Path) -> str:
    """What is wrong after a kill; empty if nothing is."""
    logs = "\n".join(path.read_text() for path in sorted(folder.glob("log*")))
    if place == "worker" and struck and statuses != [0] and (statuses != [1] or WORKER not in logs):
        return f"a dead worker: statuses {statuses}\n{logs}"
    if not struck and set(statuses) != {0}:
        return f"undisturbed, and statuses {statuses}\n{logs}"
    try:
        return kind.wrong(folder, whole, set(statuses) == {0})
    except Exception as error:
        return f"{error!r}\n{logs}"


def campaign(warm: Warm, kind: Kind, kills: int, seed: int, work: Path) -> Counter:
    """Kill a command so many times.

    -> counts: of kills by place, of later ones, which a checkpoint was there before, of torn saves, of runs that ended,
    of violations.
    """
    rng, counts, folder = random.Random(f"{seed} {kind.name}"), Counter(), work / "killed"
    whole = work / "whole"
    for place in (whole, folder):
        place.mkdir(parents=True)
    assert set(warm.statuses(start(warm, kind, whole, *kind.whole))) == {0}, (whole / "log0").read_text()
    killed = 0
    while killed < kills or not counts["ended"]:
        place = rng.choice(kind.places)
        pids = start(warm, kind, folder)
        struck = killed < kills and strike(kind, place, pids, folder, whole, rng)
        counts["later"] += struck and bool(checkpoint.steps(folder / "run/checkpoints"))
        statuses = finish(warm, pids, place, rng) if struck else warm.statuses(pids)
        counts[place] += struck
        if struck and (killed := killed + 1) % 50 == 0:
            print(
                f"{kind.name}: {killed} of {kills} kills, {counts['violations']} violations",
                file=sys.stderr,
                flush=True,
            )
        counts["torn"] += any(folder.glob(f"run/checkpoints/{checkpoint.TEMPORARY}*"))
        if wrong := judge(kind, place, struck, statuses, folder, whole):
            counts["violations"] += 1
            print(f"VIOLATION, {kind.name}, {dict(counts)}, {place}: {wrong}", file=sys.stderr, flush=True)
        if set(statuses) == {0} or wrong:
            counts["ended"] += not wrong
            shutil.rmtree(folder)
            folder.mkdir()
    shutil.rmtree(work)
    return counts


def kinds(work: Path) -> list[tuple[Kind, float]]:
    """The commands, each with its share of the kills of training; that of evaluation has none."""
    data = emoji.unpack(work / "data")
    records = json.loads((data / "train.json").read_text())[:24]
    (work / "some.json").write_text(json.dumps([*records, records[0] | {"id": "bad", "image": "images/none.png"}]))
    talks = emoji_chat.write(work / "chat", data)
    (work / "talks.json").write_text(json.dumps(json.loads((talks / "train.json").read_text())[:24]))
    (work / "held.json").write_text(json.dumps(json.loads((talks / "heldout.json").read_text())[:4]))

    pretrain, finetune = warmth.recipe("pretrain"), warmth.recipe("finetune")
    how = {"samples": 8, "workers": 0, "max_tokens": 300, "on_bad_record": "skip"}
    saving = Saving(save_interval=1, keep=2)
    one = replace(
        pretrain.EMOJI, run_dir=Path("run"), model=MODEL, tokenizer=data / "tokenizer.model", unpack=None, heldout=None,
        data=Data((Source(work / "some.json", data),), epochs=6.0, **how), saving=saving,
    )  # fmt: skip
    base = work / "base"
    two = finetune.Finetune(
        run_dir=Path("run"), base=(base,), data=Data((Source(work / "talks.json", data),), "hf", epochs=6.0, **how),
        optim=one.optim, train=("projector",), lora=Lora(rank=2, alpha=4.0, dropout=0.2),
        heldout=Heldout(work / "held.json", data, interval=5), saving=saving,
    )  # fmt: skip
    from llava_fn import llava, spec

    manifest = checkpoint.Manifest(MODEL, ("vision", "projector", "llama"), "square", "hf", None)
    words = (data / "tokenizer.model").read_bytes()
    checkpoint.save(base, manifest, spec.init(llava.spec(MODEL), 9), None, words)
    tsv = tsvs.ai2d(work, 16)

    def training(name: str, recipe: str, c: object, world: int = 1, places: Sequence[str] = PLACES[:3]) -> Kind:
        path = work / f"{name.replace(' ', '-')}.json"
        path.write_text(json.dumps(config.plain(c)))
        argv = [str(ROOT / f"recipes/{recipe}.py"), "--config", str(path)]
        return Kind(name, argv, ("--saving.keep", "0"), world, places, trained, other_run)

    zero3 = {"parallel": Parallel(zero=3)}
    busy = replace(one, data=replace(one.data, workers=2))
    argv = ["--weights", base, "--device", "cpu", "--data", tsv, "--out", "out", "--name", "m", "--tokens", "8"]
    evaluate = [str(x) for x in (ROOT / "recipes/evaluate.py", *argv, "--batch", "1", "--workers", "1")]
    return [
        (training("stage 1", "pretrain", one), 0.4),
        (training("stage 1 with data workers", "pretrain", busy, places=(*PLACES, "worker", "worker")), 0.05),
        (training("stage 1 on two ranks", "pretrain", replace(one, **zero3), 2), 0.2),
        (training("stage 2", "finetune", two), 0.2),
        (training("stage 2 on two ranks", "finetune", replace(two, parallel=Parallel(tp=2)), 2), 0.15),
        (Kind("evaluation", evaluate, (), 1, PLACES[:2], answered, other_results), 0.0),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1000, help="kills of training (default: 1000)")
    parser.add_argument("--evaluate", type=int, default=300, help="kills of evaluation (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    c = parser.parse_args()
    total = Counter()
    names = [*PLACES, "after a checkpoint", "torn saves", "ended, equal", "violations", "seconds"]
    print(f"| {'command':26} | {' | '.join(names)} |\n|---|" + "---:|" * len(names))
    with tempfile.TemporaryDirectory() as work, Warm() as warm:
        for kind, share in kinds(Path(work)):
            kills, begun = round(share * c.train) if share else c.evaluate, time.monotonic()
            if not kills:
                continue
            counts = campaign(warm, kind, kills, c.seed, Path(work) / "runs")
            columns = [counts[name] for name in (*PLACES, "later", "torn", "ended", "violations")]
            cells = " | ".join(map(str, [*columns, round(time.monotonic() - begun)]))
            print(f"| {kind.name:26} | {cells} |", flush=True)
            total += counts
    print(f"{sum(total[place] for place in PLACES)} kills, {total['violations']} violations")
    return int(total["violations"] > 0)


if __name__ == "__main__":
    sys.exit(main())
