"""One update of the trainable parameters, as a function from state to state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict

from llava_fn import llava, optim, tree
from llava_fn.batch import Batch
from llava_fn.config import Llava
from llava_fn.grad import value_and_grad

STAGES: dict[str, Callable[[tree.Path], bool]] = {  # what is trained, by the first names of a path
    "projector": lambda path: path[0] == "projector",  # LLaVA's pre-training
    "projector+llama": lambda path: path[0] in ("projector", "llama"),  # LLaVA's fine-tuning
    "all": lambda path: True,
}


@dataclass(frozen=True)
class State:
    """Everything that an update reads and that changes: params are the trainable fp32 masters."""

    step: int  # updates done
    params: TensorDict
    moments: optim.Moments


@dataclass(frozen=True)
class Task:
    """Everything that an update reads and that stays: the frozen parameters are already in `dtype`."""

    frozen: TensorDict
    model: Llava
    optim: optim.Optim
    steps: int  # updates in the whole run: the schedule depends on it
    dtype: torch.dtype = torch.float32  # of the computation
    loss: str = "token_mean"  # or "rank_mean"
    run: llava.Execution = llava.Execution()


@dataclass(frozen=True)
class Metrics:
    """What one update saw. loss: nats per labelled token; grad_norm: before clipping."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    labelled: int
    samples: int


class NonFinite(ArithmeticError):
    """The loss or a gradient is NaN or infinite. The message names the step, the records and the first such leaf."""


def loss(params: TensorDict, batch: Batch, share: float, task: Task):
    """This micro-batch's part of the update's loss, and nothing else.

    share: what one labelled token weighs. token_mean: 1 / labelled tokens of the whole update, so that the loss does
    not depend on how samples are grouped. rank_mean: 1 / (labelled tokens of this micro-batch * micro-batches), the
    original's mean of means (HF Trainer).
    """
    both = tree.merge(tree.cast(params, task.dtype), task.frozen)
    return llava.nll(both, batch, task.model, task.run).sum() * share, None


def train_step(state: State, batches: Sequence[Batch], task: Task) -> tuple[State, Metrics]:
    """One update from the micro-batches of one step. The state is consumed: its tensors are updated in place.

    Raises NonFinite before anything is changed.
    """
    labelled = sum(len(b.targets) for b in batches)
    total, grads = 0.0, None
    for batch in batches:
        share = 1 / labelled if task.loss == "token_mean" else 1 / (len(batch.targets) * len(batches))
        (part, _), new = value_and_grad(loss)(state.params, batch, share, task)
        total = total + part
        if grads is not None:
            torch._foreach_add_(tree.values(new), tree.values(grads))
        grads = new
    step, norm = state.step + 1, tree.global_norm(grads)
    if not (torch.isfinite(total) and torch.isfinite(norm)):
        raise NonFinite(_blame(step, batches, total, grads))
    optim.clip(grads, norm, task.optim.clip)
    lr = optim.learning_rate(task.optim, step, task.steps)
    optim.adamw(state.params, grads, state.moments, step, lr, task.optim)
    tokens, samples = sum(len(b.ids) for b in batches), sum(len(b.records) for b in batches)
    return replace(state, step=step), Metrics(float(total), float(norm), lr, tokens, labelled, samples)


def _blame(step: int, batches: Sequence[Batch], total: torch.Tensor, grads: TensorDict) -> str:
    pairs = zip(tree.paths(grads), tree.values(grads), strict=True)
    leaf = next(("/".join(path) for path, g in pairs if not torch.isfinite(g).all()), "none")
    records = ", ".join(r for b in batches for r in b.records)
    return (
        f"step {step}: the loss is {float(total)} and the first gradient that is not finite is {leaf}; nothing was "
        f"updated. Look at these records, or lower the learning rate: {records}"
    )
