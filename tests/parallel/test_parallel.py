"""The collectives, and the decoder without a sharded sequence, on two to four processes (gloo) against one."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm

from llava_fn import config, kernels, llama, spec, tree
from llava_fn.batch import Stream
from llava_fn.grad import remat, scan, value_and_grad
from llava_fn.parallel import collectives, vocab
from llava_fn.parallel.collectives import TP
from llava_fn.parallel.mesh import Axis, Mesh, gloo

C = config.Llama(vocab=24, width=24, blocks=3, heads=12, kv_heads=12, ffn=24)
LENGTHS, TAILS = (7, 9, 8), (4, 6, 2)  # 24 tokens, 12 rows read: both divide over 2, 3 and 4
IDS = torch.randint(0, C.vocab, (24,), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(0, C.vocab, (12,), generator=torch.Generator().manual_seed(2))
KINDS = {  # name -> type of its input and of its output
    "enter": "IR", "leave": "PI", "gather": "VR", "scatter": "PV", "split": "IV", "join": "VI",
}  # fmt: skip


def loss(p, tp: TP, blocks):
    x = vocab.embed(p["embed"], IDS, tp.axis)
    x = llama.decode(p, tp.split(x), Stream.of(LENGTHS, TAILS), C, tp, blocks)
    return llama.nll(p, x, TARGETS, C, tp).mean(), None


def replicated(path: tuple[str, ...]) -> bool:
    return path[-1].startswith("norm")


def linear_inputs(kind: str, rank: int, world: int) -> list[torch.Tensor]:
    """This rank's x, weight and gradient of y. Whole: x 12 12, weight 24 12, y 12 24."""
    x, w, g = (torch.randn(s, generator=torch.Generator().manual_seed(7)) for s in ((12, 12), (24, 12), (12, 24)))
    if kind == "column":  # tokens, rows of the weight, columns of y
        return [z.chunk(world, dim)[rank].contiguous() for z, dim in ((x, 0), (w, 0), (g, 1))]
    return [z.chunk(world, dim)[rank].contiguous() for z, dim in ((x, 1), (w, 1), (g, 0))]


def mapped(op, x: torch.Tensor, g: torch.Tensor, axis: Axis) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(all at once, one by one) of values and of gradients, for a collective along the first and along the last dim."""
    xs, gs, out = torch.stack([x, 2 * x + 1, x * x]).requires_grad_(), torch.stack([g, g + 1, g * g]), []
    for dim in (0, -1):

        def run(t: torch.Tensor, dim: int = dim) -> torch.Tensor:
            return op(t, axis, 0) if dim == 0 else op(t.mT, axis, -1).mT

        once, each = torch.func.vmap(run)(xs), torch.stack([run(t) for t in xs])
        out.append((once.detach(), each.detach()))
        out.append(tuple(torch.autograd.grad(y, xs, gs)[0] for y in (once, each)))
    return out


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(gloo(), init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    axis = Axis("tp", world, rank, dist.group.WORLD)
    out = {"adjoint": {}}
    for name, (before, after) in KINDS.items():
        rng = torch.Generator().manual_seed(10 * rank)
        shape = (12 // world if before == "V" else 12, 3)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3) if before == "I" else rng).requires_grad_()
        y = getattr(collectives, name)(x, axis, 0)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4) if after == "I" else rng)
        (back,) = torch.autograd.grad(y, x, g)
        out["adjoint"][name] = (x.detach(), y.detach(), g, back)
        out["vmap", name] = mapped(getattr(collectives, name), x.detach(), g, axis)
    for kind, op in (("column", kernels.column_linear), ("row", kernels.row_linear)):
        x, w, g = linear_inputs(kind, rank, world)
        y = op(x.requires_grad_(), w.requires_grad_(), dist.group.WORLD)
        out[kind] = (y.detach(), *torch.autograd.grad(y, (x, w), g))
    whole = spec.init(llama.spec(C), 0, Mesh(tp=axis))
    for sequence in (True, False):
        for name, blocks in (("plain", scan(llama.block)), ("remat", scan(remat(llama.block)))):
            (value, _), grads = value_and_grad(loss)(whole, TP(axis, sequence), blocks)
            leaves = []
            for path, g in zip(tree.paths(grads), tree.values(grads), strict=True):
                if sequence and replicated(path):  # each rank saw its tokens only
                    dist.all_reduce(g)
                leaves.append(g)
            out[sequence, name] = (value, dict(zip(tree.paths(grads), leaves, strict=True)))
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request):
    with tempfile.TemporaryDirectory() as folder:
        warm.ranks(worker, (request.param, folder), request.param)
        yield [torch.load(Path(folder) / f"{r}.pt", weights_only=True) for r in range(request.param)]


@pytest.mark.parametrize("name", KINDS)
def test_collective_keeps_its_type_and_its_backward_is_its_adjoint(ranks, name):
    world = len(ranks)
    x, y, g, back = (list(column) for column in zip(*(r["adjoint"][name] for r in ranks), strict=True))
    before, after = KINDS[name]
    value = {"I": x[0], "R": x[0], "V": torch.cat(x) if before == "V" else None, "P": sum(x) if before == "P" else None}
    for rank in range(world):
        part = value[before].chunk(world)[rank] if after == "V" else value[before]
        torch.testing.assert_close(y[rank], part)
    total = {"R": lambda: sum(g), "I": lambda: g[0], "V": lambda: torch.cat(g)}[after]()
    for rank in range(world):
        torch.testing.assert_close(back[rank], total.chunk(world)[rank] if before == "V" else total)


@pytest.mark.parametrize("kind, dims", [("column", (1, 0, 0)), ("row", (0, 1, 1))])
def test_parallel_linear_equals_one_process(ranks, kind, dims):
    x, w, g = linear_inputs("column", 0, 1)
    for mine, want, dim in zip(
        zip(*(r[kind] for r in ranks), strict=True), (x @ w.t(), g @ w, g.t() @ x), dims, strict=True
    ):
        torch.testing.assert_close(torch.cat(mine, dim), want)


@pytest.mark.parametrize("block", ["plain", "remat"])
@pytest.mark.parametrize("sequence", [True, False])
def test_tensor_parallel_llama_equals_one_process(ranks, sequence, block):
    world = len(ranks)
    (value, _), grads = value_and_grad(loss)(spec.init(llama.spec(C), 0), TP(), scan(llama.block))
    params = dict(spec.leaves(llama.spec(C)))
    for rank, got in enumerate(ranks):
        mine, leaves = got[sequence, block]
        torch.testing.assert_close(mine, value)
        for path, leaf in leaves.items():
            block_of = spec.shard(params[path], Mesh(tp=Axis("tp", world, rank)))
            torch.testing.assert_close(leaf, grads[path][block_of])


def test_collectives_on_an_axis_of_one_are_the_input_itself():
    x = torch.ones(3)
    assert all(getattr(collectives, name)(x, Axis("tp"), 0) is x for name in KINDS)


def test_split_refuses_tokens_that_do_not_divide():
    with pytest.raises(ValueError, match=r"dim 0 of \(5,\) does not divide over tp=2"):
        collectives.split(torch.ones(5), Axis("tp", 2), 0)


@pytest.mark.parametrize("name", KINDS)
def test_collective_under_vmap_is_the_collective_of_each(ranks, name):
    for got in ranks:
        for once, each in got["vmap", name]:
            torch.testing.assert_close(once, each)
