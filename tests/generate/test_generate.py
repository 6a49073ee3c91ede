"""Generation with a cache: against full forward passes, each row alone, and transformers' generate."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from oracles import CONFIGS, HF_IMAGE, LLAMA, hf_inputs, hf_llama, hf_llava, ours, sample, scramble
from rounding import same_but_rounded
from transformers import LlamaForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_fn import config, llama, llava, spec, tree
from llava_fn.batch import IMAGE, Sample, Stream
from llava_fn.cache import Cache
from llava_fn.generate import beams, decode, sampling
from llava_fn.generate.options import Decoding
from llava_fn.generate.sampling import RowOptions
from llava_fn.generate.types import Answer, Model, Prompt, Vocabulary
from llava_fn.weights.model import from_state_dict

C = config.Llava(
    config.Vision(image=8, patch=4, width=8, blocks=3, heads=2, ffn=12),
    config.Llama(vocab=24, width=16, blocks=3, heads=4, kv_heads=2, ffn=10, theta=30.0),
)
LENGTHS = (3, 6, 1, 6)


def letters(ids):
    """A text for tiny vocabularies: token 0 is "a"."""
    return "".join(chr(97 + i) for i in ids)


def words(size=C.llama.vocab, end=-7):
    return Vocabulary(size, (end,), letters)


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the most likely token is seldom the same twice."""
    rng = torch.Generator().manual_seed(3)
    shapes = spec.init(llava.spec(C), 0)
    return tree.rebuild(shapes, [torch.randn(x.shape, generator=rng) * 1.0 for x in tree.values(shapes)])


def samples(layouts=("i4", "1", "i7")):
    """layouts: "i" an image, a digit so many tokens."""
    rng, out = torch.Generator().manual_seed(1), []
    for j, layout in enumerate(layouts):
        ids, images = [1], layout.count("i")
        for kind in layout:
            new = [IMAGE] * C.vision.patches if kind == "i" else torch.randint(3, 24, (int(kind),), generator=rng)
            ids += list(map(int, new))
        pixels = torch.randint(0, 256, (images, 3, 8, 8), generator=rng, dtype=torch.uint8)
        out.append(Sample(str(j), tuple(ids), (False,) * len(ids), pixels))
    return out


def prompts(p, *layouts):
    return decode.prompts(Model(p, C), samples(layouts) if layouts else samples())


def answer(p, prompts, d, end=-7, **more):
    return decode.generate(Model(p, C), prompts, d, words(end=end), **more)


def ids(answers):
    return [[list(a.ids) for a in row] for row in answers]


def without_cache(p, sample, stop, limit):
    """The definition of greedy decoding: the whole row again for each token."""
    ids = list(sample.ids)
    for _ in range(limit):
        x = p["llama"]["embed"][torch.tensor(ids).clamp(min=0)]
        if len(sample.pixels):
            rows = (torch.tensor(ids) == IMAGE).nonzero()[:, 0]
            x = llava.splice(x, llava.features(p, sample.pixels, C), rows)
        x = llama.decode(p["llama"], x, Stream.of([len(ids)], [1]), C.llama)
        ids.append(int(llama.logits(p["llama"], x, C.llama).argmax()))
        if ids[-1] == stop:
            break
    new = ids[len(sample.ids) :]
    return new[:-1] if new[-1] == stop else new


def test_greedy_with_cache_equals_greedy_without_token_for_token(params):
    free = [without_cache(params, s, -7, 12) for s in samples()]
    assert len({tuple(x) for x in free}) == 3 and all(len(set(x)) > 3 for x in free)
    d = Decoding(tokens=12)
    assert ids(answer(params, prompts(params), d)) == [[x] for x in free]
    stop = free[1][4]
    want = [without_cache(params, s, stop, 12) for s in samples()]
    assert len({len(x) for x in want}) > 1
    got = answer(params, prompts(params), d, end=stop)
    assert ids(got) == [[x] for x in want]
    assert [row[0].ended for row in got] == [len(x) < 12 for x in want]


def test_decoding_ends_when_every_row_has(params):
    calls = []
    (sample, *_), (free, *_) = samples(), [without_cache(params, s, -7, 12) for s in samples()]
    stop = free[5]
    m = Model(params, C, step=lambda *args: calls.append(1) or llama.decode_step(*args))
    got = decode.generate(m, decode.prompts(m, [sample]), Decoding(tokens=12), words(end=stop))
    assert ids(got) == [[free[: free.index(stop)]]]
    assert len(calls) == free.index(stop)
    calls.clear()
    decode.generate(m, decode.prompts(m, [sample]), Decoding(tokens=3), words())
    assert len(calls) == 2  # the last token is never fed


