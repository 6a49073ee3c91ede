"""Adapters against PEFT on transformers' LLaVA: loss, gradients, updates with two rates, merged weights; dropout."""

import warnings
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from oracles import CONFIGS, hf_inputs, hf_llava, ours, sample
from rounding import same_but_rounded

from llava_fn import dropout, grad, linear, llava, lora, optim, spec, train, tree
from llava_fn.batch import collate
from llava_fn.config import Lora, Optim
from llava_fn.grad import value_and_grad
from llava_fn.parallel.mesh import Axis
from llava_fn.parallel.zero import Zero

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

C = CONFIGS[1]  # grouped queries, sizes that no two dims share
SHAPES = llava.spec(C)
DECODER = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
LAYOUTS = ["i5", "p4", "pip3p2", "ipi9pi1"]


def random_adapters(c, seed=3):
    """`a` and `b` away from zero, as after some training."""
    p = spec.init({"lora": lora.spec(SHAPES, c)}, seed)
    rng = torch.Generator().manual_seed(seed)
    return tree.rebuild(p, [x + 0.1 * torch.randn(x.shape, generator=rng) for x in tree.values(p)])


def peft_model(c, adapters):
    model = hf_llava(C)
    how = LoraConfig(r=c.rank, lora_alpha=c.alpha, use_rslora=c.rslora, target_modules=DECODER)
    model = get_peft_model(model, how).eval()
    for (path, which), p in peft_params(model).items():
        p.data = adapters[("lora", *path, which)].clone()
    return model


def peft_params(model):
    """(path, "a" or "b") -> PEFT's parameter."""
    out = {}
    for name, p in model.named_parameters():
        if ".lora_" in name:
            block = name.split(".layers.")[1].split(".")
            leaf = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w_gate",
                    "up_proj": "w_up", "down_proj": "w_down"}[block[2]]  # fmt: skip
            out[("llama", "blocks", block[0], leaf), "a" if ".lora_A." in name else "b"] = p
    return out


@pytest.fixture(scope="module")
def base():
    return ours(hf_llava(C), C)


@pytest.fixture(scope="module")
def batch():
    return collate([sample(C, i, layout) for i, layout in enumerate(LAYOUTS)])


def inputs(batch):
    samples = {s.record: s for s in (sample(C, i, layout) for i, layout in enumerate(LAYOUTS))}
    return hf_inputs(C, [samples[name] for name in batch.records])


def close(a, b, limit=1e-5):
    assert (a - b).abs().max().item() <= limit * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("rslora", [False, True])
def test_loss_and_the_gradient_of_every_adapter_are_those_of_peft(base, batch, rslora):
    c = Lora(rank=4, alpha=6.0, rslora=rslora)
    adapters = random_adapters(c)
    model = peft_model(c, adapters)
    out = model(**inputs(batch))
    out.loss.backward()
    theirs = peft_params(model)
    assert len(theirs) == len(tree.paths(adapters)) == 2 * 7 * C.llama.blocks
    for run in (llava.Execution(), llava.execution(recompute=True)):
        loss = lambda p, run=run: (llava.nll(lora.attach(tree.merge(base, p), c), batch, C, run).mean(), None)  # noqa: E731
        (value, _), grads = value_and_grad(loss)(adapters)
        close(value, out.loss.detach())
        for (path, which), p in theirs.items():
            close(grads[("lora", *path, which)], p.grad)


def test_three_updates_with_two_rates_are_those_of_torchs_adamw_on_peft(base, batch):
    c = Lora(rank=4, alpha=6.0)
    o = Optim(lr=1e-2, warmup=0.0, weight_decay=0.1, clip=0.0, eps=1e-4, rates=((r"lora/.*/b", 4e-2),))
    adapters = random_adapters(c)
    model = peft_model(c, adapters)
    theirs = peft_params(model)
    groups = [
        {"params": [p for (_, which), p in theirs.items() if which == x], "lr": rate, "weight_decay": 0.1, "peak": rate}
        for x, rate in (("a", 1e-2), ("b", 4e-2))
    ]
    oracle = torch.optim.AdamW(groups, eps=1e-4)
    zero = Zero({**SHAPES, "lora": lora.spec(SHAPES, c)}, train=("lora",))
    state = train.TrainState(0, adapters, optim.init(adapters))
    task = train.Task(base, C, o, 10, zero, lora=c)
    for step in range(1, 4):
        for group in oracle.param_groups:
            group["lr"] = optim.learning_rate(replace(o, lr=group["peak"]), step, 10)
        oracle.zero_grad()
        model(**inputs(batch)).loss.backward()
        oracle.step()
        state, _ = train.train_step(state, [batch], task)
    for (path, which), p in theirs.items():
        close(state.params[("lora", *path, which)], p.detach(), 2e-5)


