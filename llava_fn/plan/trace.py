"""One update of `train.train_step` on tensors without memory, by any rank of a world of any size.

The process group is torch's "fake" one, which sends nothing, and the tensors are FakeTensors: every operation runs
through the real dispatcher and autograd but yields only shapes. A Recorder sees each operation and records collectives,
FLOPs, and when memory is allocated and freed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llava_fn import linear, llava, lora, optim, spec, train, tree
from llava_fn.batch import Batch
from llava_fn.config import Llava, Lora, Parallel
from llava_fn.linear import Kind
from llava_fn.parallel.mesh import Axis, Mesh, make_mesh
from llava_fn.parallel.zero import Zero

TRACED = 3  # micro-batches that are traced at most: those after the second do the same
MASTERS, WEIGHTS, FROZEN = "masters", "weights", "frozen weights"
GRADIENTS, MOMENTS, REST = "gradients", "optimizer state", "activations and the rest"
KINDS: tuple[str, ...] = (MASTERS, WEIGHTS, FROZEN, GRADIENTS, MOMENTS, REST)
PRODUCTS = (MATRICES, ATTENTION) = ("products of matrices", "attention")
# Operations on a gradient between autograd and the optimizer.
_DERIVES = {
    "aten::_to_copy", "aten::clone", "aten::constant_pad_nd", "aten::add_",
    "_c10d_functional::all_reduce_coalesced", "_c10d_functional::reduce_scatter_tensor_coalesced",
}  # fmt: skip
_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
Rank = tuple[int, int]  # index on the axes dp and tp


@dataclass(frozen=True)
class Workload:
    """The update to trace, by rank `rank` of `world`. train: the trained parts, of config.STAGES and lora."""

    model: Llava
    train: tuple[str, ...]
    parallel: Parallel
    world: int
    rank: int
    dtype: torch.dtype
    recompute: bool
    lora: Lora | None = None
    quantise: Kind | None = None


@dataclass(frozen=True)
class Call:
    """One collective. inputs: (dtype, number of elements) of each input tensor of a rank; size: ranks of the axis."""

    op: str
    axis: str
    size: int
    inputs: tuple[tuple[torch.dtype, int], ...]

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a ring."""
        times = {"all_gather": self.size - 1, "reduce_scatter": 1 - 1 / self.size, "all_reduce": 2 - 2 / self.size}
        return sum(dtype.itemsize * n for dtype, n in self.inputs) * times[self.op]


@dataclass(frozen=True)
class Product:
    """FLOPs of one matrix product or one call of attention."""

    kind: str
    flops: int


@dataclass(frozen=True)
class Traced:
    """The operations and the memory of one rank in an update of `micro` micro-batches.

    second, third: the indices in `events` at which these micro-batches begin. Bytes by kind: kept, before the update;
    peak, at the peak of all kinds together; highs, each at its own peak.
    """

    events: tuple[Call | Product, ...]
    micro: int
    second: int
    third: int
    kept: Mapping[str, int]
    peak: Mapping[str, int]
    highs: Mapping[str, int]

    def of(self, micro: int) -> tuple[Call | Product, ...]:
        """The events of an update of `micro` micro-batches, each after the second a copy of the second."""
        if micro == self.micro:
            return self.events
        if self.micro < TRACED or micro < 2:
            raise ValueError(f"a trace of {self.micro} micro-batches does not give the events of {micro}")
        second = self.events[self.second : self.third]
        return self.events[: self.second] + second * (micro - 2) + self.events[self.third :]