LAYOUTS = ["i4", "1", "i7", "2i3", "ii5", "9", "1i1i1", "i1", "6", "3i", "i2i", "8", "5i2", "iii1", "4", "i9"]
WAYS = {
    "greedy": Decoding(tokens=9),
    "penalty": Decoding(tokens=9, repetition_penalty=1.7),
    "sampled": Decoding(tokens=9, temperature=0.9, top_k=9, top_p=0.9, min_p=0.02, samples=2, seed=4),
    "beams": Decoding(tokens=9, beams=3, samples=2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [2, 3, 7, 16])
def test_each_row_of_a_batch_equals_that_row_alone(params, way, rows):
    d, many = WAYS[way], prompts(params, *LAYOUTS[:rows])
    seeds = [100 * j for j in range(rows)]
    alone = [answer(params, [s], d, end=5, seeds=[seed])[0] for s, seed in zip(many, seeds, strict=True)]
    assert len({tuple(map(tuple, x)) for x in ids(alone)}) >= rows * 0.7
    assert ids(answer(params, many, d, end=5, seeds=seeds)) == ids(alone)
    back = answer(params, many[::-1], d, end=5, seeds=seeds[::-1])
    assert ids(back) == ids(alone)[::-1]


@pytest.mark.parametrize("layouts", [("1", "5", "9"), ("ii2", "1i1i", "i3i")])
def test_batches_of_text_alone_and_of_many_images_are_their_rows(params, layouts):
    many = prompts(params, *layouts)
    assert ids(answer(params, many, WAYS["greedy"])) == [ids(answer(params, [s], WAYS["greedy"]))[0] for s in many]


def test_features_must_be_as_many_as_image_tokens(params):
    (s,) = prompts(params, "i3")
    with pytest.raises(ValueError, match="4 image tokens do not match 3 features"):
        answer(params, [Prompt(s.ids, s.feats[1:])], Decoding())


@pytest.mark.parametrize("size", [11, 15])
def test_prefill_and_decode_steps_equal_the_full_forward_pass(params, size):
    p, rng = params["llama"], torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 24, (n + 5,), generator=rng) for n in LENGTHS]
    start = torch.cat([p["embed"][ids[:n]] for ids, n in zip(rows, LENGTHS, strict=True)])
    cache = Cache.empty(C.llama, 4, size, start)
    x, cache = llama.prefill(p, start, Stream.of(LENGTHS, [1] * 4), cache, C.llama)
    steps = [x]
    for j in range(5):
        ids = torch.stack([ids[n + j] for ids, n in zip(rows, LENGTHS, strict=True)])
        before = cache.lengths.clone()
        x, after = llama.decode_step(p, ids, cache, C.llama)
        assert torch.equal(cache.lengths, before) and torch.equal(after.lengths, before + 1)
        cache = after
        steps.append(x)
    full = llama.decode(p, torch.cat([p["embed"][ids] for ids in rows]), Stream.of([len(x) for x in rows]), C.llama)
    for j, (whole, n) in enumerate(zip(full.split([len(x) for x in rows]), LENGTHS, strict=True)):
        same_but_rounded(torch.stack([x[j] for x in steps]), whole[n - 1 :])


@pytest.mark.parametrize("held", [(1, 2, 3), (0, 4, 2)])
def test_prefill_after_what_a_cache_holds_equals_one_prefill_of_all(params, held):
    many = prompts(params, "2i3", "i4", "6")
    whole = decode.prefill(Model(params, C), many, Cache.empty(C.llama, 3, 16, many[0].feats), words())
    cache = Cache.empty(C.llama, 3, 16, many[0].feats)
    cache.k.fill_(9.0)
    first = [(s, n) for s, n in zip(many, held, strict=True)]
    for j, (s, n) in enumerate(first):
        if n:
            some = Prompt(s.ids[:n], s.feats[: s.ids[:n].count(IMAGE)])
            row = decode.prefill(Model(params, C), [some], Cache.empty(C.llama, 1, 16, s.feats), words()).cache
            cache.k[:, j], cache.v[:, j] = row.k[:, 0], row.v[:, 0]
            cache.lengths[j] = n
    again = decode.prefill(Model(params, C), many, cache, words(), held)
    same_but_rounded(again.hidden, whole.hidden)
    assert torch.equal(again.seen, whole.seen) and torch.equal(again.cache.lengths, whole.cache.lengths)
    for j, s in enumerate(many):
        same_but_rounded(again.cache.k[:, j, : len(s.ids)], whole.cache.k[:, j, : len(s.ids)])