def test_merged_weights_give_the_logits_of_attached_ones(base, batch):
    c = Lora(rank=4, alpha=6.0, targets=(".*",))
    adapters = random_adapters(c)
    assert {path[1] for path in tree.paths(adapters)} == {"vision", "projector", "llama"}
    attached = lora.attach(tree.merge(base, adapters), c)
    pairs = {path: pair | {"scale": torch.tensor(c.scale)} for path, pair in lora.nodes(adapters["lora"]).items()}
    merged = lora.merge(base, pairs)
    one, two, none = (llava.forward(p, batch, C) for p in (attached, merged, base))
    close(one, two)
    assert (one - none).abs().max() > 0.1


def test_new_adapters_change_nothing(base, batch):
    fresh = spec.init({"lora": lora.spec(SHAPES, Lora())}, 0)
    assert torch.equal(
        llava.forward(lora.attach(tree.merge(base, fresh), Lora()), batch, C), llava.forward(base, batch, C)
    )
    a = fresh["lora", "llama", "blocks", "0", "wq", "a"]
    assert a.std().item() == pytest.approx((3 * C.llama.width) ** -0.5, rel=0.1)  # the spread of PEFT's kaiming_uniform


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_on_a_compressed_base_are_adapters_on_what_it_stands_for(kind, recompute, monkeypatch):
    # what is recomputed has a first pass without gradients, in which a CPU with VNNI rounds rows
    monkeypatch.setattr(import_module("llava_fn.kernels.int8_linear"), "vnni", lambda: False)
    wide = replace(C, llama=replace(C.llama, width=64, heads=4, kv_heads=2, ffn=128))
    shapes, c = llava.spec(wide), Lora(rank=3, alpha=5.0)
    base = spec.init(shapes, 1)
    adapters = spec.init({"lora": lora.spec(shapes, c)}, 2)
    adapters = tree.rebuild(adapters, [x + 0.05 for x in tree.values(adapters)])
    small = linear.quantise(base, kind)
    whole = tree.rebuild(base, [
        linear.whole(small[path], torch.float32) if linear.compressible(path) else x
        for path, x in zip(tree.paths(base), tree.values(base), strict=True)
    ])  # fmt: skip
    batch = collate([sample(wide, i, layout) for i, layout in enumerate(LAYOUTS)])
    run = llava.execution(recompute)

    def loss(p, frozen):
        return llava.nll(lora.attach(tree.merge(frozen, p), c), batch, wide, run).mean(), None

    trained = tree.merge(adapters, tree.split(base, lambda path: path[0] == "projector")[0])
    frozen = [tree.split(p, lambda path: path[0] != "projector")[0] for p in (small, whole)]
    (one, g1), (two, g2) = (value_and_grad(loss)(trained, p) for p in frozen)
    same_but_rounded(one[0], two[0])
    for path in tree.paths(g1):
        same_but_rounded(g1[path], g2[path])
    assert (llava.nll(base, batch, wide).mean() - llava.nll(whole, batch, wide).mean()).abs() > 1e-5


def test_no_compressed_weight_stays_whole_between_the_passes():
    codes = linear.to_nf4(torch.randn(256, 512), "w")
    x = torch.randn(2, 512, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear.linear(x, codes)
    assert y.requires_grad and max(t.numel() * t.element_size() for t in kept) <= 256 * 512 // 2
    (g,) = torch.autograd.grad(y.sum(), x)
    same_but_rounded(g, linear.whole(codes, torch.float32).sum(0).expand(2, -1))


@pytest.mark.parametrize("shape", [(5, 64), (3, 256), (64, 128)])
def test_nf4_has_the_bytes_and_values_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.03
    w[0, :64] = 0
    ours_ = linear.to_nf4(w, "w")
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(ours_["nf4"].flatten(), packed.flatten())
    assert torch.equal(ours_["scale"].flatten(), state.absmax.flatten())
    assert torch.equal(linear.whole(ours_, torch.float32), functional.dequantize_4bit(packed, state))


def test_what_cannot_be_four_bits_is_refused():
    with pytest.raises(ValueError, match="llama/x has 96 inputs a rank, which blocks of 64 do not divide; use int8"):
        linear.to_nf4(torch.zeros(2, 96), "llama/x")
    with pytest.raises(ValueError, match="llama/x holds an infinite value or NaN, which nf4 cannot hold"):
        linear.to_nf4(torch.full((2, 64), torch.inf), "llama/x")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, "lora.rank=0; it must be at least 1"),
        ({"alpha": -1.0}, "lora.alpha=-1.0; it must be above 0"),
        ({"dropout": 1.0}, "lora.dropout=1.0; it must be at least 0 and below 1"),
        ({"targets": ("(",)}, "lora.targets: '.' is no regular expression"),
        ({"targets": ("vision/.*",), "dropout": 0.1}, "'vision/.*': a dropout is of adapters of llama/blocks/ alone"),
    ],
)
def test_options_that_make_no_adapter_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Lora(**fields)


