"""One update of `train.train_step` on tensors without memory, as any rank of a world of any size sees it.

The process group is torch's "fake" one, which sends nothing, and the tensors are FakeTensors: every operation runs
through the real dispatcher and autograd, and only shapes come out. A Recorder sees each of them and writes down what
is sent, what is multiplied, and which memory lives when.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
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

TRACED = 3  # micro-batches of an update at most: those after the second all do the same
MASTERS, WEIGHTS, FROZEN = "masters", "weights", "frozen weights"
GRADIENTS, MOMENTS, REST = "gradients", "optimizer state", "activations and the rest"
KINDS: tuple[str, ...] = (MASTERS, WEIGHTS, FROZEN, GRADIENTS, MOMENTS, REST)
PRODUCTS = (MATRICES, ATTENTION) = ("products of matrices", "attention")
# What a gradient passes between autograd and the optimizer.
_PASSES = {
    "aten::_to_copy", "aten::clone", "aten::constant_pad_nd", "aten::add_",
    "_c10d_functional::all_reduce_coalesced", "_c10d_functional::reduce_scatter_tensor_coalesced",
}  # fmt: skip
_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class Workload:
    """What is traced: rank `rank` of `world`. train: the trained parts, as in config.STAGES, with lora."""

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
    """One collective. given: (dtype, numbers) of each tensor that a rank brings; size: ranks of the axis."""

    op: str
    axis: str
    size: int
    given: tuple[tuple[torch.dtype, int], ...]

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a ring."""
        given = sum(dtype.itemsize * n for dtype, n in self.given)
        times = {"all_gather": self.size - 1, "reduce_scatter": 1 - 1 / self.size, "all_reduce": 2 - 2 / self.size}
        return given * times[self.op]


@dataclass(frozen=True)
class Product:
    """Floating-point operations of one product of matrices or of one call of attention."""

    kind: str
    flops: int


@dataclass(frozen=True)
class Traced:
    """What a rank does in an update. second and third: where in `events` these micro-batches begin.

    kept, peak, highs: bytes by kind, before the update, when most is alive, and of each kind when most of it is.
    """

    events: tuple[Call | Product, ...]
    micro: int
    second: int
    third: int
    kept: Mapping[str, int]
    peak: Mapping[str, int]
    highs: Mapping[str, int]

    def of(self, micro: int) -> tuple[Call | Product, ...]:
        """The events of an update of so many micro-batches: those after the second do what the second does."""
        if micro == self.micro:
            return self.events
        if self.micro < TRACED or micro < 2:
            raise ValueError(f"{self.micro} micro-batches were traced; they do not tell what {micro} would do")
        between = self.events[self.second : self.third]
        return self.events[: self.second] + between * (micro - 2) + self.events[self.third :]


