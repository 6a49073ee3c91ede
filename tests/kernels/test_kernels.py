"""Each reference kernel against the formula of its contract, forward and gradients."""

import dataclasses
import math
from importlib import import_module
from inspect import signature
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava_fn import kernels
from llava_fn.kernels import Segments, decode
from llava_fn.kernels.swiglu import gated
from llava_fn.kernels.varlen import varlen_attn

ATTENTION, CHUNKED, LINEAR = (  # the package has functions of these names
    import_module(f"llava_fn.kernels.{name}") for name in ("attention", "chunked_attention", "linear")
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def naive_attention(q, k, v, segments, causal):
    """One query at a time, straight from the contract."""
    out, group, t0, s0 = [], q.shape[1] // k.shape[1], 0, 0
    for rows, cols in zip(segments.queries, segments.keys, strict=True):
        for j in range(rows):
            seen = s0 + (cols - rows + j + 1 if causal else cols)
            heads = []
            for n in range(q.shape[1]):
                keys, values = k[s0:seen, n // group], v[s0:seen, n // group]
                scores = keys @ q[t0 + j, n] / math.sqrt(q.shape[2])
                heads.append(scores.softmax(0) @ values)
            out.append(torch.stack(heads))
        t0, s0 = t0 + rows, s0 + cols
    return torch.stack(out)


sizes = st.integers(1, 5).flatmap(lambda k: st.tuples(st.integers(1, k), st.just(k)))


@settings(max_examples=40, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=5), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.booleans())
def test_attention_equals_one_query_at_a_time(pairs, heads, causal):
    segments = Segments(*map(tuple, zip(*pairs, strict=True)))
    q = rand(sum(segments.queries), heads[0], 4, seed=1)
    k, v = (rand(sum(segments.keys), heads[1], 4, seed=s) for s in (2, 3))
    mine = kernels.attention(q, k, v, segments, causal)
    want = naive_attention(q, k, v, segments, causal)
    weight = rand(*want.shape, seed=4).detach()
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (mine, want)]
    torch.testing.assert_close(mine, want)
    torch.testing.assert_close(*grads)


@settings(max_examples=20, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=5), st.sampled_from([(2, 2), (4, 2)]), st.sampled_from([0, 30, 2**23]))
def test_attention_in_chunks_equals_one_query_at_a_time(pairs, heads, kept):
    segments = Segments(*map(tuple, zip(*pairs, strict=True)))
    q = rand(sum(segments.queries), heads[0], 4, seed=1)
    k, v = (rand(sum(segments.keys), heads[1], 4, seed=s) for s in (2, 3))
    want, weight = naive_attention(q, k, v, segments, True), rand(*q.shape, seed=4).detach()
    with patch.multiple(CHUNKED, CHUNK=2, KEPT=kept), patch.multiple(ATTENTION, LEAST=2):
        mine = kernels.attention(q.float(), k.float(), v.float(), segments, True)
        grads = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (mine, want)]
    torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_the_second_gradient_of_attention_in_chunks(monkeypatch):
    monkeypatch.setattr(CHUNKED, "CHUNK", 2)
    q, k, v = rand(6, 1, 2), rand(10, 1, 2, seed=1), rand(10, 1, 2, seed=2)
    assert gradgradcheck(lambda *x: CHUNKED.chunked_attention(*x, 2), (q, k, v))


