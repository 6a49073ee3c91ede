"""Spoiled files for every reader: none may hang, take more memory than its limit, or be read as something else.

    python tests/campaigns/inputs.py --n 10000 --seed 0

Each input is a small valid one with one file spoiled. Its reader must give what the valid input holds, bit for bit, or
raise a documented error that names a file of it. Where a format has no sum, and so nothing can tell that a number is
another one, the input counts as changed, with the reason. All else is a violation: it is kept with its seed, and
`--only INDEX` reads it again. The exit status is 1 if there is one.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from subjects import Subject, subjects
from trial import Campaign, Limits, Outcome, judge, outcomes, prepare, spoil

VERDICTS = ("equal", "error", "changed", "violation")
HEADS = ("equal", "documented error", "meaning changed", "violation")
SHARED = Path("/dev/shm")


def keep(c: Campaign, outcome: Outcome, to: Path) -> None:
    """A folder with the spoiled input, and what came of it."""
    at = to / str(outcome.index)
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(c.inputs[outcome.subject][0], at / "in")
    spoil(c, outcome.index, at / "in")
    (at / "outcome.json").write_text(json.dumps({"seed": c.seed} | asdict(outcome), indent=1) + "\n")


def table(found: Sequence[Outcome], some: Sequence[Subject]) -> str:
    """A row for each kind of input, their sum, and why another meaning was taken."""
    counts = Counter((o.subject, o.verdict) for o in found)
    rows = [(s.name, *(counts[s.name, v] for v in VERDICTS)) for s in some]
    rows.append(("all", *(sum(row[j] for row in rows) for j in range(1, 5))))
    lines = [f"| {'kind':28} | inputs | " + " | ".join(HEADS) + " |", "|---|---:|" + "---:|" * 4]
    for name, *numbers in rows:
        cells = " | ".join(f"{n:{len(head)}}" for n, head in zip(numbers, HEADS, strict=True))
        lines.append(f"| {name:28} | {sum(numbers):6} | {cells} |")
    why: dict[str, list[str]] = {}
    for subject, reason in sorted({(o.subject, o.detail) for o in found if o.verdict == "changed"}):
        why.setdefault(reason, []).append(subject)
    lines += ["", "Meaning changed:"] + [f"- {reason} ({', '.join(names)})" for reason, names in why.items()]
    return "\n".join(lines)


def campaign(some: Sequence[Subject], args: argparse.Namespace) -> list[Outcome]:
    """Run it, show each violation when it is found and the table at the end, and keep what was asked for."""
    torch.set_num_threads(1)
    limits = Limits(args.seconds, args.memory * 2**20)
    with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as work:
        c, start, found = prepare(some, args.seed, limits, Path(work)), time.monotonic(), []
        for outcome in outcomes(c, range(args.n), args.processes):
            found.append(outcome)
            if outcome.verdict == "violation":
                keep(c, outcome, args.keep)
                print(f"{outcome.index}: {outcome.subject}, {outcome.mutation} of {outcome.file}: {outcome.detail}\n")
        print(table(found, some))
        print(f"\n{len(found)} inputs, seed {args.seed}, {time.monotonic() - start:.0f} s")
    if args.json:
        rows = [asdict(o) for o in sorted(found, key=lambda o: o.index)]
        args.json.write_text(json.dumps({"n": args.n, "seed": args.seed, "outcomes": rows}) + "\n")
    return found


def only(some: Sequence[Subject], args: argparse.Namespace) -> Outcome:
    """One input, in this process and without limits, so that a debugger may stop in it."""
    some = [some[args.only % len(some)]]
    with tempfile.TemporaryDirectory() as work:
        c = prepare(some, args.seed, Limits(), Path(work))
        folder = c.inputs[some[0].name][0]
        subject, mutation, file, sealed = spoil(c, args.only, folder)
        print(f"{args.only}: {subject.name}, {mutation} of {file}")
        verdict, detail = judge(c, subject, folder, sealed)
        print(f"{verdict}: {detail}")
        return Outcome(args.only, subject.name, mutation, file, verdict, detail)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=10_000, help="inputs")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", type=int, help="read this input alone, in this process")
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--seconds", type=int, default=10, help="that an input may take")
    p.add_argument("--memory", type=int, default=2048, help="MiB that a process may take")
    p.add_argument("--keep", type=Path, default=Path("runs/campaigns/inputs"), help="folder for violations")
    p.add_argument("--json", type=Path, help="file for all outcomes")
    return p.parse_args(argv)


def main(some: Sequence[Subject], argv: Sequence[str]) -> bool:
    """The campaign, or one of its inputs. -> whether there is a violation."""
    args = parse(argv)
    found = campaign(some, args) if args.only is None else [only(some, args)]
    return any(o.verdict == "violation" for o in found)


if __name__ == "__main__":
    sys.exit(main(subjects(), sys.argv[1:]))
