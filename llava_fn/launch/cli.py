"""A recipe's config: a frozen dataclass, from a preset or a JSON file, with single fields from the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from llava_fn import fields
from llava_fn.config import plain, structure
from llava_fn.errors import NonFinite
from llava_fn.launch.versions import check_versions

C = TypeVar("C")


def parse(presets: Mapping[str, C], doc: str | None, args: Sequence[str] | None = None) -> C:
    """The config that the command line asks for: that of `--config NAME|FILE.json`, with fields set by flags.

    `--source FILE IMAGES [WEIGHT]`, once or several times, takes the place of the field data.sources.

    presets: name -> config; the first is the default. Exits with a message on an unknown flag, like any command line.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar=f"{{{','.join(presets)}}}|FILE", default=next(iter(presets)))
    if sourced := hasattr(getattr(next(iter(presets.values())), "data", None), "sources"):
        first.add_argument("--source", action="append", nargs="+")
    chosen, args = first.parse_known_args(args)
    start = chosen.config
    try:
        config = presets[start] if start in presets else read(type(next(iter(presets.values()))), Path(start))
        config = with_sources(config, chosen.source) if sourced and chosen.source else config
    except ValueError as error:
        sys.exit(str(error))
    names = f"{', '.join(presets)} (first: default), or the JSON file of an earlier run"
    text = f"{doc}\n\n--config NAME  where the values start from: {names}. Shown here: {start}."
    if sourced:
        text += "\n--source FILE IMAGES [WEIGHT]  a data set, in place of data.sources; several times for several"
    return tyro.cli(type(config), default=config, args=args, description=text, config=(tyro.conf.AvoidSubcommands,))


def with_sources(config: C, given: Sequence[Sequence[str]]) -> C:
    """The config with these data sets. ValueError unless each is a file, a folder and perhaps a weight."""
    if any(len(row) not in (2, 3) for row in given):
        raise ValueError("--source takes FILE IMAGES [WEIGHT]: records, the folder of their images, and how often each")
    rows = [{"records": row[0], "images": row[1], **({"weight": float(row[2])} if row[2:] else {})} for row in given]
    values = plain(config)
    return structure(type(config), values | {"data": values["data"] | {"sources": rows}})


def command(kind: type[C], doc: str | None, args: Sequence[str] | None = None) -> C:
    """The config that the command line asks for, without presets; exits as `parse` does."""
    try:
        return tyro.cli(kind, args=args, description=doc)
    except ValueError as error:  # of fields without a prefix; tyro itself shows the errors of all others
        sys.exit(f"error: {error}")


def run(main: Callable[[C], object], config: C) -> None:
    """Call main(config). An error that a person can set right ends with its message alone, and exit status 1.

    Under torchrun every other error is recorded, so that torchrun can show which process failed first, and where.
    """
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    try:
        check_versions()  # before anything imports torch
        if rank:
            from torch.distributed.elastic.multiprocessing.errors import record  # torch takes seconds to import

            main = record(main)
        main(config)
    except (ValueError, OSError, NonFinite) as error:
        sys.exit(f"error{rank}: {error}")
    except RuntimeError as error:
        if "backend extension: torch_npu" not in str(error):  # which `import torch` itself loads
            raise
        sys.exit(
            f"error{rank}: torch_npu does not load ({error.__cause__}); run `source set_env.sh` of CANN in this shell, "
            "/usr/local/Ascend/ascend-toolkit/set_env.sh where it was installed as usual"
        )


def read(kind: type[C], path: Path) -> C:
    """A config from JSON. ValueError names the file and the field that is unknown, missing or of a wrong type."""
    if not path.is_file():
        raise ValueError(f"{path}: no such preset and no such file")
    values = fields.load(path)
    try:
        return structure(kind, values)
    except ValueError as error:  # of a field, or of a value
        raise ValueError(f"{path}: {error}") from error
