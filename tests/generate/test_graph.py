"""Captured steps: a graph that is launched again is stood in for by its step, which runs again on the same tensors."""

import dataclasses
import gc
import importlib
from collections import Counter

import pytest
import torch
from test_generate import C, params, prompts, words  # noqa: F401  # params is a fixture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_fn import llava, spec
from llava_fn.cache import Cache
from llava_fn.generate import decode
from llava_fn.generate.graph import KEPT, Graphs
from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import RowOptions
from llava_fn.generate.types import DecodeState, Model, StepInputs
from llava_fn.kernels.decode import flash

WAYS = {
    "greedy": Decoding(tokens=7),
    "sampled": Decoding(tokens=7, temperature=1.3, top_k=9, top_p=0.9, min_p=0.01, seed=4),
    "log-probabilities": Decoding(tokens=7, logprobs=True),
    "penalty": Decoding(tokens=7, repetition_penalty=1.4),
    "samples": Decoding(tokens=7, temperature=2.0, samples=3),
    "one token": Decoding(tokens=1),
    "beams": Decoding(tokens=7, beams=2),
}


def captured(p):
    """A model with captured steps, and the list of what was captured."""
    captures = []

    def record(warm, step):
        warm()
        warm()
        captures.append(step)
        return step

    return Model(p, C, launcher=Graphs(record)), captures


@pytest.mark.parametrize("way", WAYS)
def test_captured_steps_give_the_same_answers_again_and_again(params, way):  # noqa: F811
    (m, captures), d = captured(params), WAYS[way]
    for layouts in (("i4", "1", "i7"), ("5", "i2", "9")):
        many = prompts(params, *layouts)
        assert decode.generate(m, many, d, words()) == decode.generate(Model(params, C), many, d, words())
    assert len(captures) == (way not in ("one token", "beams"))  # the second batch has the first one's cache


def test_graphs_differ_by_rows_parameters_and_the_options_in_use(params):  # noqa: F811
    m, captures = captured(params)
    other = dataclasses.replace(m, params=params.clone())
    one, two = prompts(params, "5"), prompts(params, "5", "7")
    held = m.launcher.lend(m, 1, 512)
    calls = [(m, one, Decoding(tokens=3, temperature=t)) for t in (0, 0.5, 2.0)]
    for model, many, d in (*calls, (other, one, Decoding(tokens=3)), (m, two, Decoding(tokens=3))):
        decode.generate(model, many, d, words())
    assert len(captures) == 4  # greedy, sampled at any temperature, of other parameters, of two rows
    del held


def test_graphs_of_a_cache_that_is_no_more_are_dropped_and_the_oldest_of_many(params):  # noqa: F811
    captures = []
    m = Model(params, C, launcher=Graphs(lambda warm, step: captures.append(1) or (lambda: None)))
    (one,) = prompts(params, "5")

    def run(size, d=WAYS["greedy"]):
        state = decode.prefill(m, [one], m.cache(1, size), words())
        list(decode.steps(m, state, d, [0]))
        return state

    state = run(16)
    del state
    gc.collect()
    kept = [run(16)]
    assert len(m.launcher._steps) == 1
    kept += [run(16 + j) for j in range(1, KEPT)]
    assert len(m.launcher._steps) == KEPT == len(captures) - 1
    list(decode.steps(m, kept[0], WAYS["sampled"], [0]))
    assert len(m.launcher._steps) == KEPT == len(captures) - 2


def test_a_cache_comes_back_for_the_same_sizes_alone(params):  # noqa: F811
    m, _ = captured(params)
    first = m.launcher.lend(m, 2, 512)
    m.launcher.done(first)
    again = m.launcher.lend(m, 2, 512)
    assert again.k is first.k and m.launcher.lend(m, 2, 512).k is not first.k
    m.launcher.done(again)
    assert m.launcher.lend(m, 3, 512).rows == 3 and m.launcher.lend(m, 2, 512).k is not first.k


class Copies(TorchDispatchMode):
    """Counts operations, and names those between devices."""

    def __init__(self):
        super().__init__()
        self.ops, self.between = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops[func._schema.name] += 1
        if len({x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}) > 1:
            self.between.append(func._schema.name)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["greedy", "sampled", "log-probabilities", "penalty"])
@pytest.mark.parametrize("pages", [False, True])
def test_a_step_on_a_card_never_makes_the_host_wait(way, pages, dtype, monkeypatch):
    """Tensors without values stand for the card's: to read one, or a shape that depends on one, is an error."""
    monkeypatch.setattr("llava_fn.kernels.compiled.by_inductor", lambda reference: reference)
    for name in ("decode", "rms_norm", "add_rms_norm", "rotary", "swiglu"):
        module = importlib.import_module(f"llava_fn.kernels.{name}")
        monkeypatch.setattr(module, "choose", lambda x, reference, **fused: fused.get("cuda", reference))
    wide, d = dataclasses.replace(C, llama=dataclasses.replace(C.llama, width=32)), WAYS[way]
    with torch.device("meta"), torch.no_grad():
        p = spec.build(llava.spec(wide), lambda _, leaf: torch.empty(leaf.shape, dtype=dtype))
        k, v = (torch.empty(3, 3, 256, 2, 8, dtype=dtype) for _ in "kv")  # in the order of flash attention
        cache = Cache(k, v, torch.empty(3).long(), torch.empty(3, 2).int() if pages else None)
        state = DecodeState(torch.empty(3, 32, dtype=dtype), cache, torch.empty(3, 24).bool())
        options = dataclasses.replace(RowOptions.of([d] * 3), values=torch.empty(6, 3))
        x = StepInputs(state, torch.empty(3).long(), torch.empty(3), options, d.logprobs)
    with Copies() as copies:
        told, after = decode.advance(Model(p, wide), x)
    assert not copies.between and copies.ops.total() > 100
    if flash(dtype):  # rows, starts, frequencies: once for all blocks
        with Copies() as copies:
            decode.step(Model(p, wide), state, x.ids, mark=False)
        assert copies.ops["aten::arange"] == 3 and copies.ops["aten::index_copy_"] == 6
    assert told.shape == (3, 1 + d.logprobs) and after.state.hidden.shape == (3, 32)
