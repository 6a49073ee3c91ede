"""Training on meshes of two and four processes (gloo) against one: loss, all gradients, norm, updates."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm
from tensordict import TensorDict

from llava_fn import config, llava, lora, optim, spec, train, tree
from llava_fn.batch import IMAGE, Sample, collate
from llava_fn.data import records as data
from llava_fn.parallel import collectives, zero
from llava_fn.parallel.mesh import Mesh, gloo, make_mesh
from llava_fn.parallel.zero import Zero

C = config.Llava(
    config.Vision(image=4, patch=2, width=6, blocks=3, heads=2, ffn=10),
    config.Llama(vocab=36, width=24, blocks=3, heads=12, kv_heads=12, ffn=12),
)
TIED = replace(C, llama=replace(C.llama, tied=True, blocks=2))
OPTIM = optim.Optim(lr=1e-2, warmup=0.0, weight_decay=0.1, clip=0.5, eps=1e-3)
ADAPTERS = {
    "dropout": config.Lora(rank=2, alpha=3.0, rslora=True, dropout=0.3, targets=(r"llama/blocks/[02]/.*",)),
    "all": config.Lora(rank=2, alpha=3.0, targets=(".*",)),
}
UPDATES = 2  # the second reads what the first has left: parameters and moments
SAMPLES = {  # an image is "i", so many tokens a digit; the last three tokens are labelled
    "mixed": ("i4", "7", "2i5", "ii9", "i3", "5", "i6", "8", "3"),
    "text alone": ("4", "7", "5", "6", "9"),
    "fewer than ranks": ("2i5",),
}


def samples(layout):
    rng, out = torch.Generator().manual_seed(1), []
    for number, text in enumerate(SAMPLES[layout]):
        ids = [1]
        for kind in text:
            many = C.vision.patches if kind == "i" else int(kind)
            ids += [IMAGE] * many if kind == "i" else torch.randint(3, 36, (many,), generator=rng).tolist()
        pixels = torch.randint(0, 256, (text.count("i"), 3, 4, 4), generator=rng, dtype=torch.uint8)
        label = (False,) * (len(ids) - 3) + (True, number % 2 == 0, True)
        out.append(Sample(f"{number}", tuple(ids), label, pixels))
    return out


def batches(layout, mesh, micro):
    """This rank's micro-batches, as data.steps shares them out."""
    all_of_them = samples(layout)
    parts = data.balanced([len(s.ids) for s in all_of_them], mesh.dp.size * micro)
    mine = parts[mesh.dp.rank * micro : (mesh.dp.rank + 1) * micro]
    return [collate([all_of_them[i] for i in part], mesh.tp.size, C.vision.image) for part in mine]


def random(model, dtype, adapters=None):
    """Nothing is 1 or 0, so that no two leaves can be taken for one another."""
    shapes, rng = spec.init(lora.extended(llava.spec(model), adapters), 0), torch.Generator().manual_seed(3)
    values = [torch.randn(x.shape, generator=rng, dtype=torch.float64) * 0.4 + 0.1 for x in tree.values(shapes)]
    return tree.rebuild(shapes, [x.to(dtype) for x in values])


def share(p, how, kind):
    """What this rank keeps of each parameter."""
    out = TensorDict({})
    for path, param in spec.leaves(how.spec):
        out[path] = train.kept(path, param, p[path][spec.shard(param, how.mesh)].clone(), how, kind)
    return out.lock_()


def pieces(kept, how):
    """path -> (box, rows) of what this rank answers for."""
    rows = zip(tree.paths(kept), tree.values(kept), how.boxes(kept), how.answers(kept), strict=True)
    return {"/".join(path): (box, x[: box[0][1] - box[0][0]].clone()) for path, x, box, mine in rows if mine}


def learn(mesh, level=0, recompute=True, stage="all", layout="mixed", micro=1, model="whole", dtype="float64",
          backend="", ahead=True, loss="token_mean", lora_of="", quantise=None):  # fmt: skip
    """Loss and gradient norm of each update; the first gradient, and the parameters in the end, in pieces."""
    kind, model = getattr(torch, dtype), {"whole": C, "tied": TIED}[model]
    adapters = ADAPTERS.get(lora_of)
    parts = ("projector", "lora", "vision/blocks/1") if adapters else config.STAGES[stage]
    how = Zero(lora.extended(llava.spec(model), adapters), mesh, level, kind, ahead, parts)
    mine, frozen = tree.split(share(random(model, kind, adapters), how, quantise), train.trains(parts))
    state = train.TrainState(0, mine, optim.init(mine))
    run = llava.execution(recompute, backend, how)
    task = train.Task(frozen, model, OPTIM, 20, how, loss, run, adapters)
    seen = []
    for update in range(UPDATES):
        state, m = train.train_step(state, batches(layout, mesh, micro), task)
        seen.append((m.loss, m.grad_norm, m.tokens, m.labelled, m.samples))
        if update == 0:
            undo = max(1.0, m.grad_norm / OPTIM.clip) / (1 - OPTIM.beta1)
            first = pieces(tree.rebuild(mine, [g * undo for g in tree.values(state.moments.first)]), how)
    return {"seen": seen, "grads": first, "params": pieces(state.params, how)}


