"""The options of an evaluation. Nothing here imports torch, so that the recipe can show them at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llava_fn.evaluate import score
from llava_fn.evaluate.records import Kind
from llava_fn.generate.options import ModelOptions

PromptName = Literal["vlmevalkit", "llava", "own"]


def _names(kind: Kind) -> object:
    """How --help shows the rules that a kind has."""
    return tyro.conf.arg(metavar=f"{{{','.join(score.RULES[kind])}}}")


@dataclass(frozen=True)
class Rules:
    """The rules by which each kind of question is scored; see llava_fn/evaluate/score.py."""

    choice: Annotated[str, _names("choice")] = score.RULES["choice"][0]
    chartqa: Annotated[str, _names("chartqa")] = score.RULES["chartqa"][0]
    docvqa: Annotated[str, _names("docvqa")] = score.RULES["docvqa"][0]
    mmmu: Annotated[str, _names("mmmu")] = score.RULES["mmmu"][0]

    def __post_init__(self) -> None:
        for kind in score.RULES:
            score.check_rules(kind, self.of(kind))

    def of(self, kind: Kind) -> str:
        """The rules for a kind."""
        return getattr(self, kind)


@dataclass(frozen=True)
class Evaluate:
    """Which model answers which questions, and where the results go."""

    model: Annotated[ModelOptions, tyro.conf.arg(name="")]
    data: tuple[Path, ...]  # TSVs
    out: Path = Path("results")
    name: str = ""  # of the model, in the names of files; that of its folder, unless given
    template: PromptName = "vlmevalkit"  # of the prompt: VLMEvalKit's, LLaVA's, or that of the weights
    tokens: int = 512  # of an answer at most; 512 was VLMEvalKit's when it published LLaVA-1.5's scores
    batch: int = 8  # questions at a time
    workers: int = 2  # threads that read images ahead
    rules: Rules = Rules()
    limit: int | None = None  # only the first rows; the results are marked as partial
    indices: tuple[str, ...] = ()  # only these rows; the results are marked as partial
    score_only: bool = False  # score the answers that are there; the weights are not opened
    compare: str = ""  # with another run: its --name, or, if it is not in --out, its --out/--name
    allow_partial: bool = False  # write results, marked as partial, though rows have no answer yet
    fresh: bool = False  # move an earlier run of this name aside and begin anew
    dry_run: bool = False  # show prompts and numbers of tokens, and answer nothing

    def __post_init__(self) -> None:
        for name in ("batch", "workers", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1")
        if not self.data or not self.model.weights:
            raise ValueError("give --weights and --data, each with a file or folder at least")
        if self.fresh and self.score_only:
            raise ValueError("--fresh would move the answers aside that --score-only scores; leave one out")
        if Path(self.label).name != self.label:
            raise ValueError(f"name={self.label!r}: a part of file names cannot be a path; give another --name")

    @property
    def label(self) -> str:
        """The model's name in the names of files."""
        path = self.model.weights[0].resolve()
        return self.name or (path.stem if path.is_file() else path.name)

    def folder(self, dataset: str) -> Path:
        """The folder of the answers to a file. dataset: its name."""
        return self.out / f"{self.label}_{dataset}"

    def other_folder(self, dataset: str) -> Path:
        """The folder of the answers that `compare` names."""
        path = Path(f"{self.compare}_{dataset}")
        return self.out / path if path.name == str(path) else path
