"""One update of the trainable parameters, as a function from state to state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from torch import Tensor

from llava_fn import linear, llava, lora, optim, tree
from llava_fn.batch import Batch
from llava_fn.config import Llava, Lora, Optim
from llava_fn.dropout import Keys
from llava_fn.errors import NonFinite
from llava_fn.grad import value_and_grad
from llava_fn.kernels.precision import at_least_fp32
from llava_fn.linear import Kind
from llava_fn.parallel import collectives
from llava_fn.parallel.zero import Zero
from llava_fn.spec import Param, under


@dataclass(frozen=True)
class TrainState:
    """Everything that an update reads and that changes. params: the trainable fp32 masters, as Task.zero keeps them."""

    step: int  # updates done
    params: TensorDict
    moments: optim.Moments


@dataclass(frozen=True)
class Task:
    """Everything that an update reads and that stays: the frozen parameters are already in `zero.dtype`."""

    frozen: TensorDict
    model: Llava
    optim: Optim
    steps: int  # updates in the whole run: the schedule depends on it
    zero: Zero = Zero()  # and the mesh, and the dtype of the computation
    loss: str = "token_mean"  # or "rank_mean"
    run: llava.Execution = llava.Execution()
    lora: Lora | None = None  # how the part `lora` of the parameters adapts the others


@dataclass(frozen=True)
class Metrics:
    """What one update saw, on all ranks. loss: nats per labelled token; grad_norm: before clipping.

    Both are NaN if there is no labelled token.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    labelled: int
    samples: int


def trains(parts: Sequence[str]) -> Callable[[tree.Path], bool]:
    """Whether a path lies in one of the trained parts; for tree.split."""
    return lambda path: under(path, parts)


def kept(path: tree.Path, p: Param, x: Tensor, zero: Zero, kind: Kind | None = None) -> Tensor | TensorDict:
    """A parameter as a rank keeps it. x: its tensor-parallel block, f[...].

    Trained: the fp32 shard that `zero` says. Frozen: in the dtype of `zero`, or as `kind` if it is a linear of the
    decoder, and a shard where it is gathered late.
    """
    if under(path, zero.train):
        return at_least_fp32(zero.keep(p, x))
    y = linear.compress(path, x, kind, zero.mesh.tp) if kind and linear.compressible(path) else x.to(zero.dtype)
    return tree.each(lambda leaf: zero.keep(p, leaf), y) if zero.late(path) else y


def loss(weights: TensorDict, batch: Batch, step: int, share: float, task: Task):
    """This micro-batch's part of the loss of update `step`, and nothing else.

    share: what one labelled token weighs. token_mean: 1 / labelled tokens of the whole update, so that the loss does
    not depend on how samples are grouped. rank_mean: 1 / (labelled tokens of this micro-batch * micro-batches), the
    original's mean of means (HF Trainer).
    """
    p = lora.attach(tree.merge(weights, task.frozen), task.lora, _dropout(batch, step, task))
    return llava.nll(p, batch, task.model, task.run).sum() * share, None


def _dropout(batch: Batch, step: int, task: Task) -> Keys | None:
    """The keys of the adapters' dropout, if there is one."""
    if task.lora is None or not task.lora.dropout:
        return None
    return Keys.make(batch, step, task.lora.dropout, task.model.llama.blocks, task.zero.mesh.tp)


def train_step(state: TrainState, batches: Sequence[Batch], task: Task) -> tuple[TrainState, Metrics]:
    """One update from the micro-batches of one step, of which each rank has its own. The state is consumed.

    Its tensors are updated in place. If no rank has a labelled token, because no record of the update could be used,
    only the step is counted. Raises NonFinite before anything is changed.
    """
    step, zero = state.step + 1, task.zero
    tokens, labelled, samples, micro_batches = _counts(batches, zero)
    lr = optim.learning_rate(task.optim, step, task.steps)
    if not labelled:
        return replace(state, step=step), Metrics(math.nan, math.nan, lr, tokens, labelled, samples)
    weights, losses, sums = zero.fetch(state.params), [], []
    for batch in batches:
        share = 1 / labelled if task.loss == "token_mean" else 1 / (max(1, len(batch.targets)) * micro_batches)
        (part, _), new = value_and_grad(loss)(weights, batch, step, share, task)
        new = tree.values(new)  # the tree would keep what _add frees
        losses, sums = [*losses, part], _add(sums, new)
    grads = zero.reduce(tree.rebuild(weights, sums))
    local = sum(losses[1:], losses[0])  # this rank's part of the loss
    norm, total = zero.norm(grads), collectives.total(local, zero.mesh.dp)
    seen = torch.stack([total, norm]).tolist()  # the one time that the host waits for the device
    if not all(map(math.isfinite, seen)):
        raise NonFinite(_blame(step, batches, local, grads, zero))
    optim.clip(grads, norm, task.optim.clip)
    optim.adamw(state.params, grads, state.moments, step, lr, task.optim)
    return replace(state, step=step), Metrics(seen[0], seen[1], lr, tokens, labelled, samples)


def _add(sums: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Add the gradients of one more micro-batch to the fp32 sums, in place; `sums` is empty before the first.

    new: is emptied. Each gradient is freed as soon as it is added, so that there is no second copy in fp32.
    """
    if not sums:
        return [at_least_fp32(new.pop(0)) for _ in range(len(new))]
    return [s.add_(new.pop(0)) for s in sums]


def _counts(batches: Sequence[Batch], zero: Zero) -> list[int]:
    """Tokens, labelled tokens, samples, and micro-batches that have a sample, on all ranks."""
    rows = [(b.tokens, len(b.targets), len(b.records), len(b.records) > 0) for b in batches]
    local = [sum(column) for column in zip(*rows, strict=True)] or [0] * 4
    if zero.mesh.dp.size == 1:
        return local
    return collectives.total(torch.tensor(local, device=batches[0].ids.device), zero.mesh.dp).tolist()


def _blame(step: int, batches: Sequence[Batch], loss: Tensor, grads: TensorDict, zero: Zero) -> str:
    """The error's message: what each rank's loss is, its first gradient that is not finite, and its records."""
    pairs = zip(tree.paths(grads), tree.values(grads), strict=True)
    leaf = next(("/".join(path) for path, g in pairs if not torch.isfinite(g).all()), "none")
    records = ", ".join(r for b in batches for r in b.records)
    own = f"the loss is {float(loss)} and the first gradient that is not finite is {leaf}; records: {records}"
    texts = collectives.texts(own, zero.mesh.all, loss.device)
    listed = texts[0] if len(texts) == 1 else "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(texts))
    return f"step {step}: {listed}\nnothing was updated. Look at these records, or lower the learning rate"