CASES = [  # what varies besides the mesh
    *({"level": level, "stage": stage} for level in zero.LEVELS for stage in config.STAGES),
    *({"level": level, "layout": layout} for level in zero.LEVELS for layout in ("text alone", "fewer than ranks")),
    {"level": 1, "stage": "projector", "layout": "text alone"},
    *({"level": level, "recompute": False} for level in (0, 1)),
    *({"level": level, "micro": 2} for level in zero.LEVELS),
    *({"level": level, "model": "tied"} for level in zero.LEVELS),
    {"level": 3, "ahead": False},
    *({"level": level, "lora_of": "dropout"} for level in zero.LEVELS),
    *({"level": level, "lora_of": "all"} for level in (1, 3)),
    {"level": 3, "lora_of": "dropout", "layout": "fewer than ranks"},
    {"level": 3, "lora_of": "dropout", "quantise": "int8", "micro": 2},
    *({"level": level, "dtype": "float32"} for level in zero.LEVELS),
]  # fmt: skip
NUMBERS = ("stage", "layout", "dtype", "model", "lora_of", "quantise")  # what changes what is computed
COMPILED = [{"level": 1, "backend": "aot_eager", "recompute": False}, {"level": 3, "backend": "aot_eager"}]
MUTATIONS = {  # each passes any test of the loss alone, or of a mean over equal ranks
    "gather's backward takes a slice": "gather",
    "leave's backward sums again, as funcol's own all_reduce does": "leave",
    "no sum over tp of what tp does not shard": "owner",
    "mean of means": "loss",
}


def mutated(name, mesh):
    kept = {"gather": collectives.gather, "leave": collectives.leave, "owner": zero.owner}
    wrong = {
        "gather": lambda x, axis, dim=0: collectives._Collective.apply(
            x, collectives._all_gather, collectives._slice, axis, dim) if axis.size > 1 else x,
        "leave": lambda x, axis, dim=0: collectives._Collective.apply(
            x, collectives._all_reduce, collectives._all_reduce, axis, dim) if axis.size > 1 else x,
        "owner": lambda p, mesh: mesh.dp,
    }  # fmt: skip
    module = zero if name == "owner" else collectives
    if name == "loss":
        return learn(mesh, loss="rank_mean")
    from llava_fn.parallel import vocab

    setattr(module, name, wrong[name])
    vocab.leave = collectives.leave
    try:
        return learn(mesh)
    finally:
        setattr(module, name, kept[name])
        vocab.leave = kept["leave"]


def meshes(world):
    """(dp, tp). Of four processes only the mesh of both: an axis alone is no other with four ranks than with two."""
    return {2: [(2, 1), (1, 2)], 4: [(2, 2)]}[world]


def worker(rank, world, folder, cases, mistakes):
    torch.set_num_threads(1)
    dist.init_process_group(gloo(), init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    out = {}
    for dp, tp in meshes(world):
        mesh = make_mesh(tp)
        out[dp, tp] = {number: learn(mesh, **case) for number, case in enumerate(cases)}
        out[dp, tp] |= {name: mutated(way, mesh) for name, way in mistakes.items()}
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def spawned(world, cases, mistakes):
    """What each rank has learned, by mesh and number of the case."""
    with tempfile.TemporaryDirectory() as folder:
        warm.ranks(worker, (world, folder, cases, mistakes), world)
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=True) for r in range(world)]


WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request):
    return spawned(request.param, CASES, MUTATIONS)


@pytest.fixture(scope="module")
def alone():
    known = {}

    def learned(**case):
        key = tuple(sorted(case.items()))
        if key not in known:
            known[key] = learn(Mesh(), **case)
        return known[key]

    return learned


def whole(parts, name, like):
    """A global tensor from the boxes of the ranks, which must tile it."""
    out, times = torch.full_like(like, float("nan")), torch.zeros(like.shape, dtype=torch.int64)
    for part in parts:
        if name in part:
            box, rows = part[name]
            where = tuple(slice(a, b) for a, b in box)
            out[where], times[where] = rows, times[where] + 1
    assert times.eq(1).all(), name
    return out


def differences(got, want):
    """The largest relative difference of loss and norm, of gradients, and of updated parameters."""
    seen = [max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(x, y, strict=True))
            for x, y in zip(got[0]["seen"], want["seen"], strict=True)]  # fmt: skip
    if any(g["seen"] != got[0]["seen"] for g in got):
        return [math.inf]  # the ranks do not even agree
    out = [max(seen)]
    for kind in ("grads", "params"):
        errors = []
        for name, (_, y) in want[kind].items():
            x = whole([g[kind] for g in got], name, y)
            errors.append(float((x - y).abs().max() / y.abs().max().clamp(min=1e-3)))
        out.append(max(errors))
    return out


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(f"{k}={v}" for k, v in CASES[n].items()))
def test_every_mesh_equals_one_process(ranks, alone, number):
    limit = 1e-5 if CASES[number].get("dtype") == "float32" else 1e-12
    want = alone(**{k: v for k, v in CASES[number].items() if k in NUMBERS})
    for mesh in meshes(len(ranks)):
        assert max(differences([r[mesh][number] for r in ranks], want)) <= limit, mesh


@pytest.mark.slow
def test_compiled_blocks_on_a_mesh_equal_one_process(alone):
    ranks = spawned(2, COMPILED, {})
    for mesh in meshes(2):
        for number in range(len(COMPILED)):
            assert max(differences([r[mesh][number] for r in ranks], alone())) <= 1e-12, mesh


def test_the_levels_and_their_ways_are_the_same_thing_on_one_process(alone):
    want = alone()
    for case in CASES:
        if not set(NUMBERS) & case.keys():
            assert max(differences([learn(Mesh(), **case)], want)) <= 1e-12, case


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_mistake_is_seen(ranks, alone, name):
    """Each is the mistake that such code makes most easily; the meshes where it cannot show are left out."""
    for dp, tp in meshes(len(ranks)):
        if (dp if MUTATIONS[name] == "loss" else tp) > 1:
            assert max(differences([r[dp, tp][name] for r in ranks], alone())) > 1e-3, (dp, tp)
