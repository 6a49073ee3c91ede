"""The tensors of a TorchScript archive, read without torch.jit and without running any of its code.

data.pkl is a tree of modules. Python's unpickler rebuilds it from inert objects: the pickle may name tensors, storages
and TorchScript's own classes only, and each name stands for an object of this module that only holds its arguments.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
# Functions that a pickle may name in attributes that are no tensors. Such attributes are left out.
PLAIN = {
    ("torch", "device"), ("torch.jit._pickle", "restore_type_tag"), ("torch.jit._pickle", "build_intlist"),
    ("torch.jit._pickle", "build_boollist"), ("torch.jit._pickle", "build_doublelist"),
    ("torch.jit._pickle", "build_tensorlist"),
}  # fmt: skip
DECLARED = re.compile(r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]$", re.MULTILINE)

MEMO = ("PUT", "BINPUT", "LONG_BINPUT")


class Unreadable(ValueError):
    """The reason why a file cannot be read. The text begins with a verb: the caller puts the file's name before it."""


DANGER = "that would run code, which no weights need. Nothing of it was run; get these weights as safetensors"


class _Object:
    """A module of the archive: the name of its class, and its attributes."""

    kind = ""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Unreadable(f"holds a {self.kind} that is packed, not made of attributes; export it unquantized")
        self.attributes = state


class _Reader(pickle.Unpickler):
    def __init__(self, pickled: bytes, storage: Callable[[str, torch.dtype, int], Tensor]):
        super().__init__(io.BytesIO(pickled))
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        # The pickle can call what is returned but not change it: a bound method, a built-in, or a new class.
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Object", (_Object,), {"kind": f"{module}.{name}"})
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return self.tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) in PLAIN:
            return self.plain
        raise Unreadable(f"names {module}.{name}: {DANGER}")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{pid} is no storage")
        return self.storage(key, dtype, numel)

    def tensor(self, storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        return torch.as_strided(storage, size, stride, offset)

    def plain(self, *_: Any) -> None:
        return None


def declared(module: str, text: str) -> dict[str, set[str]]:
    """Class -> names of its parameters and buffers, parsed from one source file of the archive.

    module: the file's dotted name, such as `__torch__.torch.nn.modules.linear`.
    """
    return {
        f"{module}.{name}": set(re.findall(r'"([^"]*)"', parameters + buffers))
        for name, parameters, buffers in DECLARED.findall(text)
    }


def _walk(module: _Object, names: dict[str, set[str]], prefix: str) -> Iterator[tuple[str, Tensor]]:
    own = names.get(module.kind)
    for name, value in module.attributes.items():
        if isinstance(value, _Object):
            yield from _walk(value, names, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and (own is None or name in own):
            yield f"{prefix}{name}", value


def tensors(
    pickled: bytes, names: dict[str, set[str]], storage: Callable[[str, torch.dtype, int], Tensor]
) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, under the names of `state_dict()`.

    pickled: data.pkl. names: what `declared` gives for all classes. storage: (key, dtype, count) -> Tensor[count].
    Other attributes, tensors too, are left out as state_dict does; of a class that is not in `names`, every tensor is
    kept. Unreadable for a pickle that names anything but tensors and modules; a damaged one raises what the unpickler
    raises.
    """
    # Python's unpickler makes room for as many objects, and bytes, as a pickle claims to have
    if any(op.name in MEMO and (number or 0) > len(pickled) for op, number, _ in pickletools.genops(pickled)):
        raise pickle.UnpicklingError("it numbers more objects than it can hold")
    top = _Reader(pickled, storage).load()
    if not isinstance(top, _Object):
        raise Unreadable(f"holds a {type(top).__name__}, not a module; get a file that holds a model")
    return list(_walk(top, names, ""))
