"""Sharded blocks: when their weights are gathered and their gradients summed; and the choices that cannot be."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode

from llava_fn import config, llava, spec, tree
from llava_fn.launch import agreement
from llava_fn.parallel.mesh import Axis, Mesh, gloo, make_mesh
from llava_fn.parallel.zero import Zero
from llava_fn.spec import Param

BLOCKS = 3
SPEC = {"part": {"blocks": {str(i): {"w": Param((5, 5), (None, None), 1.0)} for i in range(BLOCKS)}}}


class Log(TorchDispatchMode):
    """What is launched, in order: collectives and their waits, and whatever is written to it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if "all_gather" in name or "reduce_scatter" in name or "wait_tensor" in name:
            self.seen.append({"all_ga": "gather", "reduce": "scatter", "wait_t": "wait"}[name.split(".")[1][:6]])
        return func(*args, **(kwargs or {}))


def order(ahead, mesh):
    """What one pass forward and backward through three blocks launches, and its gradients."""
    zero = Zero(SPEC, mesh, 3, ahead=ahead)
    shards = zero.store(spec.init(SPEC, 0))
    blocks = [TensorDict({"w": shards["part", "blocks", str(i), "w"].requires_grad_()}) for i in range(BLOCKS)]
    log = Log()

    def block(p, x, number):
        log.seen.append(f"block {number}")
        return torch.tanh(x @ p["w"])

    x = torch.arange(10.0).view(2, 5).requires_grad_()
    with log:
        out = zero.scan(block, "part")(blocks, x, [(i,) for i in range(BLOCKS)])
        log.seen.append("backward")
        with torch.autograd.set_multithreading_enabled(False):
            grads = torch.autograd.grad(out.sum(), [x, *(b["w"] for b in blocks)])
    return log.seen, grads


def drifted(rank, mesh, by):
    """What is said of copies, of which rank 1 has one number that is off by so much."""
    params = spec.init(SPEC, 0)
    params["part", "blocks", "1", "w"][2, 3] += by * rank
    try:
        return agreement.check_params("the parameters", params, Zero(SPEC, mesh), torch.device("cpu"))
    except ValueError as error:
        return str(error)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(gloo(), init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mesh = make_mesh(1)
    out = {ahead: order(ahead, mesh) for ahead in (True, False)}
    out["threads"] = dist.group.WORLD._get_backend(torch.device("cpu")).options._threads
    out["drift"] = [drifted(rank, mesh, by) for by in (0.0, 1e-7)]
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    with tempfile.TemporaryDirectory() as folder:
        warm.ranks(worker, (2, folder), 2)
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=True) for r in range(2)]


def test_the_next_block_is_on_its_way_before_this_one_runs(ranks):
    for seen, _ in (r[True] for r in ranks):
        assert seen == [
            "gather", "wait", "gather", "block 0", "wait", "gather", "block 1", "wait", "block 2", "backward",
            "gather", "wait", "gather", "block 2", "scatter", "wait", "gather", "block 1", "scatter", "wait",
            "wait", "block 0", "scatter", "wait", "wait",
        ]  # fmt: skip


def test_without_it_each_is_gathered_when_it_runs_and_no_number_changes(ranks):
    for r in ranks:
        first = r[False][0][: r[False][0].index("backward")]
        assert first == ["gather", "wait", "block 0", "gather", "wait", "block 1", "gather", "wait", "block 2"]
        assert all(torch.equal(a, b) for a, b in zip(r[True][1], r[False][1], strict=True))


def test_collectives_of_gloo_do_not_run_side_by_side(ranks):
    assert [r["threads"] for r in ranks] == [1, 1]


def test_copies_that_have_drifted_apart_are_named_on_every_rank(ranks):
    for same, other in (r["drift"] for r in ranks):
        assert same is None and "do not agree on the parameters" in other
        (line,) = other.splitlines()[1:]
        assert "rank 1: part/blocks/1/w: " in line


def test_level_3_needs_recompute():
    with pytest.raises(ValueError, match="zero=3 gathers a block's weights again in the backward pass; it needs recom"):
        llava.execution(False, zero=Zero(level=3, train=("llama",)))


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match="zero=2: must be one of 0, 1, 3"):
        Zero(level=2)


@pytest.mark.parametrize("level", [0, 1, 3])
@pytest.mark.parametrize("dp, tp", [(1, 1), (3, 1), (1, 2), (7, 2), (64, 2)])
def test_boxes_of_all_ranks_make_up_every_tensor_and_say_what_is_kept(level, dp, tp):
    c = config.Llava(
        config.Vision(image=4, patch=2, width=6, blocks=2, heads=2, ffn=10),
        config.Llama(vocab=10, width=12, blocks=1, heads=2, kv_heads=2, ffn=6),
    )
    shapes = llava.spec(c)
    whole = spec.init(shapes, 0)
    times = {path: torch.zeros(x.shape) for path, x in zip(tree.paths(whole), tree.values(whole), strict=True)}
    for rank in range(dp * tp):
        axes = Axis("dp", dp, rank // tp), Axis("tp", tp, rank % tp), Axis("all", dp * tp, rank)
        zero = Zero(shapes, Mesh(*axes), level)
        kept = zero.store(spec.init(shapes, 0, zero.mesh))
        boxes, mine = zero.boxes(kept), zero.answers(kept)
        for path, x, box, answers in zip(tree.paths(kept), tree.values(kept), boxes, mine, strict=True):
            where = tuple(slice(a, b) for a, b in box)
            rows = box[0][1] - box[0][0]
            assert torch.equal(x[:rows], whole[path][where]) and not x[rows:].any()
            times[path][where] += answers
        again = zero.read(kept, lambda path, box: whole[path][tuple(slice(a, b) for a, b in box)])
        assert all(torch.equal(a, b) for a, b in zip(tree.values(again), tree.values(kept), strict=True))
    assert all(t.eq(1).all() for t in times.values())
