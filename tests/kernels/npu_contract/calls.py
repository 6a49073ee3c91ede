"""Every call of an op of torch_npu that llava_fn/kernels/ makes, read off its source."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).parents[3] / "llava_fn" / "kernels"


@dataclass(frozen=True)
class Call:
    """One call. positional: how many arguments; keywords: the names of the others."""

    where: str
    op: str
    positional: int
    keywords: tuple[str, ...]


def calls() -> list[Call]:
    """In the order of the source. ValueError for a call that cannot be read off: a name that is no literal, a star."""
    found = []
    for path in sorted(KERNELS.glob("*.py")):
        module = ast.parse(path.read_text())
        named = [node for node in ast.walk(module) if isinstance(node, ast.Call) and _is_npu_op(node)]
        called = [node for node in ast.walk(module) if isinstance(node, ast.Call) and _is_npu_op(node.func)]
        if len(named) != len(called):
            raise ValueError(f"{path.name}: npu_op(...) is not called where it stands")
        for node in called:
            where, (name,) = f"{path.name}:{node.lineno}", node.func.args
            names = tuple(keyword.arg for keyword in node.keywords)
            if (
                not isinstance(name, ast.Constant)
                or None in names
                or any(isinstance(a, ast.Starred) for a in node.args)
            ):
                raise ValueError(f"{where}: write the name of the op and its arguments out")
            found.append(Call(where, name.value, len(node.args), names))
    return found


def _is_npu_op(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "npu_op"
