"""Empty stand-ins for NVIDIA's libraries beside a CUDA build of torch, whose CPU half can then be imported.

    python .ci/stubs.py .venv/lib/python3.11/site-packages/torch/lib

torch's wheel on PyPI is linked against libraries that come in packages of their own, of some 2.5 GB. What it needs of
them is read off its own binaries: names of libraries with readelf, functions with nm. Each function answers 100, CUDA's
"no device". Needs gcc and binutils. Nothing of NVIDIA's is copied.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

PREFIXES = ("cu", "nv", "nccl", "__cuda", "__nv")  # what NVIDIA's functions begin with
TEXTS = ("String", "Name", "ncclGetLastError")  # ends of those that return text


def lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def missing(binaries: list[Path]) -> set[str]:
    """Libraries of NVIDIA's that these need and that do not lie beside them."""
    found = {x.split("[")[1].rstrip("]") for p in binaries for x in lines("readelf", "-d", str(p)) if "(NEEDED)" in x}
    return {name for name in found if name.startswith(("libcu", "libnv", "libnccl"))} - {p.name for p in binaries}


def functions(binaries: list[Path]) -> dict[str, set[str]]:
    """Version ("" for none) -> NVIDIA's functions that these call."""
    found: dict[str, set[str]] = {}
    for symbol in {x.split()[-1] for p in binaries for x in lines("nm", "-D", "--undefined-only", str(p))}:
        name, _, version = symbol.partition("@")
        if name.startswith(PREFIXES):
            found.setdefault(version, set()).add(name)
    return found


def definition(name: str) -> str:
    if name.endswith(TEXTS):
        return f'const char *{name}(void) {{ return ""; }}\n'
    return f"int {name}(void) {{ return 100; }}\n"


def main(folder: Path) -> None:
    """Every library gets every function, in all versions."""
    binaries = sorted(folder.glob("*.so*"))
    called = functions(binaries)
    with tempfile.TemporaryDirectory() as work:
        source, script = Path(work) / "stub.c", Path(work) / "versions"
        source.write_text("".join(map(definition, sorted(set().union(*called.values())))))
        script.write_text("".join(f"{v} {{ {'; '.join(names)}; }};\n" for v, names in called.items() if v))
        for name in sorted(missing(binaries)):
            options = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", f"-Wl,--version-script={script}"]
            lines("gcc", *options, str(source), "-o", str(folder / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
