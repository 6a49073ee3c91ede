"""(D) Answers on tensors without memory: options of decoding, beams, adapters, int8, the server; waits of the host."""

from types import SimpleNamespace

import pytest
import torch
from record import Log
from tensordict import TensorDict
from test_fake import BF16, SMALL, UNFUSED, E, params

from llava_fn import linear, llava, lora, tree
from llava_fn.config import Lora
from llava_fn.generate import beams, decode
from llava_fn.generate.assistant import Assistant
from llava_fn.generate.conversation import Picture
from llava_fn.generate.family import Family
from llava_fn.generate.options import PRESETS, Decoding
from llava_fn.generate.types import Model, Prompt, Vocabulary
from llava_fn.serve import engine
from llava_fn.serve.seat import AnswerRequest
from llava_fn.spec import build

SAMPLING = {"aten::_softmax", "aten::_log_softmax"}  # of the logits
WORDS = Vocabulary(SMALL.llama.vocab, (2,), lambda ids: "")
OPTIONS = {
    "greedy": Decoding(tokens=3),
    "sampled": Decoding(tokens=3, temperature=1.0),
    "log-probabilities": Decoding(tokens=3, temperature=1.0, logprobs=True),
    "all": Decoding(
        tokens=3, temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.2, logprobs=True, seed=2**60
    ),
    "penalty alone": Decoding(tokens=3, repetition_penalty=1.2),
}


def kinds() -> dict:
    """The small model as it is, with joined int8 weights, and with adapters."""
    p = params(SMALL, BF16)
    leaves = list(zip(tree.paths(p), tree.values(p), strict=True))
    eight = tree.build((path, linear.empty(w, "int8") if linear.compressible(path) else w) for path, w in leaves)
    c = Lora(rank=8)
    adapters = build(lora.spec(llava.spec(SMALL), c), lambda path, leaf: E(*leaf.shape, dtype=torch.float32))
    adapted = lora.attach(tree.merge(p, TensorDict({"lora": adapters})), c)
    joined = tree.build(linear.joined(zip(tree.paths(p), tree.values(p), strict=True)))
    return {"plain": p, "joined": joined, "int8": eight, "adapted": adapted}


def prompts(m: Model) -> list[Prompt]:
    """One with an image and one without."""
    patches = SMALL.vision.patches
    pixels = torch.zeros(1, 3, *[SMALL.vision.image] * 2, dtype=torch.uint8)
    feats = decode.features(m, decode.to_device(pixels, m.embed.device))
    return [Prompt((1, *[-200] * patches, 5, 6), feats), Prompt((1, 7, 8, 9), feats[:0])]


@pytest.mark.parametrize("kind", ["plain", "joined", "int8", "adapted"])
def test_prefill_and_steps_send_nothing_that_the_host_waits_for(fake, kind):
    m = Model(kinds()[kind], SMALL)
    with Log() as log:
        given = prompts(m)
        state = decode.prefill(m, given, m.cache(2, decode.room(m, given, Decoding(tokens=9))), WORDS)
        d = OPTIONS["all"]
        told = list(decode.steps(m, state, d, [d.seed, 7]))
    assert [x.shape for x in told] == [(2, 2)] * 3 and {x.device.type for x in told} == {"npu"}
    assert log.copies == log.waits == [] and log.cards["950"] == set()
    assert not (UNFUSED - SAMPLING) & log.ops.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_decoding_runs_on_an_npu(fake, name):
    m, d = Model(params(SMALL, BF16), SMALL), OPTIONS[name]
    state = decode.prefill(m, prompts(m), m.cache(2, 1024), WORDS)
    steps = decode.steps(m, state, d, [1, 2])
    first = next(steps)
    with Log() as log:
        told = [*steps]
    assert [x.shape for x in (first, *told)] == [(2, 1 + d.logprobs)] * d.tokens
    assert log.copies == log.waits == [] and log.cards["950"] == set()
    assert ("aten::argmax" in log.ops) == (d.temperature == 0) and "aten::cummax" not in log.ops
    assert ("aten::scatter.value" in log.ops) == (d.repetition_penalty != 1) or d.top_p < 1


def test_beams_run_on_an_npu(fake):
    m, d = Model(params(SMALL, BF16), SMALL), Decoding(tokens=3, beams=2, repetition_penalty=1.2)
    state = decode.prefill(m, prompts(m), m.cache(2, 1024), WORDS)
    with Log() as log:
        beams.search(lambda s: decode.logits(m, s), lambda s, ids: decode.step(m, s, ids), state, d, WORDS)
    assert log.copies == [] and log.cards["950"] == set()


def test_a_servers_steps_run_on_an_npu(fake):
    words = SimpleNamespace(vocab_size=WORDS.size, eos=2, bos=1, encode=lambda s: [3], decode=WORDS.decode)
    a = Assistant(Model(params(SMALL, BF16), SMALL), words, PRESETS["original"], "llava_v1", context=1024)
    desk = engine.empty(Family(a), 2)
    shot = Picture(torch.zeros(3, *[SMALL.vision.image] * 2, dtype=torch.uint8), "p")
    ids = (1, *[-200] * SMALL.vision.patches, 5, 6)
    for name, d in (("a", OPTIONS["all"]), ("b", OPTIONS["greedy"])):
        desk = engine.admit(Family(a), desk, AnswerRequest((name, 0), ids, tuple(ids), (shot,), d, WORDS, top=2))
    seen = []
    with Log() as log:
        while desk.free < 2:
            desk, deltas = engine.step(Family(a), desk)
            seen += deltas
    assert [(x.name[0], x.finish) for x in seen if x.finish] == [("a", "length"), ("b", "length")]
    assert log.copies == log.waits == [] and log.cards["950"] == set()
