"""Steps of decoding as CUDA graphs: captured once for each shape, then launched by one call of the host.

A step of the 7B launches about 500 kernels, which takes the host longer than the card. A graph is bound to the
addresses of its tensors: it belongs to one cache and one set of parameters, and has inputs of its own, into which those
of a call are copied. Graphs of a cache that is no more are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from llava_fn.cache import Cache
from llava_fn.generate.types import Advance, Model, StepInputs

KEPT = 32  # graphs; the one that was used longest ago goes first
Record = Callable[[Callable[[], object], Callable[[], None]], Callable[[], None]]


def record(warm: Callable[[], object], step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a CUDA graph. warm: runs first, so that nothing is compiled, planned or loaded while capturing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm()
        warm()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the card meanwhile
        step()
    return graph.replay


@dataclass(frozen=True)
class CapturedStep:
    """A step on tensors of its own, StepInputs.tensors. out: f32[b, 1 or 2].

    cache: of the storage whose addresses the graph holds. It does not keep the cache.
    """

    tensors: tuple[Tensor, ...]
    out: Tensor
    replay: Callable[[], None]
    cache: StorageWeakRef
    model: Model  # keeps the parameters where they are


class Graphs:
    """Launches steps of one model, or of members of its family, as graphs. Not for several threads."""

    room = 512  # attention reads no more than a row holds, so that large steps of a cache's size cost memory alone

    def __init__(self, record: Record = record) -> None:
        self._record = record
        self._steps: dict[tuple, CapturedStep] = {}
        self._spare: Cache | None = None

    def lend(self, m: Model, rows: int, size: int) -> Cache:
        """The cache that came back last, if it has this size: there are graphs for it. Else a new one."""
        spare, self._spare = self._spare, None
        if spare is not None and (spare.rows, spare.size) == (rows, size):
            return replace(spare, lengths=torch.zeros_like(spare.lengths))
        del spare  # its memory is free before more is asked for
        return m.cache(rows, size)

    def done(self, cache: Cache) -> None:
        """Takes back a cache, which the caller does not use any more."""
        self._spare = cache

    def run(self, step: Advance, m: Model, x: StepInputs) -> tuple[Tensor, StepInputs]:
        """`step(m, x)`. Both results are overwritten by the next call of this shape."""
        k = x.state.cache.k
        place = (k.untyped_storage()._cdata, k.storage_offset(), k.shape, k.stride())
        key = (id(m.params), *place, x.state.cache.rows, x.state.cache.size, x.options.used, x.options.most, x.logprobs)
        captured = self._steps.pop(key, None)
        if captured is None or captured.cache.expired():
            captured = self._capture(step, m, x)
        self._steps[key] = captured  # now the newest
        _copy(captured.tensors, x.tensors)
        captured.replay()
        return captured.out, x.on(captured.tensors)

    def _capture(self, step: Advance, m: Model, x: StepInputs) -> CapturedStep:
        self._steps = {key: kept for key, kept in self._steps.items() if not kept.cache.expired()}
        while len(self._steps) >= KEPT:
            del self._steps[next(iter(self._steps))]
        inputs = x.on([tensor.clone() for tensor in x.tensors])
        out = x.uniform.new_empty(len(x.uniform), 1 + x.logprobs)

        def whole() -> None:
            told, after = step(m, inputs)
            _copy((out, *inputs.tensors), (told, *after.tensors))

        # to run the step alone is harmless: it writes the same keys and values where the next run of it will
        replay = self._record(lambda: step(m, inputs), whole)
        return CapturedStep(inputs.tensors, out, replay, StorageWeakRef(x.state.cache.k.untyped_storage()), m)


def _copy(held: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for x, y in zip(held, new, strict=True):
        if x is not y:
            x.copy_(y)