def test_forms_of_a_cpu_give_way_to_transforms(monkeypatch):
    monkeypatch.setattr(ATTENTION, "LEAST", 2)
    monkeypatch.setattr(LINEAR, "LARGE", 1)
    x = rand(9, 2, 4).detach().float()
    ops = {
        "attention": lambda x: kernels.attention(x, x, x, Segments.of([5, 4]), True),
        "linear": lambda x: kernels.linear(x.flatten(1), x[:8].flatten(1)),
    }
    for op in ops.values():
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no forward-mode rule
            y, slope = torch.func.jvp(op, (x,), (x,))
            (backward,) = torch.autograd.grad(op(x.requires_grad_()).sum(), x)
            torch.testing.assert_close(slope.sum(), (backward * x.detach()).sum(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.func.grad(lambda x, op=op: op(x).sum())(x.detach()), backward)
            torch.testing.assert_close(torch.func.vmap(op)(x.detach()[None].repeat(3, 1, 1, 1)), y.expand(3, *y.shape))


def test_attention_takes_strided_input():
    wide = rand(6, 3, 2, 4)
    q, k, v = (wide[:, i] for i in range(3))
    segments = Segments.of([2, 4])
    strided = kernels.attention(q, k, v, segments, True)
    torch.testing.assert_close(strided, kernels.attention(*(x.contiguous() for x in (q, k, v)), segments, True))


@pytest.mark.parametrize(
    "queries, keys, said",
    [((2,), (1,), "2 queries and 1 keys"), ((0,), (3,), "0 queries"), ((1, 1), (2,), "2 query segments but 1")],
)
def test_segments_that_would_leave_a_row_without_keys_are_refused(queries, keys, said):
    with pytest.raises(ValueError, match=said):
        Segments(queries, keys)


def test_rows_that_do_not_fit_the_segments_are_refused():
    with pytest.raises(ValueError, match="q has 3 rows and k 3, but the segments hold 4"):
        kernels.attention(*(rand(3, 1, 2) for _ in range(3)), Segments.of([4]), True)


def held(lengths, room=0, table=None):
    return kernels.Held.of(torch.tensor(lengths), room, table)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.data())
def test_decode_attention_equals_attention_over_the_keys_that_a_row_sees(lengths, heads, data):
    size = max(lengths) + data.draw(st.integers(0, 3))
    q = rand(len(lengths), heads[0], 4, seed=1)
    k, v = (rand(len(lengths), size, heads[1], 4, seed=s) for s in (2, 3))
    mine = kernels.decode_attention(q, k, v, held(lengths))
    ragged = [torch.cat([x[j, :n] for j, n in enumerate(lengths)]) for x in (k, v)]
    want = naive_attention(q, *ragged, Segments((1,) * len(lengths), tuple(lengths)), True)
    weight = rand(*want.shape, seed=4).detach()
    torch.testing.assert_close(mine, want)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (mine, want)]
    torch.testing.assert_close(*grads)


def test_decode_attention_ignores_the_rest_of_the_cache():
    q, k, v = rand(2, 4, 8), rand(2, 5, 2, 8, seed=1), rand(2, 5, 2, 8, seed=2)
    lengths = held([2, 5])
    want = kernels.decode_attention(q, k, v, lengths)
    for x, fill in ((k, 1e4), (v, 7.0)):
        x.data[0, 2:] = fill
    assert torch.equal(kernels.decode_attention(q, k, v, lengths), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 5], [2, 4], [1, 7]])
def test_decode_attention_in_any_order_in_memory_equals_the_reference(lengths, dtype):
    q, lengths = rand(2, 4, 8).to(dtype), held(lengths)
    k, v = (kernels.empty_cache(q, 1, 2, 7, 2, 8)[0].copy_(rand(2, 7, 2, 8, seed=s)) for s in (1, 2))
    assert k.permute(2, 0, 1, 3).is_contiguous()
    want = decode.reference(q, k.contiguous(), v.contiguous(), lengths)
    torch.testing.assert_close(kernels.decode_attention(q, k, v, lengths), want)


def in_pages(size, lengths, dtype, order=lambda q, *shape: kernels.empty_cache(q, 1, *shape)[0]):
    """Queries, a cache of 9 pages that holds rows of these lengths, its table, and keys and values of the rows."""
    rows = [rand(len(lengths), 3 * size, 2, 8, seed=s).to(dtype).detach() for s in (1, 2)]
    q, table = rand(len(lengths), 4, 8).to(dtype).detach(), torch.randperm(9)[: 3 * len(lengths)].view(-1, 3).int()
    pages = [order(q, 9, size, 2, 8).fill_(9.0) for _ in rows]
    for x, row in zip(pages, rows, strict=True):
        x[table.flatten()] = row.unflatten(1, (3, size)).flatten(0, 1)
    return q, pages, table, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[12, 12], [2, 5, 12], [4]])
