"""Gradients sample by sample from one backward pass, against a backward pass for each sample."""

from dataclasses import replace

import pytest
import torch

from llava_fn import config, llama, llava, lora, spec, tree
from llava_fn.batch import IMAGE, Sample, collate
from llava_fn.grad import value_and_grad
from llava_fn.parallel.collectives import TP
from llava_fn.parallel.mesh import Axis
from llava_fn.study import gradients
from llava_fn.study.gradients import Projection, Studied, per_sample, sites

ADAPTERS = config.Lora(rank=3, targets=("llama/blocks/.*", "projector/w1"))
SITES = 6 + 2 + (2 * (7 + 2) + 3) + 30  # linear layers of the tower and the projector, all of the decoder, adapters
IMAGES, TEXT = (1, 0, 2, 1, 1), (9, 12, 7, 9, 30)  # of each sample: two of one length, one without an image


@pytest.fixture(scope="module")
def samples(tiny):
    rng = torch.Generator().manual_seed(0)
    out = []
    for j, (images, n) in enumerate(zip(IMAGES, TEXT, strict=True)):
        words = torch.randint(4, tiny.llama.vocab, (n,), generator=rng).tolist()
        ids = (1, *[IMAGE] * tiny.vision.patches * images, *words)
        pixels = torch.randint(0, 256, (images, 3, 16, 16), generator=rng, dtype=torch.uint8)
        out.append(Sample(str(j), ids, tuple(i >= len(ids) - 5 - j for i in range(len(ids))), pixels))
    return out


def studied(tiny, dtype, run=llava.Execution(), tied=False):
    tiny = replace(tiny, llama=replace(tiny.llama, tied=tied))
    rng = torch.Generator().manual_seed(1)
    shapes = spec.init(lora.extended(llava.spec(tiny), ADAPTERS), 0)
    params = [0.3 * torch.randn(x.shape, generator=rng, dtype=dtype) for x in tree.values(shapes)]
    return Studied(tree.rebuild(shapes, params), tiny, ADAPTERS, run)


def looped(model, s, chosen):
    """The sample's loss, and its whole gradient as one row."""
    fn = lambda p, batch: (llava.nll(lora.attach(p, model.lora), batch, model.config).sum(), None)  # noqa: E731
    (loss, _), grads = value_and_grad(fn)(model.params, collate([s]))
    rows = []
    for site in chosen:
        bias = [grads[(*site.path[:-1], gradients.bias_of(site.path[-1]))][:, None]] if site.bias else []
        rows.append(torch.cat([grads[site.path].view(site.out, site.inp), *bias], 1).flatten())
    return loss, torch.cat(rows)


@pytest.mark.parametrize(
    ("dtype", "recompute", "tied", "error"), [(torch.float64, True, True, 1e-12), (torch.float32, False, False, 1e-5)]
)
def test_one_backward_gives_the_gradients_of_a_loop(tiny, samples, dtype, recompute, tied, error, monkeypatch):
    monkeypatch.setattr(llama, "LOGIT_ROWS", 7)  # so that a chunk of logits begins and ends within a sample
    model = studied(tiny, dtype, llava.execution(recompute, vision=tiny.vision), tied)
    chosen = sites(model, ["vision", "projector", "llama", "lora"])
    assert len(chosen) == SITES - tied
    taken, batch = per_sample(model, collate(samples), chosen), collate(samples)
    assert taken.count.tolist() == [sum(samples[int(name)].label) for name in batch.records]
    for name, loss, row in zip(taken.records, taken.loss, taken.flat(), strict=True):
        want_loss, want = looped(model, samples[int(name)], chosen)
        torch.testing.assert_close(loss, want_loss, rtol=error, atol=0)
        for part, site in zip(*(x.split([s.out * (s.inp + s.bias) for s in chosen]) for x in (row, want)), strict=True):
            torch.testing.assert_close(part, site, rtol=0, atol=error * float(want.norm()))


def test_projected_gradients_are_those_of_the_loop_projected(tiny, samples):
    model, projection = studied(tiny, torch.float64), Projection(4, seed=5)
    names = ["projector", "llama/blocks/1", "llama/embed", "llama/norm", "llama/head", "lora"]
    chosen, batch = sites(model, names), collate(samples)
    whole, small = (per_sample(model, batch, chosen, by, mean=True) for by in (None, projection))
    for site in chosen:
        by = {name: m.double() for name, m in projection.matrices(site).items()}
        out, inp = by.get("out", torch.eye(site.out).double()), by.get("inp", torch.eye(site.shape[1]).double())
        torch.testing.assert_close(small.gradients[site.path], out @ whole.gradients[site.path] @ inp.T)
    assert small.flat().shape[1] == gradients.size(chosen, projection) < gradients.size(chosen, None)


def test_a_part_without_a_linear_layer_and_padding_are_refused(tiny, samples):
    model = studied(tiny, torch.float32)
    with pytest.raises(ValueError, match="a segment of padding"):
        per_sample(model, collate(samples, multiple=64), sites(model, ["projector"]))
    with pytest.raises(ValueError, match="vision/patch, none: no part .* there are vision, projector, llama, lora"):
        sites(model, ["projector", "vision/patch", "none"])
    shared = replace(model, run=llava.Execution(tp=TP(Axis("tp", size=2))))
    with pytest.raises(ValueError, match="a rank of tp=2 has a part of each gradient"):
        per_sample(shared, collate(samples), sites(model, ["projector"]))
