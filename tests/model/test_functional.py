"""The transforms: value_and_grad, remat, torch.func, compile; and freezing by splitting trees."""

import ast
import gc
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rounding import same_but_rounded
from tensordict import TensorDict
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava_fn import config, llama, llava, spec, tree, vit
from llava_fn.batch import IMAGE, Sample, collate
from llava_fn.grad import remat, scan, value_and_grad
from llava_fn.parallel.mesh import Axis, Mesh

C = config.Llava(
    config.Vision(image=8, patch=4, width=8, blocks=3, heads=2, ffn=12),
    config.Llama(vocab=24, width=12, blocks=3, heads=2, kv_heads=1, ffn=10),
)
ROOT = Path(__file__).parents[2]


def make_batch(texts=((5, 4), (3, 2), (6, 4))):
    """texts: (prompt tokens, answer tokens) of each sample; every sample but the second has an image."""
    rng = torch.Generator().manual_seed(1)
    samples = []
    for j, (prompt, answer) in enumerate(texts):
        image = [IMAGE] * C.vision.patches if j != 1 else []
        words = torch.randint(3, C.llama.vocab, (prompt + answer,), generator=rng).tolist()
        ids = [1, *words[:2], *image, *words[2:]]
        label = [False] * (len(ids) - answer) + [True] * answer
        pixels = torch.randint(0, 256, (int(j != 1), 3, 8, 8), generator=rng, dtype=torch.uint8)
        samples.append(Sample(str(j), tuple(ids), tuple(label), pixels))
    return collate(samples)


def loss(p, batch, run=llava.Execution()):
    nll = llava.nll(p, batch, C, run)
    return nll.mean(), nll.detach()


@pytest.fixture(scope="module")
def params():
    return spec.init(llava.spec(C), 0)


def equal(a: TensorDict, b: TensorDict, to_the_bit: bool = False) -> None:
    assert tree.paths(a) == tree.paths(b)
    scale = 0.0 if to_the_bit else max(x.abs().max().item() for x in tree.values(b))
    for x, y in zip(tree.values(a), tree.values(b), strict=True):
        same_but_rounded(x, y, scale)


def test_value_and_grad_equals_torch_func(params):
    batch = make_batch()
    (value, aux), grads = value_and_grad(loss)(params, batch)
    want, (other, _) = torch.func.grad_and_value(loss, has_aux=True)(params, batch)
    same_but_rounded(value, other)
    assert len(aux) == len(batch.targets) and not value.requires_grad
    equal(grads, want)


def test_a_leaf_that_the_loss_does_not_read_has_a_gradient_of_zeros():
    p = TensorDict({"a": torch.ones(2), "b": torch.ones(3)}).lock_()
    _, grads = value_and_grad(lambda p: (p["a"].sum(), None))(p)
    assert grads["b"].tolist() == [0, 0, 0] and grads["a"].tolist() == [1, 1]


def test_remat_changes_no_value_and_no_gradient(params):
    batch = make_batch()
    plain = value_and_grad(loss)(params, batch)
    again = value_and_grad(loss)(params, batch, llava.execution(recompute=True))
    assert torch.equal(plain[0][0], again[0][0])
    equal(plain[1], again[1], to_the_bit=True)


def test_remat_keeps_only_the_input_of_the_block():
    kept = []

    def wide(x):
        return (x.exp().sin().exp() * x).sum(0, keepdim=True)

    for fn in (wide, remat(wide)):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(x) or x, lambda x: x):
            kept.append([])
            fn(torch.ones(9, requires_grad=True))
    assert len(kept[0]) >= 4 and len(kept[1]) <= 1