def test_decode_attention_reads_the_pages_of_each_row(lengths, dtype):
    q, pages, table, rows = in_pages(4, lengths, dtype)
    want = kernels.decode_attention(q, *rows, held(lengths))
    torch.testing.assert_close(kernels.decode_attention(q, *pages, held(lengths, 12, table)), want)
    torch.testing.assert_close(decode.reference(q, *pages, held(lengths, 12, table)), want)
    rows = [x.contiguous() for x in pages]  # the order of a card
    torch.testing.assert_close(decode.reference(q, *rows, held(lengths, 12, table)), want)


def flash(q, k, v, q_starts, k_starts, max_q, max_k, *, seqused_k, block_table, enable_gqa):
    """varlen_attn for one query a segment, as torch documents it, in fp64."""
    assert q_starts.tolist() == list(range(len(q) + 1)) and (max_q, enable_gqa) == (1, q.shape[1] != k.shape[-2])
    assert q_starts.dtype == k_starts.dtype == seqused_k.dtype == torch.int32 and k_starts.diff().max() <= max_k
    if block_table is not None:
        assert block_table.dtype == torch.int32 and k.shape[1] % 256 == 0 and k_starts.diff().min() == max_k
        k, v = (x[block_table.long()].flatten(0, 2) for x in (k, v))
    rows = [torch.arange(start, start + n) for start, n in zip(k_starts.tolist(), seqused_k.tolist(), strict=False)]
    k, v = (torch.cat([x.double()[of] for of in rows]) for x in (k, v))
    return naive_attention(q.double(), k, v, Segments((1,) * len(q), tuple(map(len, rows))), True).to(q.dtype)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_the_cuda_form_of_decode_attention_means_what_the_reference_does(heads, monkeypatch):
    monkeypatch.setattr(decode, "varlen_attn", flash)
    q, lengths = rand(3, heads[0], 8).bfloat16(), held([5, 1, 7])
    k, v = (rand(3, 7, heads[1], 8, seed=s).bfloat16() for s in (1, 2))
    want = decode.reference(q.double(), k.double(), v.double(), lengths)
    torch.testing.assert_close(decode.cuda(q, k, v, lengths).double(), want, atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="varlen_attn needs a contiguous cache"):
        decode.cuda(q, k[:, :6], v[:, :6], lengths)
    with pytest.raises(ValueError, match="varlen_attn needs heads of 8, 16 .. 256, not 4"):
        decode.cuda(q[..., :4], k, v, lengths)
    lengths = [300, 1, 513]
    q, pages, table, rows = in_pages(256, lengths, torch.bfloat16, lambda q, *shape: q.new_zeros(*shape))
    lengths = held(lengths, 768, table)
    for each in (lengths, dataclasses.replace(lengths, stream=decode.streamed(lengths.lengths, 768))):
        want = decode.reference(q, *rows, held(lengths.numbers))
        torch.testing.assert_close(decode.cuda(q, *pages, each), want, atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="pages of a multiple of 256 tokens, not 128"):
        decode.cuda(q, *(x[:, :128].contiguous() for x in pages), lengths)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_cache_stands_in_memory_as_its_attention_reads_it(kind):
    newer = "seqused_k" in signature(varlen_attn).parameters  # than torch 2.11
    for dtype, flash in ((torch.bfloat16, newer), (torch.float32, False)):
        with FakeTensorMode():
            x = kernels.empty_cache(torch.empty(0, device=torch.device(kind), dtype=dtype), 2, 3, 5, 2, 8)
            assert x.is_contiguous() == (kind == "cuda" and flash)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_forms_without_a_gradient_equal_those_with_one_and_leave_their_inputs(dtypes):
    x, y, gain = (rand(3, 8, seed=s).detach().to(dtypes[0]) for s in range(3))
    gain, weights = gain[0].to(dtypes[1]), [rand(6, 8, seed=s).detach().to(dtypes[0]) for s in (4, 5)]
    before = [z.clone() for z in (x, y, gain, *weights)]

    def run():
        return [kernels.rms_norm(x, gain, 1e-5), *kernels.add_rms_norm(x, y, gain, 1e-5), kernels.swiglu(x, *weights)]

    want = run()
    with torch.no_grad():
        for mine, other in zip(run(), want, strict=True):
            torch.testing.assert_close(mine, other)
    assert all(map(torch.equal, before, (x, y, gain, *weights)))


