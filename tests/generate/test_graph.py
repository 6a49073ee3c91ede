"""Captured steps: a graph that is launched again is stood in for by its step, which runs again on the same tensors."""

import dataclasses
import gc

import pytest
from test_generate import C, params, prompts, words  # noqa: F401  # params is a fixture

from llava_fn.generate import decode
from llava_fn.generate.graph import KEPT, Graphs
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model

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
    m, captures = captured(params)
    (one,) = prompts(params, "5")

    def run(size, d=WAYS["greedy"]):
        state = decode.prefill(m, [one], m.cache(1, size), words())
        list(decode.steps(m, state, d, [0]))
        return state

    state = run(16)
    del state
    gc.collect()
    kept = [run(16 + j) for j in range(KEPT)]
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