class Recorder(TorchDispatchMode):
    """Writes down every operation. Where the host asks for a number, it is told 1."""

    def __init__(self, axes: Sequence[Axis]) -> None:
        super().__init__()
        self.axes: dict[str, Axis] = {axis.group.group_name: axis for axis in axes if axis.group}
        self.events: list[Call | Product] = []
        self.begun: list[int] = []  # where in `events` each micro-batch begins
        self.bytes: list[int] = []  # of each storage, in the order in which they came to be
        self.changes: list[int] = []  # i: storage i came to be; ~i: it is gone
        self.kinds: dict[int, str] = {}
        self.made_of: dict[int, set[int]] = {}  # storage -> those that it was made of, if it may be a gradient
        self._alive: dict[int, int] = {}  # address of a storage -> its number

    def __torch_dispatch__(self, func, types, args=(), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "prim":
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            return 1
        if name == "wait_tensor":  # it gives back what it waits for; its fake form would be another tensor
            return args[0]
        out: Any = func(*args, **kwargs)
        self._events(func, args, kwargs, out)
        if func._schema.name in _PASSES:
            self._pass(out if out is not None else args[0], args)
        cast_master = name == "_to_copy" and self.kinds.get(self.number(args[0])) == MASTERS
        if cast_master or name == "all_gather_into_tensor_coalesced":
            self.keep(WEIGHTS, tree_leaves(out))
        elif name == "_fused_adamw_":
            self._gradients({self.number(g) for g in args[1]})
        self.see(out)
        return out

    def _events(self, func, args, kwargs, out) -> None:
        name = func._schema.name
        if name.startswith("_c10d_functional::"):
            self.events.append(self._call(name.partition("::")[2], args))
        elif name.startswith(_ATTENTION):
            self.events.append(Product(ATTENTION, _attention(name, args, kwargs)))
        elif func._overloadpacket in flop_registry:
            self.events.append(Product(MATRICES, flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)))

    def _call(self, name: str, args) -> Call:
        axis = self.axes[next(a for a in reversed(args) if isinstance(a, str))]
        given = tuple((x.dtype, x.numel()) for x in tree_leaves(args[0]))
        kind = next(op for op in ("all_gather", "reduce_scatter", "all_reduce") if name.startswith(op))
        return Call(kind, axis.name, axis.size, given)

    def see(self, tensors) -> None:
        """Note storages that were not seen before."""
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                self.number(x)

    def number(self, x: Tensor) -> int:
        """Of a tensor's storage."""
        storage = x.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            self._alive[address] = len(self.bytes)
            self.changes.append(len(self.bytes))
            self.bytes.append(storage.nbytes())
            weakref.finalize(storage, self._gone, address)
        return self._alive[address]

    def _gone(self, address: int) -> None:
        self.changes.append(~self._alive.pop(address))

    def keep(self, kind: str, tensors: Sequence[Tensor]) -> None:
        """Call these tensors' memory by this name."""
        self.kinds.update((self.number(x), kind) for x in tensors)

    def _pass(self, out, args) -> None:
        given = {self.number(x) for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            self.made_of.setdefault(self.number(x), set()).update(given)

    def _gradients(self, found: set[int]) -> None:
        while found:
            for i in found:
                self.kinds[i] = GRADIENTS
            found = {j for i in found for j in self.made_of.get(i, ())} - self.kinds.keys()

    def alive(self, until: int) -> dict[str, int]:
        """Bytes by kind after so many changes."""
        out, here = Counter(dict.fromkeys(KINDS, 0)), set()
        for change in self.changes[:until]:
            here.symmetric_difference_update({max(change, ~change)})
        for i in here:
            out[self.kinds.get(i, REST)] += self.bytes[i]
        return dict(out)

    def highest(self, kind: str = "") -> int:
        """After how many changes most is alive, of this kind or of all."""
        now = most = best = 0
        for j, change in enumerate(self.changes):
            i = max(change, ~change)
            if not kind or self.kinds.get(i, REST) == kind:
                now += self.bytes[i] if change >= 0 else -self.bytes[i]
            if now > most:
                most, best = now, j + 1
        return best


class _Announced(list):
    """Micro-batches that tell a recorder when each begins."""

    def __init__(self, batches: Sequence[Batch], recorder: Recorder) -> None:
        super().__init__(batches)
        self.recorder = recorder

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.recorder.begun.append(len(self.recorder.events))
            yield batch


def _attention(name: str, args, kwargs) -> int:
    """Two products forward and five backward, of the pairs of query and key that see each other."""
    backward = name.endswith("backward")
    (b, n, t, h), s = args[backward].shape, args[1 + backward].shape[2]
    causal = args[7] if backward else (args[4] if len(args) > 4 else kwargs.get("is_causal", False))
    hidden = causal or kwargs.get("attn_mask") is not None  # both: anchored bottom right, see kernels/attention.py
    pairs = t * s - (t * (t - 1) // 2 if hidden else 0)
    return (5 if backward else 2) * 2 * b * n * h * pairs


@contextmanager
def world(size: int, rank: int, tp: int) -> Iterator[Mesh]:
    """A mesh in which nothing is sent. ValueError if this process belongs to a real one."""
    if dist.is_initialized():
        raise ValueError("this process belongs to a group already; a plan needs a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield make_mesh(tp)
    finally:
        dist.destroy_process_group()


def update(job: Workload, batches: Sequence[Batch]) -> Traced:
    """One update of one rank from these micro-batches, of which only shapes count."""
    with world(job.world, job.rank, job.parallel.tp) as mesh, FakeTensorMode(), torch.enable_grad():
        state, task = _start(job, mesh)
        recorder = Recorder([mesh.all, mesh.dp, mesh.tp])
        for kind, part in (
            (MASTERS, state.params), (FROZEN, task.frozen), (MOMENTS, state.moments.first),
            (MOMENTS, state.moments.second),
        ):  # fmt: skip
            recorder.keep(kind, tree.values(part))
        kept = len(recorder.changes)
        announced = _Announced([without_memory(b) for b in batches], recorder)
        with recorder:
            train.train_step(state, announced, task)
    # train_step walks over the micro-batches twice: to count tokens, and to compute
    second, third = [*recorder.begun[len(batches) :], 0, 0][1:3]
    peak, highs = recorder.alive(recorder.highest()), {k: recorder.alive(recorder.highest(k))[k] for k in KINDS}
    return Traced(tuple(recorder.events), len(batches), second, third, recorder.alive(kept), peak, highs)


def _start(job: Workload, mesh: Mesh) -> tuple[train.TrainState, train.Task]:
    """As a recipe makes them, without memory."""
    whole = lora.extended(llava.spec(job.model), job.lora)
    zero = Zero(whole, mesh, job.parallel.zero, job.dtype, job.parallel.ahead, job.train)

    def kept(path: tree.Path, p: spec.Param) -> Tensor | TensorDict:
        x = torch.empty([s.stop - s.start for s in spec.shard(p, mesh)])
        if spec.under(path, job.train):
            return zero.keep(p, x)
        y = linear.empty(x, job.quantise) if job.quantise and linear.compressible(path) else x.to(job.dtype)
        return tree.each(lambda leaf: zero.keep(p, leaf), y) if zero.late(path) else y

    trainable, frozen = tree.split(spec.build(whole, kept), train.trains(job.train))
    run = llava.execution(job.recompute, "", zero, job.model.vision)
    task = train.Task(frozen, job.model, optim.Optim(), 100, zero, run=run, lora=job.lora)
    return train.TrainState(0, trainable, optim.init(trainable)), task


def without_memory(batch: Any) -> Any:
    """The batch with its tensors as the FakeTensorMode makes them."""
    new = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Tensor):
            new[f.name] = torch.empty(value.shape, dtype=value.dtype)
        elif f.name == "stream":
            new[f.name] = without_memory(value)
    return replace(batch, **new)


def disagreement(calls: Mapping[tuple[int, int], Sequence[Call]]) -> str:
    """What stops these ranks, (dp, tp) -> its collectives in order; "" if all of them come to their ends.

    Each waits for the others of its axis, which must bring the same: a tp axis joins the ranks of one dp, a dp axis
    those of one tp, and "all" everyone.
    """
    at = dict.fromkeys(calls, 0)
    while True:
        heads = {rank: row[at[rank]] for rank, row in calls.items() if at[rank] < len(row)}
        ready = next((ranks for ranks in map(lambda r: _with(r, heads, calls), heads) if ranks), None)
        if ready is None:
            return "; ".join(_stuck(rank, heads.get(rank), at[rank]) for rank in calls) if heads else ""
        for rank in ready:
            at[rank] += 1


def _with(rank: tuple[int, int], heads: Mapping[tuple[int, int], Call], everyone) -> list[tuple[int, int]]:
    """The ranks of the axis on which this one waits, if all of them have come to the same collective."""
    axis = heads[rank].axis
    same = {"dp": lambda r: r[1] == rank[1], "tp": lambda r: r[0] == rank[0], "all": lambda r: True}[axis]
    ranks = [r for r in everyone if same(r)]
    return ranks if all(heads.get(r) == heads[rank] for r in ranks) else []


def _stuck(rank: tuple[int, int], call: Call | None, done: int) -> str:
    where = f"dp {rank[0]} tp {rank[1]}"
    if call is None:
        return f"{where} has ended after {done}"
    numbers = sum(n for _, n in call.given)
    return f"{where} waits in its {done + 1}th, {call.op} of {numbers} numbers over {call.axis}"
