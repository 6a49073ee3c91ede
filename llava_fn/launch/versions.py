"""Versions that do not go together, named before torch is imported: with some of them the import ends the process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

OLDEST, BELOW = "2.7.1", "2.14"  # of torch, as in pyproject.toml
PAGE = "docs/npu.md lists versions that go together, and container images"


def check_versions() -> None:
    """ValueError if torch is too old or too new, if torch_npu belongs to another one, or to one without CUDA.

    Nothing is imported. Sources: the METADATA of torch_npu's wheels. 2.7.1.post11 and 2.11.0 want torch's +cpu builds;
    2.12.0.post3 aborts the process when it meets a CUDA build.
    """
    torch, npu = version("torch"), version("torch_npu")
    if torch is None:
        raise ValueError(f"torch is not installed; install one from {OLDEST} to below {BELOW}")
    if not _parts(OLDEST) <= _parts(torch) < _parts(BELOW):
        raise ValueError(
            f"torch {torch}: llava_fn runs on torch {OLDEST} to below {BELOW}; on an NPU torch_npu 2.7.1 is "
            f"the line for CANN 8.3 to 9.1; {PAGE}"
        )
    if npu is None:
        return
    if _parts(npu)[:2] != _parts(torch)[:2]:
        raise ValueError(f"torch_npu {npu} beside torch {torch}: they belong to the same line only; {PAGE}")
    if cuda := cuda_of_torch():
        raise ValueError(
            f"torch {torch} is a build for CUDA {cuda}, and torch_npu {npu} wants one without: "
            f"pip install --force-reinstall --no-deps torch=={torch.partition('+')[0]} "
            "--index-url https://download.pytorch.org/whl/cpu"
        )


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_of_torch() -> str | None:
    """The CUDA that the installed torch is built for, or None. Read off its file, not imported."""
    spec = importlib.util.find_spec("torch")
    return cuda_of(Path(spec.origin).with_name("version.py").read_text()) if spec and spec.origin else None


def cuda_of(text: str) -> str | None:
    """The CUDA in the text of torch/version.py."""
    found = re.search(r"^cuda(: [^=]*)? = ['\"]([0-9.]+)['\"]", text, re.M)
    return found[2] if found else None


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"\.post|\+|[a-z]", text)[0]))