def test_a_cache_that_grew_holds_what_it_held(params):
    many = prompts(params, "4", "i2")
    state = decode.prefill(Model(params, C), many, Cache.empty(C.llama, 2, 8, many[0].feats), words())
    grown = dataclasses.replace(state, cache=state.cache.grown(20))
    assert (grown.cache.size, state.cache.grown(3).size) == (20, 8)
    a, b = (decode.step(Model(params, C), s, torch.tensor([4, 7])) for s in (state, grown))
    same_but_rounded(a.hidden, b.hidden)


def test_pages_are_copied_as_they_were_before():
    cache = Cache.empty(C.llama, 5, 2, torch.zeros(1))
    cache.k.copy_(torch.rand(cache.k.shape))
    before = cache.k.clone()
    cache.copy_pages((0, 2, 3), (2, 3, 4))
    assert torch.equal(cache.k, before[:, [0, 1, 0, 2, 3]]) and not cache.v.any()


def test_a_cache_keeps_its_order_in_memory():
    first = Cache.empty(C.llama, 2, 8, torch.empty(0))
    caches = [first, first.grown(20), first.repeat(3), first.repeat(1), first.reorder(torch.tensor([1, 0]), 2)]
    assert [c.k.shape[1:3] for c in caches] == [(2, 8), (2, 20), (6, 8), (2, 8), (2, 8)]
    for c in caches:
        assert c.k.permute(0, 3, 1, 2, 4).is_contiguous() and c.v.permute(0, 3, 1, 2, 4).is_contiguous()


def test_decode_step_is_one_graph_for_all_lengths(params):
    from torch._dynamo.testing import CompileCounter

    counter, c = CompileCounter(), dataclasses.replace(C.llama, blocks=1)
    step = torch.compile(llama.decode_step, backend=counter, fullgraph=True)
    cache = Cache.empty(c, 2, 9, params["llama"]["embed"])
    for j in range(4):
        same = Cache(cache.k.clone(), cache.v.clone(), cache.lengths)
        want, _ = llama.decode_step(params["llama"], torch.tensor([j + 3, j + 5]), same, c)
        x, cache = step(params["llama"], torch.tensor([j + 3, j + 5]), cache, c)
        same_but_rounded(x, want)
        same_but_rounded(cache.k, same.k)
    assert counter.frame_count == 1


def test_a_compiled_step_writes_into_the_cache_and_makes_no_other(params):
    c = dataclasses.replace(C.llama, blocks=2)
    made, cache = [], Cache.empty(c, 2, 9, params["llama"]["embed"])

    def look(graph, inputs):
        made.append({x.untyped_storage().data_ptr(): x.storage_offset() for x in inputs if isinstance(x, torch.Tensor)})
        return graph

    _, after = decode.compiled_step(look)(params["llama"], torch.tensor([3, 5]), cache, c)
    assert after.k is cache.k and after.v is cache.v and after.lengths.tolist() == [1, 1]
    assert bool(cache.k[1, :, 0].any()) and not cache.k[:, :, 1:].any()
    ((given),) = made
    assert {cache.k.data_ptr(), cache.v.data_ptr()} <= set(given)
    assert given[cache.k.data_ptr()] == cache.k[1].storage_offset()  # a tensor for each block: this is the last one's


def test_compiled_decoding_gives_the_same_tokens(params):
    c, d = dataclasses.replace(C, llama=dataclasses.replace(C.llama, blocks=1)), Decoding(tokens=4)
    many, m = prompts(params), Model(params, c, step=decode.compiled_step("eager"))
    assert m.step is not llama.decode_step
    assert decode.generate(m, many, d, words()) == decode.generate(Model(params, c), many, d, words())


def test_ids_outside_the_text_vocabulary_are_never_emitted(params):
    many = prompts(params, *LAYOUTS)
    for d in (Decoding(tokens=9), Decoding(tokens=9, temperature=5.0), Decoding(tokens=9, beams=3)):
        free = ids(decode.generate(Model(params, C), many, d, words()))
        held = ids(decode.generate(Model(params, C), many, d, words(size=17)))
        assert max(i for row in free for a in row for i in a) >= 17
        assert max(i for row in held for a in row for i in a) < 17


