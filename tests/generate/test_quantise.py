"""Decoder linears in int8: what is rounded, by how much, what is left alone, and that a model runs on them."""

import weakref
from importlib import import_module

import pytest
import torch

from llava_fn import linear, llama, llava, spec, tree
from llava_fn.batch import Stream, collate
from llava_fn.generate import assistant, conversation, decode
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model, Vocabulary

LINEARS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


@pytest.fixture(scope="module")
def params(lively):
    """Rows of very different size, so that a scale for a column or for all would be seen."""
    rng = torch.Generator().manual_seed(8)
    rows = [torch.exp(torch.randn(len(x), generator=rng)).view(-1, *[1] * (x.ndim - 1)) for x in tree.values(lively)]
    return tree.rebuild(lively, [x * row for x, row in zip(tree.values(lively), rows, strict=True)])


@pytest.fixture(scope="module")
def small(params):
    return linear.quantise(params)


def whole(block):
    """A block whose weights are all tensors, in the dtype of its norms."""
    return type(block)({n: linear.whole(w, block["norm1"].dtype) for n, w in block.items()})


def opened(small):
    """The parameters with every block made whole."""
    out = tree.cast(small.exclude("llama"), torch.float32)
    blocks = {i: whole(b) for i, b in small["llama", "blocks"].items()}
    full = small["llama"].clone(recurse=False).update({"blocks": blocks})
    return tree.merge(out, type(small)({"llama": full}))


def test_only_the_linears_of_the_decoder_are_int8(params, small):
    int8 = {path[:-1] for path, x in zip(tree.paths(small), tree.values(small), strict=True) if x.dtype == torch.int8}
    assert int8 == {("llama", "blocks", i, name) for i in ("0", "1") for name in LINEARS}
    for path, x in zip(tree.paths(params), tree.values(params), strict=True):
        assert path in int8 or small[path] is x
    assert small.is_locked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_moves_by_half_a_step_of_its_row_at_most(params, dtype):
    for name in LINEARS:
        w = params["llama", "blocks", "0", name].to(dtype)
        q = linear.to_int8(w, name)
        assert q["int8"].shape == w.shape and q["scale"].shape == (len(w), 1) and q["scale"].dtype == torch.float32
        step = w.float().abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(q["scale"], step)
        assert ((q["int8"] * q["scale"] - w.float()).abs() <= step * 0.5001).all()
        assert (q["int8"].abs().amax(1) == 127).all()


def test_weights_on_the_grid_come_back_to_the_bit_and_a_row_of_zeros_stays():
    w = torch.randint(-127, 128, (6, 9), generator=torch.Generator().manual_seed(0)) * 0.5 ** torch.arange(6)[:, None]
    w[:, 0] = -127 * 0.5 ** torch.arange(6)
    w[3] = 0
    q = linear.to_int8(w, "w")
    assert torch.equal(q["int8"] * q["scale"], w) and q["int8"].min() == -127
    assert q["scale"][3] == 1  # NaN would become an int8 of any value


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_infinite_weight_is_refused_by_name(params, bad):
    broken = tree.rebuild(params, [x.clone() for x in tree.values(params)])
    broken["llama", "blocks", "1", "w_up"][2, 3] = bad
    with pytest.raises(ValueError, match="llama/blocks/1/w_up holds an infinite value or NaN"):
        linear.quantise(broken)


def test_parameters_without_a_decoder_are_refused(params):
    with pytest.raises(ValueError, match="have no decoder"):
        linear.quantise(tree.split(params, lambda path: path[0] != "llama")[0])


def test_the_model_runs_as_with_the_weights_that_int8_stands_for(params, small, samples, tiny):
    batch = collate(samples[:4])
    want = llava.nll(opened(small), batch, tiny)
    with torch.no_grad():
        torch.testing.assert_close(llava.nll(small, batch, tiny), want, rtol=0.01, atol=0)  # digits round a row
    torch.testing.assert_close(llava.nll(small, batch, tiny), want, rtol=0, atol=0)
    assert not torch.equal(want, llava.nll(params, batch, tiny))
    d, words = Decoding(tokens=8, logprobs=True), Vocabulary(tiny.llama.vocab, (-7,), str)
    questions = decode.prompts(Model(params, tiny), samples[:4])
    said = decode.generate(Model(small, tiny), questions, d, words)
    for (one,), (other,) in zip(said, decode.generate(Model(opened(small), tiny), questions, d, words), strict=True):
        assert (one.ids, one.ended) == (other.ids, other.ended)
        assert one.logprobs == pytest.approx(other.logprobs, abs=0.02)  # few rows have activations in bf16 on a CPU


@pytest.mark.slow
def test_compiled_decoding_makes_the_weights_whole_in_its_graph(params, small, samples, tiny):
    d, words = Decoding(tokens=8), Vocabulary(tiny.llama.vocab, (-7,), str)
    questions = decode.prompts(Model(params, tiny), samples[:4])
    said, want = (
        decode.generate(m, questions, d, words)
        for m in (Model(small, tiny, step=decode.compiled_step("eager")), Model(small, tiny))
    )
    assert said == want


def test_one_weight_at_a_time_is_whole(small, tiny, monkeypatch):
    op = import_module("llava_fn.kernels.int8_linear")
    alive, whole = [], op.whole

    def seen(*args):
        assert sum(ref() is not None for ref in alive) <= (len(alive) % 7 == 5)  # but for the gate beside the up
        alive.append(weakref.ref(x := whole(*args)))
        return x

    monkeypatch.setattr(op, "whole", seen)
    ids = torch.arange(op.ROWS + 1)
    llama.decode(small["llama"], small["llama", "embed"][ids], Stream.of([len(ids)]), tiny.llama)
    assert len(alive) == 2 * 7


def test_an_assistant_moves_leaves_one_by_one_into_the_dtype_asked_for(weights):
    source = assistant.open_weights([weights / "vicuna_v1"])
    form = assistant.form_of(source)
    to = assistant.Placement(torch.device("cpu"), torch.bfloat16, quantise="int8")
    a = assistant.place(source, form, to)
    kinds = {path[-1]: x.dtype for path, x in zip(tree.paths(a.model.params), tree.values(a.model.params), strict=True)}
    assert kinds.pop("int8") == torch.int8 and kinds.pop("scale") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    block = whole(a.model.params["llama", "blocks", "0"])
    assert {x.dtype for x in block.values()} == {torch.bfloat16}
    assert {n: x.shape for n, x in block.items()} == {
        path[0]: param.shape for path, param in spec.leaves(llama.spec(a.config.llama)["blocks"]["0"])
    }
    *_, said = conversation.reply(a, conversation.ask(conversation.Chat(), "What?"), Decoding(tokens=4))
    assert said.ended