def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is():
    with pytest.raises(
        ValueError, match="'llama/embed' matches no linear layer; they are vision/blocks/N/wq, .*w_down"
    ):
        lora.spec(SHAPES, Lora(targets=("llama/blocks/.*", "llama/embed")))


def test_adapters_without_a_weight_are_named(base):
    pair = {("llama", "blocks", "9", "wq"): {"a": torch.zeros(1, 2)}}
    with pytest.raises(ValueError, match="adapters without a weight: llama/blocks/9/wq"):
        lora.attached(base, pair)
    with pytest.raises(ValueError, match="adapters without a plain weight: llama/blocks/9/wq"):
        lora.merge(base, pair)


# Dropout.


def test_dropout_keeps_its_share_and_the_mean():
    rows = dropout._mixed(torch.arange(4000, dtype=torch.int32) * 977)
    keys = dropout.Keys(7, 0.3, rows, rows, 4, Axis("tp"))
    columns = keys.of(("llama", "blocks", "0", "wq"), 50)
    x = dropout.dropped(torch.ones(4000, 50), columns["rows"], columns["columns"], columns["dropout"])
    kept = x != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=5e-3) and x.mean().item() == pytest.approx(1, abs=1e-2)
    assert x.unique().tolist() == pytest.approx([0, 1 / 0.7])
    z = (kept.float() - 0.7) / 0.21**0.5
    for part in (z, z[:400].T):  # no row and no column is special, and any two of either are independent
        assert (part.mean(0) * len(part) ** 0.5).abs().max() < 5
        pairs = (part.T @ part / len(part) ** 0.5).fill_diagonal_(0)
        assert pairs.abs().max() < 7 and pairs.square().mean() == pytest.approx(1, abs=0.1)
    squares = z[1:, 1:] * z[1:, :-1] * z[:-1, 1:] * z[:-1, :-1]
    assert abs(squares.mean().item()) * squares.numel() ** 0.5 < 5


def test_dropout_differs_by_step_leaf_and_record_and_is_none_without_keys(base, batch):
    c = Lora(rank=4, alpha=6.0, dropout=0.5)
    params = tree.merge(base, random_adapters(c))

    def hidden(step, of=batch):
        keys = dropout.Keys.make(of, step, c.dropout, C.llama.blocks, Axis("tp"))
        return llava.forward(lora.attach(params, c, keys), of, C)

    plain = llava.forward(lora.attach(params, c), batch, C)
    assert torch.equal(hidden(1), hidden(1))
    assert not torch.equal(hidden(1), hidden(2)) and not torch.equal(hidden(1), plain)
    renamed = replace(batch, records=tuple(f"{name}'" for name in batch.records))
    assert not torch.equal(hidden(1), hidden(1, renamed))
    keys = dropout.Keys.make(batch, 1, 0.5, C.llama.blocks, Axis("tp"))
    masks = [keys.of(("llama", "blocks", block, name), 48)["columns"] for block in "01" for name in ("wq", "wk")]
    assert len({tuple(mask.tolist()) for mask in masks}) == 4


def test_dropout_is_the_same_when_blocks_are_recomputed_or_compiled(base, batch):
    c = Lora(rank=4, alpha=6.0, dropout=0.5)
    trained = random_adapters(c)
    zero = Zero({**SHAPES, "lora": lora.spec(SHAPES, c)}, train=("lora",))
    grads = []
    for run in (
        llava.Execution(),
        llava.execution(recompute=True),
        llava.Execution(llama_blocks=grad.scan(grad.remat(llava.llama.block))),
    ):
        task = train.Task(base, C, Optim(), 10, zero, run=run, lora=c)
        grads.append(value_and_grad(train.loss)(trained, batch, 5, 0.1, task)[1])
    for path in tree.paths(trained):
        assert torch.equal(grads[0][path], grads[1][path]) and torch.equal(grads[0][path], grads[2][path])