def test_logprobs_are_those_of_the_model_and_not_of_the_options(params):
    (s, *_), d = prompts(params), Decoding(tokens=6, temperature=3.0, top_k=5, repetition_penalty=2.0, logprobs=True)
    ((got,),) = answer(params, [s], d)
    ids = torch.tensor([*s.ids, *got.ids])
    x = llava.splice(params["llama"]["embed"][ids.clamp(min=0)], s.feats, (ids == IMAGE).nonzero()[:, 0])
    x = llama.decode(params["llama"], x, Stream.of([len(ids)]), C.llama)
    want = llama.logits(params["llama"], x, C.llama).log_softmax(-1)[len(s.ids) - 1 : -1]
    same_but_rounded(torch.tensor(got.logprobs), want.gather(1, ids[len(s.ids) :, None])[:, 0])
    assert answer(params, [s], dataclasses.replace(d, logprobs=False)) == [[Answer(got.ids, False)]]


@pytest.mark.parametrize("kind, behind", [("cpu", 0), ("npu", decode.BEHIND)])
def test_the_host_reads_behind_on_an_accelerator_and_misses_nothing(kind, behind, monkeypatch):
    made, read = [], []

    def items():
        for n in range(20):
            made.append(n)
            yield SimpleNamespace(device=SimpleNamespace(type=kind), n=n)

    monkeypatch.setattr(decode, "fetch", lambda x: lambda: x.n)
    for n in decode.on_host(items()):
        read.append(n)
        assert len(made) == min(n + 1 + behind, 20)
    assert read == made == list(range(20))


def test_samples_have_seeds_of_their_own(params):
    (s, *_), d = prompts(params), Decoding(tokens=8, temperature=2.0, samples=4, seed=7)
    (many,) = answer(params, [s], d)
    assert len(set(many)) == 4
    for j, one in enumerate(many):
        assert answer(params, [s], dataclasses.replace(d, samples=1, seed=7 + j)) == [[one]]
    assert answer(params, [s], d, seeds=[7]) == [many]


def test_each_token_is_drawn_with_the_next_number_of_the_row(params):
    (s, *_), d = prompts(params), Decoding(tokens=6, temperature=1.5, seed=9)
    ((got,),) = answer(params, [s], d)
    numbers, ids = sampling.uniforms([9], 6), list(s.ids)
    for t, token in enumerate(got.ids):
        m, one = Model(params, C), Prompt(tuple(ids), s.feats)
        state = decode.prefill(m, [one], Cache.empty(C.llama, 1, 20, s.feats), words())
        assert sampling.draw(decode.logits(m, state) / 1.5, numbers[:, t]).tolist() == [token]
        ids.append(token)


def test_a_prompt_whose_beams_cannot_improve_is_closed():
    ids = torch.zeros(1, 2, 4, dtype=torch.long)
    ended = torch.tensor([[-1.0, -2.0]])
    logprobs = torch.tensor([0.1, 0.7, 0.2]).log().expand(1, 2, 3)
    for still in (True, False):
        running = beams.Beams(ids, torch.tensor([[-0.1, -0.2]]), ids, ended, torch.tensor([[still]]))
        after, _, _ = beams.extend(running, logprobs, 1, torch.tensor([1]), 1.0)
        assert (after.ended_scores[0, 0] > -1) == still
        assert after.open.item() == (still and bool(after.scores[0, 0] / 2 > after.ended_scores[0, 1]))


@pytest.mark.parametrize("stop", ["q", "never", ""])
def test_a_stop_text_ends_an_answer_where_it_is_spelled(params, stop):
    (s, *_) = prompts(params)
    ((free,),) = answer(params, [s], Decoding(tokens=12))
    stop = stop and (letters(free.ids[4:6]) if stop == "q" else stop)
    ((got,),) = answer(params, [s], Decoding(tokens=12, stop=(stop,) if stop else ()))
    n = letters(free.ids).find(stop) + len(stop) if stop and stop in letters(free.ids) else 12
    assert got == Answer(free.ids[:n], n < 12)


# Against transformers


def scores(rows=5, v=40):
    x = torch.randn(rows, v, generator=torch.Generator().manual_seed(6)) * 3
    x[0, 7] = x[0].amax()  # two equal ones
    return x


