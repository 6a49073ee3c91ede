"""Traps of PyTorch 2.13 that this package steps around. A test that fails says that torch has mended one.

Then what its docstring names may become simpler. Each shows the trap itself, and nothing of ours.
"""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tensordict import TensorDict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import _functional_collectives as funcol
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llava_fn.grad import remat
from llava_fn.plan import trace

older_fail_otherwise = pytest.mark.skipif(torch.__version__ < "2.8", reason="its functional collectives fail otherwise")


class Log(TorchDispatchMode):
    """The names of all operations, and how many storages were alive at most."""

    def __init__(self):
        super().__init__()
        self.seen, self.alive, self.most = [], set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.append(func._schema.name)
        for storage in [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]:
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                weakref.finalize(storage, self.alive.discard, storage._cdata)
        self.most = max(self.most, len(self.alive))
        return out

    def collectives(self):
        return [name for name in self.seen if "all_reduce" in name or "allreduce" in name]


@pytest.fixture
def group():
    """The group of two ranks, as the first of them; nothing is sent."""
    with trace.world(2, 0, 1):
        yield dist.group.WORLD


class Sixfold(torch.autograd.Function):
    """x: 2 x, whose gradient is said to be 6."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 6 * g


def of_sixfold(x):
    return Sixfold.apply(x).sum()


@pytest.mark.filterwarnings("ignore:c10d..allreduce_")
@pytest.mark.parametrize("grad", ["autograd", "func"])
def test_a_plain_collective_in_a_forward_pass_has_a_local_gradient(group, grad):
    """Its backward pass sends nothing, so gradients are this rank's part alone. Instead: parallel/collectives.py."""

    def loss(x):
        y = 2 * x
        dist.all_reduce(y)
        return y.sum()

    x = torch.ones(1, requires_grad=grad == "autograd")
    with Log() as log:
        (g,) = torch.autograd.grad(loss(x), x) if grad == "autograd" else (torch.func.grad(loss)(x),)
    assert g.item() == 2 and log.collectives() == ["c10d::allreduce_"]


@older_fail_otherwise
def test_a_functional_all_reduce_is_summed_again_in_its_backward_pass(group):
    """A loss that all ranks share (P -> I) then counts once for each of them. Instead: `leave` of collectives.py."""
    x = torch.ones(1, requires_grad=True)
    with Log() as log:
        torch.autograd.grad(funcol.wait_tensor(funcol.all_reduce(x, "sum", group)).sum(), x)
    assert log.collectives() == ["_c10d_functional::all_reduce"] * 2


@older_fail_otherwise
def test_a_functional_collective_does_not_work_under_torch_func(group):
    """It lacks a setup_context. Instead: _Collective of parallel/collectives.py."""
    with pytest.raises(RuntimeError, match="must override the setup_context"):
        torch.func.grad(lambda x: funcol.wait_tensor(funcol.all_reduce(x, "sum", group)).sum())(torch.ones(1))


@older_fail_otherwise
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_mapped_functional_collective_is_sent_row_by_row(group):
    """It has no rule for vmap, which falls back to a loop. Instead: the rule written out in _Collective."""
    with Log() as log:
        torch.func.vmap(lambda x: funcol.wait_tensor(funcol.all_reduce(x, "sum", group)))(torch.ones(3, 2))
    assert len(log.collectives()) == 3


@pytest.mark.parametrize("transform", ["grad", "vjp"])
def test_a_compiled_torch_func_loses_the_backward_of_a_function(transform):
    """The gradient is that of what forward did, 2, and nothing is said. Instead: grad.value_and_grad, which is
    torch.autograd.grad, around blocks that are compiled one by one (llava.execution)."""
    torch._dynamo.reset()
    ours = {
        "grad": torch.func.grad(of_sixfold),
        "vjp": lambda x: torch.func.vjp(of_sixfold, x)[1](torch.ones(()))[0],
    }[transform]
    assert ours(torch.ones(1)).item() == 6
    assert torch.compile(ours, backend="eager")(torch.ones(1)).item() == 2
    x = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad(torch.compile(of_sixfold, backend="eager")(x), x)[0].item() == 6


def test_a_compiled_graph_cannot_hold_a_block_that_is_recomputed():
    """Its backward pass calls torch.autograd.grad. Instead: llava.execution compiles a block, then recomputes it."""
    torch._dynamo.reset()
    again = torch.compile(remat(torch.sin), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        again(torch.ones(1, requires_grad=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_torch_checkpoint_does_not_work_under_torch_func(reentrant):
    """It needs hooks on saved tensors, or a Function without setup_context. Instead: grad.remat."""
    with pytest.raises(RuntimeError, match="saved tensor hooks|setup_context"):
        torch.func.grad(lambda x: checkpoint(torch.sin, x, use_reentrant=reentrant).sum())(torch.ones(1))


def test_grad_and_value_of_torch_func_keeps_what_the_backward_pass_makes():
    """It builds the graph of the gradient, in which all of it lives on. Instead: grad.value_and_grad."""

    def deep(x):
        for _ in range(20):
            x = x.sin()
        return x.sum()

    x = torch.ones(9, requires_grad=True)
    with Log() as ours:
        torch.autograd.grad(deep(x), x)
    with Log() as theirs:
        torch.func.grad_and_value(deep)(torch.ones(9))
    assert ours.most < 30 and theirs.most > 2 * ours.most


def test_the_paths_of_a_locked_tree_keep_its_tensors():
    """tensordict caches them in a cycle, which Python finds when it likes. Instead: tree.paths."""
    t = TensorDict({"a": {"b": torch.ones(2)}}).lock_()
    last = weakref.ref(t["a", "b"])
    gc.disable()
    try:
        list(t.keys(True, True))
        del t
        assert last() is not None
    finally:
        gc.enable()


def test_no_operations_are_counted_for_attention_on_the_cpu():
    """Instead: trace._attention."""
    q = torch.ones(1, 2, 8, 4)
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 0


def test_waiting_for_a_tensor_without_memory_gives_another(group):
    """Memory would count twice. Instead: trace.Recorder passes the tensor through."""
    with FakeTensorMode():
        x = torch.ones(2)
        assert torch.ops._c10d_functional.wait_tensor(x).untyped_storage()._cdata != x.untyped_storage()._cdata


@contextmanager
def rendezvous(monkeypatch, port, attempt):
    """The store that a process finds which torchrun has started so many times."""
    own = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": attempt}
    with monkeypatch.context() as patch:
        for name, value in (own | elastic).items():
            patch.setenv(name, str(value))
        yield next(dist.rendezvous("env://"))[0]


def test_processes_that_torchrun_starts_again_find_the_addresses_of_those_before(monkeypatch):
    """They share torchrun's store, and nothing in it is theirs alone. Instead: processes.check_processes wants
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (README)."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with rendezvous(monkeypatch, agent.port, 0) as store:
        store.set("address", "old")
    with rendezvous(monkeypatch, agent.port, 1) as store:
        assert store.check(["address"]) and store.get("address") == b"old"