class Recorder(TorchDispatchMode):
    """Records every operation. A tensor's number that the host reads is 1."""

    def __init__(self, axes: Sequence[Axis]) -> None:
        super().__init__()
        self.axes: dict[str, Axis] = {axis.group.group_name: axis for axis in axes if axis.group}
        self.events: list[Call | Product] = []
        self.starts: list[int] = []  # the index in `events` at which each micro-batch begins
        self.bytes: list[int] = []  # of each storage, in order of allocation
        self.changes: list[int] = []  # i: storage i is allocated; ~i: it is freed
        self.kinds: dict[int, str] = {}
        self.sources: dict[int, set[int]] = {}  # storage of a possible gradient -> the storages it is computed from
        self._numbers: dict[int, int] = {}  # address of a live storage -> its number

    def __torch_dispatch__(self, func, types, args=(), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "prim":
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            return 1
        if name == "wait_tensor":  # returns its argument; the fake implementation would return another tensor
            return args[0]
        out: Any = func(*args, **kwargs)
        self._event(func, args, kwargs, out)
        if func._schema.name in _DERIVES:
            self._derive(out if out is not None else args[0], args)
        cast_master = name == "_to_copy" and self.kinds.get(self.number(args[0])) == MASTERS
        if cast_master or name == "all_gather_into_tensor_coalesced":
            self.label(WEIGHTS, tree_leaves(out))
        elif name == "_fused_adamw_":
            self._label_gradients({self.number(g) for g in args[1]})
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.number(x)
        return out

    def _event(self, func, args, kwargs, out) -> None:
        name = func._schema.name
        if name.startswith("_c10d_functional::"):
            self.events.append(self._call(name.partition("::")[2], args))
        elif name.startswith(_ATTENTION):
            self.events.append(Product(ATTENTION, _attention(name, args, kwargs)))
        elif func._overloadpacket in flop_registry:
            self.events.append(Product(MATRICES, flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)))

    def _call(self, name: str, args) -> Call:
        axis = self.axes[next(a for a in reversed(args) if isinstance(a, str))]
        inputs = tuple((x.dtype, x.numel()) for x in tree_leaves(args[0]))
        kind = next(op for op in ("all_gather", "reduce_scatter", "all_reduce") if name.startswith(op))
        return Call(kind, axis.name, axis.size, inputs)

    def number(self, x: Tensor) -> int:
        """The number of a tensor's storage. A new storage is recorded."""
        storage = x.untyped_storage()
        address = storage._cdata
        if address not in self._numbers:
            self._numbers[address] = len(self.bytes)
            self.changes.append(len(self.bytes))
            self.bytes.append(storage.nbytes())
            weakref.finalize(storage, lambda: self.changes.append(~self._numbers.pop(address)))
        return self._numbers[address]

    def label(self, kind: str, tensors: Sequence[Tensor]) -> None:
        """Count the storages of these tensors as this kind of memory."""
        self.kinds.update((self.number(x), kind) for x in tensors)

    def _derive(self, out, args) -> None:
        sources = {self.number(x) for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            self.sources.setdefault(self.number(x), set()).update(sources)

    def _label_gradients(self, storages: set[int]) -> None:
        """Label what the optimizer reads, and the storages from which it was computed."""
        while storages:
            self.kinds |= dict.fromkeys(storages, GRADIENTS)
            storages = {j for i in storages for j in self.sources.get(i, ())} - self.kinds.keys()

    def alive(self, until: int) -> dict[str, int]:
        """Live bytes by kind after the first `until` changes."""
        out, live = Counter(dict.fromkeys(KINDS, 0)), set()
        for change in self.changes[:until]:
            live.symmetric_difference_update({max(change, ~change)})
        for i in live:
            out[self.kinds.get(i, REST)] += self.bytes[i]
        return dict(out)

    def highest(self, kind: str = "") -> int:
        """The number of changes after which the live bytes of this kind, or of all, peak."""
        live = most = best = 0
        for j, change in enumerate(self.changes):
            i = max(change, ~change)
            if not kind or self.kinds.get(i, REST) == kind:
                live += self.bytes[i] if change >= 0 else -self.bytes[i]
            if live > most:
                most, best = live, j + 1
        return best


class _Batches(list):
    """Micro-batches whose iteration tells a recorder where each begins."""

    def __init__(self, batches: Sequence[Batch], recorder: Recorder) -> None:
        super().__init__(batches)
        self.recorder = recorder

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.recorder.starts.append(len(self.recorder.events))
            yield batch


def _attention(name: str, args, kwargs) -> int:
    """FLOPs of two products forward or five backward, over the pairs of query and key that are not masked."""
    backward = name.endswith("backward")
    (b, n, t, h), s = args[backward].shape, args[1 + backward].shape[2]
    causal = args[7] if backward else (args[4] if len(args) > 4 else kwargs.get("is_causal", False))
    masked = causal or kwargs.get("attn_mask") is not None  # either is anchored bottom right, see kernels/attention.py
    pairs = t * s - (t * (t - 1) // 2 if masked else 0)
    return (5 if backward else 2) * 2 * b * n * h * pairs


@contextmanager
def world(size: int, rank: int, tp: int) -> Iterator[Mesh]:
    """The mesh of a process group that sends nothing. ValueError if this process belongs to a group already."""
    if dist.is_initialized():
        raise ValueError("this process belongs to a group already; plan in a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield make_mesh(tp)
    finally:
        dist.destroy_process_group()


def update(w: Workload, batches: Sequence[Batch]) -> Traced:
    """The trace of one update from these micro-batches, of which only the shapes matter."""
    with world(w.world, w.rank, w.parallel.tp) as mesh, FakeTensorMode(), torch.enable_grad():
        state, task = _start(w, mesh)
        recorder = Recorder([mesh.all, mesh.dp, mesh.tp])
        for kind, part in (
            (MASTERS, state.params), (FROZEN, task.frozen), (MOMENTS, state.moments.first),
            (MOMENTS, state.moments.second),
        ):  # fmt: skip
            recorder.label(kind, tree.values(part))
        kept = len(recorder.changes)
        inputs = _Batches([without_memory(b) for b in batches], recorder)
        with recorder:
            train.train_step(state, inputs, task)
    # train_step iterates over the micro-batches twice: first to count tokens, then to compute
    second, third = [*recorder.starts[len(batches) :], 0, 0][1:3]
    peak, highs = recorder.alive(recorder.highest()), {k: recorder.alive(recorder.highest(k))[k] for k in KINDS}
    return Traced(tuple(recorder.events), len(batches), second, third, recorder.alive(kept), peak, highs)


def _start(w: Workload, mesh: Mesh) -> tuple[train.TrainState, train.Task]:
    """The state and the task of a run's first update, without memory."""
    whole = lora.extended(llava.spec(w.model), w.lora)
    zero = Zero(whole, mesh, w.parallel.zero, w.dtype, w.parallel.ahead, w.train)

    def kept(path: tree.Path, p: spec.Param) -> Tensor | TensorDict:
        x = torch.empty([s.stop - s.start for s in spec.shard(p, mesh)])
        if spec.under(path, w.train):
            return zero.keep(p, x)
        y = linear.empty(x, w.quantise) if w.quantise and linear.compressible(path) else x.to(w.dtype)
        return tree.each(lambda leaf: zero.keep(p, leaf), y) if zero.late(path) else y

    trainable, frozen = tree.split(spec.build(whole, kept), train.trains(w.train))
    run = llava.execution(w.recompute, "", zero, w.model.vision)
    task = train.Task(frozen, w.model, optim.Optim(), 100, zero, run=run, lora=w.lora)
    return train.TrainState(0, trainable, optim.init(trainable)), task


def without_memory(x: Any) -> Any:
    """A batch with FakeTensors for its tensors; within a FakeTensorMode."""
    if isinstance(x, Tensor):
        return torch.empty(x.shape, dtype=x.dtype)
    if not is_dataclass(x) or isinstance(x, type):
        return x
    return replace(x, **{f.name: without_memory(getattr(x, f.name)) for f in fields(x)})


def deadlock(calls: Mapping[Rank, Sequence[Call]]) -> str:
    """Where each rank waits if these sequences of collectives deadlock; "" if all ranks finish.

    A collective waits until all ranks of its axis call the same one. A tp axis joins the ranks of one dp, a dp axis
    those of one tp, and "all" joins all ranks.
    """
    done = dict.fromkeys(calls, 0)
    while True:
        pending = {rank: own[done[rank]] for rank, own in calls.items() if done[rank] < len(own)}
        ready = next((ranks for rank in pending if (ranks := _ready(rank, pending, calls))), None)
        if ready is None:
            return "; ".join(_waiting(rank, pending.get(rank), done[rank]) for rank in calls) if pending else ""
        for rank in ready:
            done[rank] += 1


def _ready(rank: Rank, pending: Mapping[Rank, Call], ranks: Iterable[Rank]) -> list[Rank]:
    """The ranks of the axis of this rank's pending collective, if the same collective is pending on all of them."""
    joined = {"dp": lambda r: r[1] == rank[1], "tp": lambda r: r[0] == rank[0], "all": lambda r: True}
    group = list(filter(joined[pending[rank].axis], ranks))
    return group if all(pending.get(r) == pending[rank] for r in group) else []


def _waiting(rank: Rank, call: Call | None, done: int) -> str:
    where = f"dp {rank[0]} tp {rank[1]}"
    if call is None:
        return f"{where} ends after {done} collectives"
    elements = sum(n for _, n in call.inputs)
    return f"{where} waits in collective {done + 1}, {call.op} of {elements} elements over {call.axis}"