@pytest.mark.parametrize("value", [0.3, 1.0, 2.5])
def test_temperature_equals_transformers(value):
    got = sampling.warp(scores(), RowOptions.of([Decoding(temperature=value)] * 5))
    assert torch.equal(got, TemperatureLogitsWarper(value)(None, scores()))


@pytest.mark.parametrize("value", [1, 2, 7, 40, 99])
def test_top_k_equals_transformers(value):
    assert torch.equal(
        sampling.keep_top_k(scores(), torch.full((5, 1), value), 128), TopKLogitsWarper(value)(None, scores())
    )


@pytest.mark.parametrize("value", [1e-6, 0.2, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(value):
    assert torch.equal(sampling.keep_top_p(scores(), 1 - value), TopPLogitsWarper(value)(None, scores()))


@pytest.mark.parametrize("value", [0.01, 0.3, 1.0])
def test_min_p_equals_transformers(value):
    assert torch.equal(sampling.keep_min_p(scores(), value), MinPLogitsWarper(value)(None, scores()))


@pytest.mark.parametrize("value", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(value):
    ids = torch.tensor([[0, 3, 3]] * 5)
    seen = torch.zeros(5, 40, dtype=torch.bool).scatter(1, ids, True)
    want = RepetitionPenaltyLogitsProcessor(value)(ids, scores())
    assert torch.equal(sampling.penalise(scores(), seen, value), want)


def test_options_are_applied_in_the_order_of_transformers():
    want = scores()
    for warp in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)):
        want = warp(None, want)
    got = sampling.warp(scores(), RowOptions.of([Decoding(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1)] * 5))
    assert torch.equal(got, want) and got.isinf().any()


@pytest.mark.parametrize("number", [0.05, 0.5, 0.95])
def test_each_row_of_one_call_has_its_own_options(number):
    rows = [
        Decoding(), Decoding(temperature=0.7), Decoding(temperature=1.5, top_k=3), Decoding(temperature=2, top_p=0.4),
        Decoding(temperature=3, min_p=0.2, repetition_penalty=1.7),
    ]  # fmt: skip
    seen, uniform = scores() > 1, torch.full((5,), number)
    got = sampling.sample(scores(), seen, uniform, RowOptions.of(rows))
    alone = [
        sampling.sample(scores()[[j]], seen[[j]], uniform[[j]], RowOptions.of([d])).item() for j, d in enumerate(rows)
    ]
    assert got.tolist() == alone


def test_draw_inverts_the_distribution_and_never_takes_what_has_no_probability():
    row = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log()
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24])
    assert sampling.draw(row.expand(6, 6), uniform).tolist() == [1, 1, 3, 3, 4, 4]
    flat = torch.zeros(1, 32000)
    assert sampling.draw(flat, torch.tensor([1 - 2**-24])).item() > 31000
    grid = (torch.arange(1000) + 0.5) / 1000
    wide = scores(1).expand(1000, -1)
    counts = sampling.draw(wide, grid).bincount(minlength=40) / 1000
    assert (counts - scores(1)[0].softmax(-1)).abs().max() < 2e-3


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"tokens": 0}, "tokens=0: must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.5}, "top_p without a temperature changes nothing"),
        ({"samples": 3}, "samples=3 without a temperature changes nothing"),
        ({"beams": 2, "temperature": 1.0}, "temperature=1.0 does not go with beams=2"),
        ({"beams": 2, "logprobs": True}, "logprobs does not go with beams=2"),
        ({"beams": 2, "samples": 3}, "samples=3 are more than the beams=2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"length_penalty": 1e308}, "length_penalty=1e.308: must be from -10 to 10"),
        ({"temperature": 1e-39}, "temperature=1e-39: must be 0, or at least 0.01"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"seed": -1}, "seed=-1: must be from 0"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"stop": ("",)}, "stop=.*and none empty"),
        ({"stop": ("\ud800",)}, "stop=.*ud800.*: must be texts in Unicode"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(bad, said):
    with pytest.raises(ValueError, match=said):
        Decoding(**bad)


HF = {
    "greedy": ({}, {}),
    "penalty": ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    "beams": ({"beams": 4}, {"num_beams": 4}),
    "long beams": ({"beams": 3, "length_penalty": 2.5}, {"num_beams": 3, "length_penalty": 2.5}),
    "short beams": ({"beams": 5, "length_penalty": -1.0}, {"num_beams": 5, "length_penalty": -1.0}),
    "penalised beams": ({"beams": 3, "repetition_penalty": 1.4}, {"num_beams": 3, "repetition_penalty": 1.4}),
}


@pytest.mark.parametrize("way", HF)
@pytest.mark.parametrize("name", LLAMA)
def test_text_equals_transformers_generate_token_for_token(name, way):
    c, (mine, theirs) = LLAMA[name], HF[way]
    model = scramble(LlamaForCausalLM(hf_llama(c)))
    p = from_state_dict(model.state_dict(), config.Llava(llama=c))
    rng, d = torch.Generator().manual_seed(0), Decoding(tokens=14, **mine)
    rows = [torch.randint(3, c.vocab, (n,), generator=rng).tolist() for n in (3, 9, 5, 1)]
    many = [Prompt(tuple(row), p["llama"]["embed"][:0]) for row in rows]
    ends = (2, 17, 30, 41, 55, 60, 71, 82)  # several, so that some row ends early
    for end in ((2,), ends):
        got = decode.generate(Model(p, config.Llava(llama=c)), many, d, Vocabulary(c.vocab, end, letters))
        for row, (found, *_) in zip(rows, got, strict=True):
            out = model.generate(
                input_ids=torch.tensor([row]), max_new_tokens=14, do_sample=False, eos_token_id=list(end),
                pad_token_id=0, return_dict_in_generate=True, output_scores=True, **theirs,
            )  # fmt: skip
            want = out.sequences[0, len(row) :].tolist()
            cut = next((j for j, i in enumerate(want) if i in end), None)
            assert list(found.ids) == want[:cut] and found.ended == (cut is not None)
            if d.beams > 1:
                assert found.score == pytest.approx(float(out.sequences_scores[0]), rel=1e-4)


@pytest.mark.parametrize("penalty", [1.0, -1.0])
def test_stop_texts_end_beams_as_in_transformers(penalty):
    c = LLAMA["grouped"]
    model = scramble(LlamaForCausalLM(hf_llama(c)))
    p, known = from_state_dict(model.state_dict(), config.Llava(llama=c)), Vocabulary(c.vocab, (2,), letters)
    m = Model(p, config.Llava(llama=c))
    many = [Prompt(tuple(row), p["llama"]["embed"][:0]) for row in ([5, 9, 60], [7], [90, 4], [8, 8, 3, 44])]
    d = Decoding(tokens=8, beams=3, length_penalty=penalty)
    free = decode.generate(m, many, d, known)
    stop = tuple(letters(best.ids[j : j + 1 + j % 2]) for j, (best, *_) in enumerate(free, 3))  # one or two tokens
    got = decode.generate(m, many, dataclasses.replace(d, stop=stop), known)
    assert sum(a != b for a, b in zip(ids(got), ids(free), strict=True)) >= 3
    for asked, (found, *_) in zip(many, got, strict=True):
        n = len(asked.ids)
        out = model.generate(
            input_ids=torch.tensor([asked.ids]), max_new_tokens=8, do_sample=False, num_beams=3, eos_token_id=2,
            length_penalty=penalty, pad_token_id=2, return_dict_in_generate=True, output_scores=True,
            stopping_criteria=[lambda x, _, n=n: torch.tensor([known.stopped(i[n:], stop) for i in x.tolist()])],
        )  # fmt: skip
        want = out.sequences[0, n:].tolist()
        want = want[: want.index(2)] if 2 in want else want
        assert list(found.ids) == want and found.ended == (len(want) < 8 or known.stopped(want, stop))
        assert found.score == pytest.approx(float(out.sequences_scores[0]), rel=1e-4)


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: f"{c.vision.width}-{c.llama.width}")
def test_llava_equals_transformers_generate_token_for_token(c, way):
    model, (mine, theirs) = hf_llava(c), HF[way]
    m = Model(ours(model, c), c)
    many = [sample(c, i, layout) for i, layout in enumerate(["ip", "ppppi", "pip", "pp", "ipi"])]
    known = Vocabulary(c.llama.vocab, (2,), letters)
    got = decode.generate(m, decode.prompts(m, many), Decoding(tokens=8, **mine), known)
    for prompt, (found, *_) in zip(many, got, strict=True):
        inputs = hf_inputs(c, [prompt])
        del inputs["labels"]
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, **theirs)
        want = out[0, len(prompt.ids) :].tolist()
        assert list(found.ids) == (want[: want.index(2)] if 2 in want else want)
    assert HF_IMAGE < c.llama.vocab
