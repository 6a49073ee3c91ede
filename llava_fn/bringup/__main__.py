"""The first hour on a card: one command, a summary on the terminal, and one file to attach to an issue.

    python -m llava_fn.bringup
    python -m llava_fn.bringup --parts environment attention-full two-ranks

`python -m llava_fn.kernels.check` is the same command; this one writes its report even where torch cannot be imported.
Parts run in order of risk, each in a process of its own with a time limit, so that a crash or a hang costs one part.
The file is complete after every part. The exit status is 1 if a part failed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_fn.bringup.options import LIMITS, Options
from llava_fn.bringup.process import run
from llava_fn.bringup.versions import installed
from llava_fn.launch import cli

LINES = 60  # of a failed part's log that the report keeps


def check(part: str, c: Options) -> dict:
    """One part's entry of the report: state, seconds, rows; if it did not pass also why, and the end of its log."""
    rows: list[dict] = []
    began, limit = time.monotonic(), LIMITS[part] * c.patience
    command = [sys.executable, "-X", "faulthandler", "-m", "llava_fn.bringup.parts", part, c.device]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        why = run(command, limit, lambda line: rows.append(json.loads(line)), log)
        log.seek(0)
        end = log.read().splitlines()[-LINES:]
    why = f"{why}: {end[-1]}" if why.startswith("exit") and end else why
    wrong = [f"beyond its limit: {row['what']}" for row in rows if row.get("ok") is False]
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    failure = "; ".join(row["raised"] for row in rows if "raised" in row) or why or ", ".join(wrong)
    state, why = "failed" if failure else "skipped" if skipped else "passed", failure or ", ".join(skipped)
    entry = {"part": part, "state": state, "seconds": round(time.monotonic() - began, 1), "rows": rows}
    return entry | ({"why": why} if why else {}) | ({"log": end} if state == "failed" else {})


def write(path: Path, report: Mapping) -> None:
    """The report as JSON, whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    os.replace(new, path)


def line(entry: Mapping) -> str:
    """An entry on the terminal."""
    text = f"{entry['state']:8} {entry['part']:22} {entry['seconds']:6.1f} s"
    figures = [f"{row['what']}: {_figures(row)}" for row in entry["rows"] if _figures(row)]
    return "\n".join([f"{text}  {entry['why']}" if "why" in entry else text, *(f"           {x}" for x in figures)])


def _figures(row: Mapping) -> str:
    hidden = ("part", "what", "ok", "skipped", "raised")
    found = {name: value for name, value in row.items() if name not in hidden and not isinstance(value, (dict, list))}
    return ", ".join(f"{name} {v:.3g}" if isinstance(v, float) else f"{name} {v}" for name, v in found.items())


def summary(entries: Sequence[Mapping], c: Options) -> str:
    """The last lines on the terminal."""
    states = [entry["state"] for entry in entries]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("passed", "failed", "skipped") if s in states)
    failed = [entry for entry in entries if entry["state"] == "failed"]
    ends = [f"\n{entry['part']}: {entry['why']}\n" + "\n".join(entry["log"][-5:]) for entry in failed]
    return "\n".join([*ends, f"\n{counts}. Attach {c.out} to an issue."])


def main(c: Options) -> None:
    """Run the parts, write the report; exit status 1 if one failed."""
    report = {"command": sys.argv, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **installed(), "parts": []}
    for part in c.parts:
        report["parts"].append(check(part, c))
        write(c.out, report)
        print(line(report["parts"][-1]), flush=True)
    print(summary(report["parts"], c))
    sys.exit(int(any(entry["state"] == "failed" for entry in report["parts"])))


if __name__ == "__main__":
    cli.run(main, cli.command(Options, __doc__))
