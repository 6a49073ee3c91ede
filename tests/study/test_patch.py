"""Activations and patched runs against hooks on transformers' model, and the laws that patching must obey."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from exchanges import exchange_of, logprobs_of
from oracles import CONFIGS, hf_inputs, hf_llava, ours, sample
from PIL import Image
from rounding import same_but_rounded
from warm import recipe

from llava_fn import config
from llava_fn.generate import options
from llava_fn.generate.types import Model
from llava_fn.kernels import Segments
from llava_fn.study.activations import activations, edited, keep
from llava_fn.study.exchange import inputs
from llava_fn.study.lens import lens
from llava_fn.study.patch import aligned, noised, patch_heads, patch_states, positions

recipe_patch = recipe("patch")


class Both:
    """One model as ours and as transformers', a sample and the same with another picture."""

    def __init__(self, c):
        self.peer, self.s = hf_llava(c), sample(c, 3, "p2ip4")
        self.m, self.c = Model(ours(self.peer, c), c), c
        self.other = replace(self.s, pixels=sample(c, 4, "p2ip4").pixels)
        self.e, self.f = (exchange_of(self.m, s) for s in (self.s, self.other))
        self.clean, self.corrupted = (activations(self.m, inputs(self.m, e), e.answer) for e in (self.e, self.f))

    def run(self, s, hooks=()):
        """transformers' output with (module, function of what the module gives, or reads if it is o_proj) as hooks."""
        handles = [
            module.register_forward_pre_hook(lambda _, args, fn=fn: (fn(args[0]),))
            if isinstance(module, torch.nn.Linear)
            else module.register_forward_hook(lambda _, args, out, fn=fn: fn(out))
            for module, fn in hooks
        ]
        x = {k: v[:, :-1] if k in ("input_ids", "attention_mask") else v for k, v in hf_inputs(self.c, [s]).items()}
        del x["labels"]
        with torch.no_grad():
            out = self.peer(**x, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        return out


@pytest.fixture(scope="module", params=CONFIGS, ids=range(len(CONFIGS)))
def both(request):
    return Both(request.param)


def test_activations_and_the_lens_equal_transformers(both):
    seen, layers = [], both.peer.model.language_model.layers
    out = both.run(both.s, [(layer.self_attn.o_proj, lambda x: seen.append(x[0]) or x) for layer in layers])
    hidden = torch.stack(out.hidden_states[:-1])[:, 0]  # the last is normed
    same_but_rounded(both.clean.states[:-1], hidden)
    same_but_rounded(both.clean.heads.flatten(2), torch.stack(seen))
    same_but_rounded(both.clean.logprobs, logprobs_of(out.logits, both.e))
    found = lens(both.m, inputs(both.m, both.e), both.e.answer, k=3)
    norm, head = both.peer.model.language_model.norm, both.peer.lm_head
    with torch.no_grad():
        logits = torch.cat([head(norm(hidden)), out.logits])
    probs = logits.softmax(-1)
    same_but_rounded(found.probs, probs.topk(3).values, 1.0)
    same_but_rounded(found.answer, probs[..., list(both.e.answer)], 1.0)
    assert torch.equal(found.top[..., 0], logits.argmax(-1))
    small = lens(both.m, inputs(both.m, both.e), both.e.answer, k=3, size=99)
    assert small.top.max() < 99 <= found.top.max()


def test_one_site_equals_a_run_patched_by_hooks_on_transformers(both):
    layers, t = both.peer.model.language_model.layers, len(both.e.prompt.ids)
    runs = both.m, both.clean, both.corrupted
    sites, of_heads = torch.eye(t, dtype=torch.bool), torch.eye(both.c.llama.heads).bool()
    states, wide = (patch_states(*runs, sites, both.e.answer, batch=5, window=n) for n in (1, 2))
    heads, wide_heads = (patch_heads(*runs, of_heads, both.e.answer, 2, window=n) for n in (1, 2))
    assert states.shape[:2] == (len(layers) + 1, t) and heads.shape[:2] == (len(layers), both.c.llama.heads)
    h = both.c.llama.head
    patch = int(both.e.at[0, 1])
    for layer, site, head in ((0, patch, 3), (len(layers) - 1, patch, 1), (len(layers) - 1, t - 1, 0)):

        def at_position(layer, x, site=site):
            return x.index_copy(1, torch.tensor([site]), both.clean.states[layer + 1, site][None, None])

        def of_head(layer, x, head=head):
            return torch.cat([x[..., : head * h], both.clean.heads[layer, :, head][None], x[..., head * h + h :]], -1)

        for n, found, found_heads in ((1, states, heads), (2, wide, wide_heads)):  # the window ends with the layers
            window = range(layer, min(layer + n, len(layers)))
            hooks = [(layers[j], partial(at_position, j)) for j in window]
            same_but_rounded(found[layer + 1, site], logprobs_of(both.run(both.other, hooks).logits, both.e))
            hooks = [(layers[j].self_attn.o_proj, partial(of_head, j)) for j in window]
            want = logprobs_of(both.run(both.other, hooks).logits, both.e)
            same_but_rounded(found_heads[layer, head], want)
            assert (want - both.corrupted.logprobs).abs().max() > 1e-3
    assert (wide_heads - heads)[:-1].abs().max() > 1e-3 and (wide - states)[1:-1].abs().max() > 1e-3
    assert (states[1, patch] - both.corrupted.logprobs).abs().max() > 1e-3


def test_patching_everything_is_the_clean_run_and_patching_nothing_the_corrupted_one(both):
    t, n = len(both.e.prompt.ids), both.c.llama.heads
    ends = torch.stack([torch.ones(t), torch.zeros(t)]).bool()
    all_states, none = patch_states(both.m, both.clean, both.corrupted, ends, both.e.answer).unbind(1)
    same_but_rounded(all_states, both.clean.logprobs.expand_as(all_states))
    same_but_rounded(none, both.corrupted.logprobs.expand_as(none))
    no_head = patch_heads(both.m, both.clean, both.corrupted, torch.zeros(1, n).bool(), both.e.answer)[:, 0]
    same_but_rounded(no_head, both.corrupted.logprobs.expand_as(no_head))
    assert (both.clean.logprobs - both.corrupted.logprobs).abs().max() > 0.1


def linear_block(p, x, rot, rows, attend, c, tp):
    """A block that is linear in x: each head gives the mean of the values so far."""
    v = (x @ p["v"]).unflatten(1, (-1, c.head))
    q = torch.zeros_like(v)
    return x + attend(q, q, v).flatten(1) @ p["o"]


def test_effects_add_up_in_a_linear_toy():
    c, rng = config.Llama(vocab=8, width=8, blocks=3, heads=4, kv_heads=4, ffn=8), torch.Generator().manual_seed(2)
    params = [{k: torch.randn(8, 8, generator=rng) * 0.3 for k in "vo"} for _ in range(3)]
    rests = [(None, Segments.of([6]), None, c, None)] * 3
    xs = torch.randn(2, 6, 8, generator=rng)
    kept = [[], []], [[], []]
    clean, corrupted = (
        edited(keep(kept[j][0]), keep(kept[j][1]), block=linear_block)(params, x, rests) for j, x in enumerate(xs)
    )

    def effect(where, kind):
        """On the last states, of clean states at positions, or clean heads, of block 1: where is a mask of them."""
        mask = torch.tensor(where)[:, None] if kind else torch.tensor(where)[None, :, None]
        edit = lambda i, x: torch.where(mask, kept[0][1 - kind][1], x) if i == 1 else x  # noqa: E731
        return edited(**{"state" if kind else "heads": edit}, block=linear_block)(params, xs[1], rests) - corrupted

    for kind, n in ((0, 4), (1, 6)):
        parts = [effect([j == k for j in range(n)], kind) for k in range(n)]
        same_but_rounded(sum(parts), effect([True] * n, kind))
        same_but_rounded(parts[0] + parts[2], effect([j in (0, 2) for j in range(n)], kind))
        assert min(part.abs().max() for part in parts) > 1e-2
    same_but_rounded(effect([True] * 6, 1), clean - corrupted)


def test_sites_name_every_position_once(both, tokenizer):
    names, groups = positions(both.e, tokenizer)
    assert names[0] == "BOS" and names.count("image 1") == 1
    assert groups.sum(0).tolist() == [1] * len(both.e.prompt.ids)
    assert groups[names.index("image 1")].nonzero()[:, 0].tolist() == both.e.at[0].tolist()


def test_noise_is_in_units_of_the_features(both):
    by = noised(both.e, 2.0, 0).prompt.feats - both.e.prompt.feats
    assert by.std() == pytest.approx(2 * both.e.prompt.feats.std().item(), rel=0.2)
    assert torch.equal(by + both.e.prompt.feats, noised(both.e, 2.0, 0).prompt.feats)


def test_runs_without_counterparts_are_refused(both):
    longer, moved = (exchange_of(both.m, sample(both.c, 3, layout)) for layout in ("p2ip5", "p3ip3"))
    with pytest.raises(ValueError, match="positions and the corrupted one .*reword"):
        aligned(both.e, longer)
    with pytest.raises(ValueError, match="images stand at different positions"):
        aligned(both.e, moved)


@pytest.fixture(scope="module")
def images(emojis):
    return sorted((emojis / "images").iterdir())[:3][::-1]


def patch(weights, images, tmp_path, **more):
    model = options.ChatOptions((weights / "vicuna_v1",), device="cpu")
    more = {"prompt": "What?", "answer": "red cat", "other_image": tuple(images[1:2]), **more}
    return recipe_patch.Patch(model, tuple(images[:1]), tmp_path / "out/patch.png", **more)


def test_the_recipe_draws_each_kind_of_site_and_writes_its_numbers(weights, images, tmp_path, capsys):
    made = {}
    for sites, more in (
        ("positions", {}),
        ("patches", {"words": ("cat",), "window": 2}),
        ("heads", {"noise": 3.0, "other_image": (), "words": ("red",)}),
    ):
        c = patch(weights, images, tmp_path, sites=sites, **more)
        recipe_patch.main(c)
        made[sites] = dict(np.load(c.out.with_suffix(".npz")))
        assert len(Image.open(c.out).convert("RGB").getcolors(2**24)) > 50
    r = len(made["heads"]["clean"])
    assert {k: x["patched"].shape for k, x in made.items() if k != "positions"} == {
        "patches": (3, 4, r),
        "heads": (2, 2, r),
    }
    x = made["positions"]
    whole = x["patched"][0, list(x["sites"]).index("image 1")]
    np.testing.assert_allclose(whole, x["clean"], atol=1e-4)  # the pictures are all that differs
    assert "carries" in capsys.readouterr().out


BAD = [
    ({"other_image": ()}, "give one of --other-image, --other-prompt and --noise"),
    ({"noise": 1.0}, "give one of"),
    ({"other_image": (), "noise": -1.0}, "no negative noise"),
    ({"window": 0}, "window=0: .* one layer"),
    ({"other_image": ("a", "b")}, "2 other images for 1"),
    ({"other_image": (), "other_prompt": "What is this thing?"}, "has .* positions and the corrupted one"),
    ({"other_image": (), "other_prompt": "What?"}, "nats likelier"),
    ({"words": ("dog",)}, "--words dog: the answer does not say it"),
    ({"answer": "red\u2581cat"}, "is no text of this model, which reads its tokens as 'red cat'"),
]


@pytest.mark.parametrize("more, said", BAD, ids=range(len(BAD)))
def test_what_cannot_be_patched_is_said(more, said, weights, images, tmp_path):
    with pytest.raises(ValueError, match=said):
        recipe_patch.main(patch(weights, images, tmp_path, **more))
    assert not (tmp_path / "out").exists()
