"""What runs on an NPU that is not there: tensors of the host are real, its own have no memory, every call is seen."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import torch
from limits import LIMITS, PLAIN, broken
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

UNSUPPORTED = (torch.float64, torch.complex64, torch.complex128)  # slow or missing on NPUs


class RealHost(TorchDispatchMode):
    """Between FakeTensorMode and the program: calls without an NPU in them compute. The NPU tells numbers as 1."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(map(_on_npu, tree_leaves((args, kwargs)))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.name() == "aten::_local_scalar_dense":
            return 1
        if func.name() == "aten::copy_" and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return args[0].fill_(1)
        args, kwargs = tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        return func(*args, **kwargs)

    def _fake(self, x: torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)


class Log(TorchDispatchMode):
    """Counts the ops that reach the device, and at its end raises what limits.py forbids, a fault each.

    sent: calls with tensors of the host and of the device; copies: those in which the
    host waits until the device has it. waits: calls in which the host reads a number of the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops = collections.Counter()
        self.faults: list[str] = []
        self.sent: list[str] = []
        self.copies: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name(), kwargs or {}
        self.ops[name] += 1
        given = tree_leaves((args, kwargs))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        npu = any(map(_on_npu, given))
        if npu and name in LIMITS:
            self.faults += [f"{name}: {said}" for said in broken(LIMITS[name], _bound(func, args, kwargs))]
        elif npu and name.partition("::")[2].partition(".")[0] not in PLAIN:
            self.faults.append(f"{name} has no row in limits.py")
        if npu and any(x.device.type == "cpu" and x.ndim for x in tensors):
            self.sent.append(name)
            if not _by_pinned(func, args, kwargs):
                self.copies.append(f"{name} {[tuple(x.shape) for x in tensors if x.device.type == 'cpu']}")
        if npu and name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"):
            self.waits.append(name)
        out = func(*args, **kwargs)
        made = [x for x in (*tensors, *tree_leaves(out)) if _on_npu(x) and isinstance(x, torch.Tensor)]
        self.faults += [f"{name}: {x.dtype}" for x in made if x.dtype in UNSUPPORTED]
        return out

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        assert error or not self.faults, sorted(set(self.faults))

    @property
    def fused(self) -> dict[str, int]:
        """Ops of torch_npu, and the optimizer's."""
        return {k.removeprefix("npu::"): n for k, n in self.ops.items() if k.startswith("npu::") or "_fused_" in k}

    @property
    def cards(self) -> dict[str, set[str]]:
        """Card -> the ops seen that its documents do not offer."""
        rows = [LIMITS[name] for name in self.ops if name in LIMITS]
        return {card: {row.op for row in rows if row.cards[card] == "no"} for card in ("A2", "A3", "950")}


def _on_npu(x: object) -> bool:
    device = x.device if isinstance(x, torch.Tensor) else x
    return isinstance(device, torch.device) and device.type == "npu"


def _bound(func, args, kwargs) -> Mapping[str, object]:
    """The arguments by the names of the schema, defaults included. Old wheels say `self` for `input`."""
    schema = func._schema.arguments
    given = {a.name: a.default_value for a in schema} | {a.name: x for a, x in zip(schema, args, strict=False)} | kwargs
    return {"input": given["self"], **given} if func.namespace == "npu" and "self" in given else given


def _by_pinned(func, args, kwargs) -> bool:
    """Whether this is a copy that is told not to wait."""
    return func.name() in ("aten::_to_copy", "aten::copy_") and bool(_bound(func, args, kwargs)["non_blocking"])
