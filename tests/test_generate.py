"""Generation with a cache against full forward passes."""

import dataclasses

import pytest
import torch

from llava_fn import config, generate, llama, llava, spec, tree
from llava_fn.batch import IMAGE, Sample, Stream
from llava_fn.cache import Cache

C = config.Llava(
    config.Vision(image=8, patch=4, width=8, blocks=3, heads=2, ffn=12),
    config.Llama(vocab=24, width=16, blocks=3, heads=4, kv_heads=2, ffn=10, theta=30.0),
)
LENGTHS = (3, 6, 1, 6)


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the most likely token is seldom the same twice."""
    rng = torch.Generator().manual_seed(3)
    shapes = spec.init(llava.spec(C), 0)
    return tree.rebuild(shapes, [torch.randn(x.shape, generator=rng) * 1.0 for x in tree.values(shapes)])


def prompts():
    rng, out = torch.Generator().manual_seed(1), []
    for j, n in enumerate((4, 1, 7)):
        images = int(j != 1)
        ids = (1, *[IMAGE] * (images * C.vision.patches), *torch.randint(3, 24, (n,), generator=rng).tolist())
        pixels = torch.randint(0, 256, (images, 3, 8, 8), generator=rng, dtype=torch.uint8)
        out.append(Sample(str(j), ids, (False,) * len(ids), pixels))
    return out


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
    free = [without_cache(params, s, -7, 12) for s in prompts()]
    assert len({tuple(x) for x in free}) == 3 and all(len(set(x)) > 3 for x in free)
    assert generate.greedy(params, prompts(), -7, 12, C) == free
    stop = free[1][4]
    want = [without_cache(params, s, stop, 12) for s in prompts()]
    assert len({len(x) for x in want}) > 1
    assert generate.greedy(params, prompts(), stop, 12, C) == want


def test_greedy_ends_when_every_row_has_stopped(params, monkeypatch):
    calls = []
    step = llama.decode_step
    monkeypatch.setattr(llama, "decode_step", lambda *args: calls.append(1) or step(*args))
    (sample, *_), (free, *_) = prompts(), [without_cache(params, s, -7, 12) for s in prompts()]
    stop = free[5]
    assert generate.greedy(params, [sample], stop, 12, C) == [free[: free.index(stop)]]
    assert len(calls) == free.index(stop)


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
        torch.testing.assert_close(torch.stack([x[j] for x in steps]), whole[n - 1 :])


def test_decode_step_is_one_graph_for_all_lengths(params):
    from torch._dynamo.testing import CompileCounter

    counter, c = CompileCounter(), dataclasses.replace(C.llama, blocks=1)
    step = torch.compile(llama.decode_step, backend=counter, fullgraph=True)
    cache = Cache.empty(c, 2, 9, params["llama"]["embed"])
    for j in range(4):
        same = Cache(cache.k.clone(), cache.v.clone(), cache.lengths)
        want, _ = llama.decode_step(params["llama"], torch.tensor([j + 3, j + 5]), same, c)
        x, cache = step(params["llama"], torch.tensor([j + 3, j + 5]), cache, c)
        torch.testing.assert_close(x, want)
        torch.testing.assert_close(cache.k, same.k)
    assert counter.frame_count == 1