def test_compiled_blocks_change_no_gradient_and_are_compiled_once(params):
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters
    counter.clear()
    run = llava.execution(recompute=True, backend="eager")
    graphs = []
    for texts in (((5, 4), (3, 2)), ((9, 4), (3, 7), (6, 6)), ((7, 7), (8, 2)), ((3, 3), (4, 4), (5, 5), (6, 6))):
        batch = make_batch(texts)
        equal(value_and_grad(loss)(params, batch, run)[1], value_and_grad(loss)(params, batch)[1])
        graphs.append(counter["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 4 or torch.__version__ < "2.13"  # older ones compile again, some times


def test_model_works_under_jvp(params):
    batch, rng = make_batch(), torch.Generator().manual_seed(3)
    tangent = tree.rebuild(params, [torch.randn(p.shape, generator=rng) for p in tree.values(params)])
    _, grads = value_and_grad(loss)(params, batch)
    with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel has no forward-mode rule
        _, slope = torch.func.jvp(lambda p: loss(p, batch)[0], (params,), (tangent,))
    want = sum((g * t).sum() for g, t in zip(tree.values(grads), tree.values(tangent), strict=True))
    torch.testing.assert_close(slope, want, rtol=1e-4, atol=1e-4)


def test_vmap_over_stacked_trees_equals_a_loop(params):
    batch, other = make_batch(), spec.init(llava.spec(C), 9)
    with sdpa_kernel(SDPBackend.MATH):
        stacked = torch.func.vmap(lambda p: loss(p, batch)[0])(torch.stack([params, other]))
        grads = torch.func.vmap(torch.func.grad(lambda p: loss(p, batch)[0]))(torch.stack([params, other]))
    same_but_rounded(stacked, torch.stack([loss(p, batch)[0] for p in (params, other)]))
    equal(grads[1], value_and_grad(loss)(other, batch)[1])


def test_gradients_of_a_split_tree_are_the_split_gradients(params):
    batch = make_batch()
    mine, frozen = tree.split(params, lambda path: path[0] == "projector" or path[-1] == "norm1")
    _, grads = value_and_grad(lambda p: loss(tree.merge(p, frozen), batch))(mine)
    _, whole = value_and_grad(loss)(params, batch)
    assert {path[0] for path in tree.paths(grads)} == {"projector", "llama"}
    for path in tree.paths(grads):
        same_but_rounded(grads[path], whole[path])


def test_merge_refuses_a_leaf_that_both_trees_hold(params):
    with pytest.raises(ValueError, match="both trees hold projector/w1"):
        tree.merge(params.select("projector"), params)


def test_global_norm_is_that_of_all_numbers(params):
    flat = torch.cat([p.flatten() for p in tree.values(params)])
    same_but_rounded(tree.global_norm(params), flat.norm())


def test_init_is_the_same_model_on_every_mesh(params):
    whole = params["llama"]
    shards = [spec.init(llama.spec(C.llama), 0, Mesh(tp=Axis("tp", 2, rank))) for rank in range(2)]
    single = spec.init({"llama": llama.spec(C.llama)}, 0)["llama"]
    equal(whole, single, to_the_bit=True)
    table = torch.cat([s["blocks", "1", "w_gate"] for s in shards])
    names = spec.init(llama.spec(C.llama), 0)["blocks", "1", "w_gate"]
    assert torch.equal(table, names)
    assert shards[1]["blocks", "0", "wo"].shape == (12, 6) and torch.equal(shards[0]["norm"], torch.ones(12))


def test_init_refuses_heads_that_do_not_divide_over_the_mesh():
    with pytest.raises(ValueError, match="24 .vocab. does not divide over tp=7"):
        spec.init(llama.spec(C.llama), 0, Mesh(tp=Axis("tp", 7)))


def test_blocks_stay_in_order_when_there_are_more_than_ten():
    c = config.Llama(vocab=5, width=4, blocks=12, heads=1, kv_heads=1, ffn=4)
    assert list(spec.init(llama.spec(c), 0)["blocks"].keys()) == [str(i) for i in range(12)]


def test_published_models_have_the_published_sizes():
    assert spec.count(llama.spec(config.LLAVA_7B.llama)) == 6_738_415_616
    assert spec.count(llama.spec(config.LLAVA_13B.llama)) == 13_015_864_320
    assert spec.count(llava.spec(config.LLAVA_7B)["projector"]) == 20_979_712
    assert spec.count(llava.spec(config.LLAVA_13B)["projector"]) == 31_467_520
    assert spec.count(llava.spec(config.LLAVA_7B)["vision"]) == 290_909_184


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: config.Vision(patch=13), "vision.image=336 is not a multiple of vision.patch=13"),
        (lambda: config.Vision(heads=7), "vision.width=1024 is not a multiple of vision.heads=7"),
        (lambda: config.Vision(act="tanh"), "'tanh' is not one of"),
        (lambda: config.Vision(feature_layer=-26), "feature_layer=-26 names no hidden state"),
        (lambda: config.Llama(heads=31), "llama.width=4096 is not a multiple of llama.heads=31"),
        (lambda: config.Llama(kv_heads=5), "llama.heads=32 is not a multiple of llama.kv_heads=5"),
        (lambda: config.Llama(width=96, heads=32), "= 3 is odd"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_image_tokens_that_do_not_match_the_images_are_refused(params):
    import dataclasses

    batch = make_batch()
    fewer = dataclasses.replace(batch, pixels=batch.pixels[:1])
    with pytest.raises(ValueError, match="8 image tokens do not match 1 images of 4 patches"):
        llava.nll(params, fewer, C)


def test_a_sample_without_a_label_is_refused_by_name():
    with pytest.raises(ValueError, match="records without a single labelled token: lonely"):
        collate([Sample("lonely", (1, 2), (False, False), torch.zeros(0, 3, 8, 8, dtype=torch.uint8))])


@pytest.mark.parametrize("run", ["default", "execution"])
def test_the_blocks_that_run_are_those_of_the_tower_that_the_config_names(params, monkeypatch, run):
    """Another tower with CLIP's leaves: CLIP's own block would run on them without an error."""

    @dataclass(frozen=True)
    class Other(config.Vision):
        pass

    def block(p, x, segments, c):
        return vit.block(p, x, segments, c) + 1

    monkeypatch.setitem(llava.TOWERS, Other, SimpleNamespace(**vars(vit) | {"block": block}))
    c = replace(C, vision=Other(**config.plain(C.vision)))
    pixels = make_batch().pixels
    ours = {"default": llava.Execution(), "execution": llava.execution(recompute=True, vision=c.vision)}[run]
    want = llava.features(params, pixels, C, llava.Execution(tower_blocks=scan(block)))
    assert torch.equal(llava.features(params, pixels, c, ours), want)
    assert not torch.equal(want, llava.features(params, pixels, C))


def test_functions_fit_on_a_screen():
    for path in sorted((ROOT / "llava_fn").rglob("*.py")) + sorted((ROOT / "recipes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_walking_a_locked_tree_does_not_keep_it_alive():
    """A cycle would hold gradients until Python looks for cycles, which knows nothing of gigabytes."""
    p = spec.init(llava.spec(C), 0)
    last = weakref.ref(p["llama", "embed"])
    gc.disable()
    try:
        tree.merge(*tree.split(p, lambda path: path[0] == "llama"))
        tree.rebuild(tree.cast(p, torch.bfloat16), tree.values(p))
        del p
        assert last() is None
    finally:
        gc.enable()
