"""Weights of one input as one: the same model, kind by kind."""

import dataclasses
from importlib import import_module

import pytest
import torch
from rounding import same_but_rounded

from llava_fn import config, linear, llama, lora, spec, tree
from llava_fn.batch import Stream
from llava_fn.generate import decode
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model, Prompt, Vocabulary
from llava_fn.kernels.linear import avx512
from llava_fn.parallel.mesh import Axis

C = config.Llama(vocab=24, width=128, blocks=2, heads=4, kv_heads=2, ffn=192)
KINDS = [None, "int8", "nf4"]


def models(kind):
    """The same parameters, apart and joined; norms are not ones."""
    rng = torch.Generator().manual_seed(5)
    p = spec.init({"llama": llama.spec(C)}, 0)
    p = tree.rebuild(p, [torch.randn(x.shape, generator=rng) * 0.2 + (x.ndim == 1) for x in tree.values(p)])
    leaves = list(linear.placed(p, None, None, kind, Axis("tp")))
    return tree.build(leaves), tree.build(linear.joined(leaves))


@pytest.mark.parametrize("tails", [None, [2, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_weights_give_the_same_values_and_gradients(kind, tails):
    stream, out = Stream.of([5, 3], tails), []
    for p in models(kind):
        x = torch.randn(8, C.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = llama.decode(p["llama"], x, stream, C)
        out.append((y, *torch.autograd.grad((y * torch.arange(1.0, len(y) + 1)[:, None]).sum(), x)))
    for apart, joined in zip(*out, strict=True):
        same_but_rounded(joined, apart)


def answers(p):
    none = torch.zeros(0, C.width)
    prompts, words = [Prompt((1, 5, 9), none), Prompt((1, 3), none)], Vocabulary(C.vocab, (-1,), str)
    return decode.generate(Model(p, config.Llava(llama=C)), prompts, Decoding(tokens=6), words)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_weights_give_the_same_answers(kind):
    apart, joined = map(answers, models(kind))
    assert apart == joined


def packed_names(p):
    return {path[-1] for path, w in zip(tree.paths(p), tree.values(p), strict=True) if w.is_mkldnn}


def test_packed_weights_give_the_same_answers(monkeypatch):
    monkeypatch.setattr(import_module("llava_fn.kernels.linear"), "LARGE", 1)
    for kind in KINDS:
        p = models(kind)[1]
        packed = tree.build(linear.packed(zip(tree.paths(p), tree.values(p), strict=True)))
        every = {"wqkv", "wo", "w_gate_up", "w_down", "head"}
        assert packed_names(packed) == (set() if not avx512() else {"head"} if kind else every)
        assert answers(p) == answers(packed)


@pytest.mark.parametrize("backend", ["", "inductor"])
@pytest.mark.parametrize("adapters", [False, True])
def test_weights_are_arranged_as_adapters_and_torch_compile_allow(adapters, backend, monkeypatch):
    monkeypatch.setattr(import_module("llava_fn.kernels.linear"), "LARGE", 1)
    leaves = list(linear.placed(models(None)[0], None, None, None, Axis("tp")))
    p = tree.build(linear.arranged(leaves, adapters, backend))
    assert bool(packed_names(p)) == (avx512() and not backend)
    assert ("wq" in p["llama", "blocks", "0"]) == adapters


def test_weights_are_joined_when_all_parts_have_come_and_names_are_gone():
    p, j = models(None)
    assert {path[-1] for path in tree.paths(j) if "blocks" in path} == {
        "norm1",
        "norm2",
        "wqkv",
        "wo",
        "w_gate_up",
        "w_down",
    }
    assert sum(x.numel() for x in tree.values(j)) == sum(x.numel() for x in tree.values(p))
    came = []

    def coming():
        for path, w in zip(tree.paths(p), tree.values(p), strict=True):
            came.append(path[-1])
            yield path, w

    for path, _ in linear.joined(coming()):
        if path[-1] in linear.JOINED:
            assert came[-1] in linear.JOINED[path[-1]]


def test_an_adapter_of_a_joined_weight_is_refused():
    _, j = models(None)
    pair = {("llama", "blocks", "0", "wq"): {"a": torch.zeros(1, C.width), "b": torch.zeros(C.width, 1)}}
    with pytest.raises(ValueError, match="adapters without a weight: llama/blocks/0/wq"):
        lora.attached(j, pair)


def test_heads_of_a_rank_that_has_half_of_them_are_told_apart():
    half = dataclasses.replace(C, heads=2, kv_heads=1, width=64)
    q, k, v = torch.randn(64, 128), torch.randn(32, 128), torch.randn(32, 128)
    stream, x = Stream.of([3]), torch.randn(3, 128)
    rot = llama.rotary_tables(stream.positions, C.head, C.theta)
    apart = tree.build([(("wq",), q), (("wk",), k), (("wv",), v)])
    joined = tree.build([(("wqkv",), torch.cat([q, k, v]))])
    assert half.head == C.head
    for one, other in zip(*(llama._rotated(p, x, rot, None, C) for p in (apart, joined)), strict=True):
        same_but_rounded(one, other)