def test_decode_attention_is_one_graph_for_all_lengths():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def attend(q, k, v, lengths):
        return kernels.decode_attention(q, k, v, kernels.Held.of(lengths, 5))

    step = torch.compile(attend, backend=counter, fullgraph=True)
    q, k, v = rand(2, 4, 8), rand(2, 5, 2, 8, seed=1), rand(2, 5, 2, 8, seed=2)
    for lengths in ([1, 2], [5, 3], [4, 4]):
        torch.testing.assert_close(step(q, k, v, torch.tensor(lengths)), attend(q, k, v, torch.tensor(lengths)))
    assert counter.frame_count == 1


def test_decode_attention_refuses_shapes_that_do_not_fit():
    q, k = rand(2, 3, 4), rand(2, 5, 2, 4)
    for args in ((q, k, k), (q[:1], k, k), (rand(2, 4, 4), k, k[:, :4]), (rand(2, 4, 2), k, k)):
        with pytest.raises(ValueError, match="n a multiple of m"):
            kernels.decode_attention(*args, held([1, 2]))
    with pytest.raises(ValueError, match=r"lengths \(1,\)"):
        kernels.decode_attention(rand(2, 4, 4), k, k, held([1]))


def test_norms_follow_their_formulas():
    x, gain, bias = rand(3, 7), rand(7, seed=1), rand(7, seed=2)
    rms = x * gain / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    layer = centred / (centred.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * gain + bias
    x32, gain32, bias32 = (z.detach().float() for z in (x, gain, bias))
    torch.testing.assert_close(kernels.rms_norm(x32, gain32, 0.1), rms.float())
    torch.testing.assert_close(kernels.layer_norm(x32, gain32, bias32, 0.1), layer.float())


@pytest.mark.parametrize("seed", range(3))
def test_norms_round_once(seed):
    x, gain, bias = (rand(*s, seed=seed + i).detach().bfloat16() for i, s in enumerate([(64, 33), (33,), (33,)]))
    for mine, exact in (
        (kernels.rms_norm(x, gain, 1e-5), kernels.rms_norm(x.float(), gain.float(), 1e-5)),
        (kernels.layer_norm(x, gain, bias, 1e-5), kernels.layer_norm(x.float(), gain.float(), bias.float(), 1e-5)),
    ):
        assert torch.equal(mine, exact.bfloat16())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_strided_input_changes_nothing(t, n, half):
    h = 2 * half
    wide, gain = rand(t, n, 2 * h).detach().float(), rand(h, seed=1).detach().float()
    x, tables = wide[..., ::2], kernels.rotary_tables(torch.arange(t), h, 10.0)
    for op in (
        lambda x: kernels.rms_norm(x, gain, 0.1), lambda x: kernels.layer_norm(x, gain, gain, 0.1),
        lambda x: torch.stack(kernels.add_rms_norm(x, x, gain, 0.1)), lambda x: kernels.rotary(x, *tables),
        kernels.gelu, kernels.quick_gelu, lambda x: kernels.swiglu(x, gain[None], -gain[None]),
    ):  # fmt: skip
        torch.testing.assert_close(op(x), op(x.contiguous()))


def test_rotary_turns_each_pair_by_its_angle():
    head, theta, positions = 6, 100.0, torch.tensor([0, 1, 5, 2])
    x = rand(4, 2, head).float()
    mine = kernels.rotary(x, *kernels.rotary_tables(positions, head, theta))
    for t, position in enumerate(positions.tolist()):
        for j in range(head // 2):
            angle = position * theta ** (-2 * j / head)
            pair = torch.complex(x[t, :, j], x[t, :, j + head // 2]) * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(mine[t, :, j], pair.real)
            torch.testing.assert_close(mine[t, :, j + head // 2], pair.imag)


def test_rotary_rounds_its_tables_to_the_input():
    x, tables = rand(4, 2, 6).detach().bfloat16(), kernels.rotary_tables(torch.arange(4), 6, 50.0)
    rounded = [z.bfloat16() for z in tables]
    assert kernels.rotary(x, *tables).dtype == torch.bfloat16
    assert torch.equal(kernels.rotary(x, *tables), kernels.rotary(x, *rounded))


def test_activations_follow_their_formulas():
    x, up = rand(50), rand(50, seed=1)
    torch.testing.assert_close(kernels.gelu(x), x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
    torch.testing.assert_close(kernels.quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
    torch.testing.assert_close(gated(x, up), x / (1 + torch.exp(-x)) * up)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (2, 24), (8, 24), (9, 24), (2, 3, 24), (24,), (0, 24)])
def test_linear_without_a_gradient_equals_the_product(shape, biased, monkeypatch):
    monkeypatch.setattr(LINEAR, "LARGE", 24)
    x, w, bias = (rand(*s, seed=j).detach() for j, s in enumerate([shape, (5, 24), (5,)]))
    want = x @ w.t() + (bias if biased else 0)
    for dtype in (torch.float32, torch.float64):
        args = [z.to(dtype) for z in ((x, w, bias) if biased else (x, w))]
        before = [z.clone() for z in args]
        with torch.no_grad():
            y = kernels.linear(*args)
        assert (y.shape, y.dtype) == (want.shape, dtype) and y.is_contiguous()
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, before, args))
        args[0].requires_grad_()
        assert kernels.linear(*args).requires_grad
    args = [z.requires_grad_() for z in ((x, w, bias) if biased else (x, w))]
    assert x.numel() == 0 or gradcheck(kernels.linear, args)


@pytest.mark.parametrize("shape", [(1, 24), (2, 24), (9, 24), (2, 3, 24), (24,), (0, 24)])
def test_a_packed_weight_gives_the_same_product_and_gradient(shape, monkeypatch):
    monkeypatch.setattr(LINEAR, "LARGE", 24)
    monkeypatch.setattr(LINEAR, "avx512", torch.backends.mkldnn.is_available)  # packing needs no more
    x, w, bias = (rand(*s, seed=j).detach().float() for j, s in enumerate([shape, (5, 24), (5,)]))
    packed = LINEAR.pack(w)
    assert packed.is_mkldnn == torch.backends.mkldnn.is_available() and LINEAR.pack(w.double()).layout == torch.strided
    for b in (None, bias):
        torch.testing.assert_close(kernels.linear(x, packed, b), torch.nn.functional.linear(x, w, b))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):
        y = kernels.linear(x.requires_grad_(), packed, bias.requires_grad_())
    assert x.numel() == 0 or all(z.is_mkldnn for z in kept)  # no whole weight waits for the backward pass
    grads = torch.autograd.grad(y.sum(), (x, bias))
    torch.testing.assert_close(grads, (w.sum(0).expand(shape), torch.full((5,), float(y.numel() // 5))))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_linear_in_fp32_has_the_gradients_of_the_product(rows, wanted, monkeypatch):
    """First and second ones, of those factors alone that want one."""
    monkeypatch.setattr(LINEAR, "LARGE", 24)
    both = []
    for op, dtype in ((kernels.linear, torch.float32), (torch.nn.functional.linear, torch.float64)):
        args = [rand(*s, seed=j).detach().to(dtype) for j, s in enumerate([(rows, 24), (5, 24), (5,)])]
        leaves = [args[j].requires_grad_() for j in wanted]
        first = torch.autograd.grad(op(*args).square().sum(), leaves, create_graph=True)
        both.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for mine, want in zip(*both, strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=1e-4, atol=1e-4)


def codes_of(n, k, seed=5):
    codes = torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return codes, torch.exp(rand(n, 1, seed=seed)).detach().float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (2, 8, 64), (17, 64), (64,), (0, 64), (3, 24)])
def test_int8_linear_is_the_product_with_the_weight_that_it_stands_for(shape, dtype, monkeypatch):
    """Few rows in fp32 have bf16 activations and sums; k of 24, which torch's kernel would read beyond, has not.

    More rows are multiplied in digits where the CPU has VNNI; of them the test below is.
    """
    op = import_module("llava_fn.kernels.int8_linear")
    monkeypatch.setattr(op, "vnni", lambda: False)
    x, (codes, scale) = rand(*shape).detach().to(dtype), codes_of(5, shape[-1])
    y, want = kernels.int8_linear(x, codes, scale), x.double() @ (codes.double() * scale.double()).t()
    few = 0 < x.numel() // 64 <= 16 and shape[-1] == 64 and dtype == torch.float32
    near = torch.finfo(torch.bfloat16 if few else max(dtype, torch.float32, key=lambda d: torch.finfo(d).eps)).eps
    assert (y.shape, y.dtype) == (want.shape, dtype)
    largest = (x.double().abs() @ (codes.double().abs() * scale.double()).t()).clamp(min=1e-30)
    assert ((y.double() - want).abs() <= 2 * near * largest).all()
    assert not few or not torch.equal(y, x @ (codes * scale).t())  # else the case tests nothing of its own


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear_in_digits_rounds_each_row_by_a_65000th_of_its_largest_value(dtype, monkeypatch):
    op = import_module("llava_fn.kernels.int8_linear")
    if not op.vnni():
        pytest.skip("this CPU has no VNNI")
    x = rand(9, 48).detach().to(dtype) * torch.logspace(-30, 8, 9)[:, None].to(dtype)
    x[3], x[5, 2] = 0, float("nan")
    codes, scale = torch.eye(48, dtype=torch.int8) * 100, torch.full((48, 1), 2.0)
    fine = torch.tensor([0, 1, 2, 4, 6, 7, 8])
    small = kernels.int8_linear(x, codes, scale)[fine]  # a small weight is made whole
    assert torch.equal(small, op.reference(x, codes, scale)[fine])
    monkeypatch.setattr(op, "LARGE", 0)
    y = kernels.int8_linear(x, codes, scale)
    assert y.dtype == dtype and y[5].isnan().all() and not y[3].any()
    near = x.double().abs().amax(1, keepdim=True) * 2**-15.9 + torch.finfo(dtype).eps * x.double().abs()
    assert ((y.double() / 200 - x.double()).abs() <= near)[fine].all()
    assert all(torch.equal(op.digits(x[j : j + 1].float(), codes, scale).to(dtype)[0], y[j]) for j in fine)


def test_cross_entropy_is_the_negative_log_probability_of_the_target():
    logits, targets = rand(5, 9).float(), torch.tensor([0, 8, 3, 3, 1])
    want = -(logits.exp() / logits.exp().sum(1, keepdim=True)).log()[torch.arange(5), targets]
    torch.testing.assert_close(kernels.cross_entropy(logits, targets), want)
    assert kernels.cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def test_gradients_equal_finite_differences():
    q, k, v = rand(5, 4, 2), rand(6, 2, 2, seed=1), rand(6, 2, 2, seed=2)
    assert gradcheck(lambda *x: kernels.attention(*x, Segments((2, 3), (3, 3)), True), (q, k, v))
    tables = [z.double() for z in kernels.rotary_tables(torch.arange(5), 2, 10.0)]
    assert gradcheck(lambda x: kernels.rotary(x, *tables), (q,))
    wide = rand(3, 4, seed=3), rand(3, 4, seed=4), rand(4, seed=5)
    assert gradcheck(lambda *x: kernels.add_rms_norm(*x, 0.1), wide)
    assert gradcheck(lambda *x: kernels.rms_norm(*x, 0.1), (wide[0], wide[2]))
    assert gradcheck(lambda *x: kernels.layer_norm(*x, 0.1), (wide[0], wide[2], rand(4, seed=6)))
    assert gradcheck(lambda x: kernels.cross_entropy(x, torch.tensor([3, 0, 1])), (wide[0],))
    cache = rand(2, 3, 1, 2, seed=7), rand(2, 3, 1, 2, seed=8)
    assert gradcheck(lambda *x: kernels.decode_attention(*x, held([1, 3])), (rand(2, 2, 2), *cache))
    for op in (kernels.gelu, kernels.quick_gelu):
        assert gradcheck(op, (rand(6),))
    assert gradcheck(kernels.swiglu, (rand(3, 2), rand(4, 2, seed=1), rand(4, 2, seed=2)))
