"""(C) What the calls compute: the NPU forms on CPU tensors, with the ops emulated, against the references."""

import dataclasses
import importlib

import emulation
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fn import config, kernels, llava, spec, train, tree
from llava_fn.batch import IMAGE, Sample, collate
from llava_fn.generate import decode
from llava_fn.generate.types import Model
from llava_fn.grad import value_and_grad
from llava_fn.kernels import Segments

SEGMENTS = Segments((3, 1, 1, 2), (3, 5, 1, 2))


@pytest.fixture(scope="module", autouse=True)
def ops():
    library = emulation.register()
    yield
    library._destroy()


def module(name: str):
    return importlib.import_module(f"llava_fn.kernels.{name}")


def R(*shape, seed=0, dtype=torch.float32, grad=True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(grad)


def strided(*shape, seed=0):
    """A tensor that is a slice of a wider one, with a gradient of its own."""
    return R(*shape[:-1], 2 * shape[-1], seed=seed, grad=False)[..., ::2].requires_grad_()


def qkv(make=R, n=4, m=2):
    return make(7, n, 8, seed=1), make(11, m, 8, seed=2), make(11, m, 8, seed=3)


def tables():
    return [x.detach() for x in kernels.rotary_tables(torch.tensor([0, 1, 2, 0, 1, 7, 3]), 8, 50.0)]


HELD = kernels.Held(torch.tensor([1, 5, 3]), numbers=(1, 5, 3))
CASES = {  # name -> (module, arguments, call of that module's form)
    "causal attention": ("attention", qkv, lambda f, *x: f(*x, SEGMENTS, True)),
    "full attention": ("attention", qkv, lambda f, *x: f(*x, SEGMENTS, False)),
    "attention of strided rows": ("attention", lambda: qkv(strided), lambda f, *x: f(*x, SEGMENTS, True)),
    "RMSNorm": ("rms_norm", lambda: (R(5, 8), R(8, seed=1)), lambda f, *x: f(*x, 0.3)),
    "RMSNorm of three dims": ("rms_norm", lambda: (R(2, 5, 8), R(8, seed=1)), lambda f, *x: f(*x, 1e-5)),
    "add and RMSNorm": (
        "add_rms_norm", lambda: (R(5, 8), R(5, 8, seed=1), R(8, seed=2)), lambda f, *x: torch.stack(f(*x, 0.3)),
    ),
    "rotary": ("rotary", lambda: (R(7, 4, 8),), lambda f, x: f(x, *tables())),
    "rotary of strided rows": ("rotary", lambda: (strided(7, 4, 8),), lambda f, x: f(x, *tables())),
    "SwiGLU, few rows": ("swiglu", lambda: (R(3, 8), R(6, 8, seed=1), R(6, 8, seed=2)), lambda f, *x: f(*x)),
    "SwiGLU, many rows": ("swiglu", lambda: (R(19, 4), R(6, 4, seed=1), R(6, 4, seed=2)), lambda f, *x: f(*x)),
    "quick GELU": ("quick_gelu", lambda: (R(50),), lambda f, x: f(x)),
    "erf GELU": ("gelu", lambda: (R(50),), lambda f, x: f(x)),
    "cross-entropy": ("cross_entropy", lambda: (R(4, 9),), lambda f, x: f(x, torch.tensor([8, 0, 3, 3]))),
    "fp32 decoding": (
        "decode", lambda: (R(3, 4, 8), R(3, 6, 2, 8, seed=1), R(3, 6, 2, 8, seed=2)), lambda f, *x: f(*x, HELD),
    ),
}  # fmt: skip


def compare(form, reference, case: str, dtype=torch.float32) -> None:
    """Values and gradients of the two, to the rounding of dtype."""
    _, make, call = CASES[case]
    args = [x.detach().to(dtype).requires_grad_() for x in make()]
    results = [call(f, *args) for f in (form, reference)]
    weight = R(*results[0].shape, seed=9, grad=False)
    grads = [torch.autograd.grad((x.float() * weight).sum(), args) for x in results]
    limits = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-4}
    torch.testing.assert_close(*results, **limits)
    torch.testing.assert_close(*grads, **limits)


@pytest.mark.parametrize("case", CASES)
def test_npu_form_equals_the_reference(case):
    op = module(CASES[case][0])
    compare(op.npu, op.reference, case)


@pytest.mark.parametrize("case", [name for name in CASES if "decoding" not in name])
def test_npu_form_equals_the_reference_in_bf16(case):
    op = module(CASES[case][0])
    compare(op.npu, op.reference, case, torch.bfloat16)


sizes = st.integers(1, 5).flatmap(lambda k: st.tuples(st.integers(1, k), st.just(k)))


@settings(max_examples=10, deadline=None)
@given(
    st.lists(sizes, min_size=1, max_size=4), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.booleans(), st.integers(1, 3)
)
def test_npu_form_of_attention_equals_the_reference_for_all_segments_and_groups(pairs, heads, causal, most):
    """most: segments in one call."""
    op, segments = module("attention"), Segments(*map(tuple, zip(*pairs, strict=True)))
    q = strided(sum(segments.queries), heads[0], 4, seed=1)
    k, v = (strided(sum(segments.keys), heads[1], 4, seed=s) for s in (2, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "SEGMENTS", most)
        results = [form(q, k, v, segments, causal) for form in (op.npu, op.reference)]
    weight = R(*q.shape, seed=9, grad=False)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in results]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def int8_product(form):
    codes = torch.randint(-127, 128, (6, 8), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    return form(R(2, 3, 8, grad=False, dtype=torch.bfloat16), codes, R(6, 1, seed=2, grad=False).exp())


def test_int8_linear_equals_the_reference():
    op = module("int8_linear")
    torch.testing.assert_close(int8_product(op.npu), int8_product(op.reference), rtol=2**-6, atol=2.0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bf16_decoding_equals_the_reference(groups):
    op = module("decode")
    q, *cache = R(3, 4, 8), R(3, 6, 4 // groups, 8, seed=1), R(3, 6, 4 // groups, 8, seed=2)
    with torch.no_grad():
        mine = op.npu(*(x.bfloat16() for x in (q, *cache)), HELD)
        want = op.reference(q, *cache, HELD)
    torch.testing.assert_close(mine.float(), want, rtol=2**-6, atol=2**-6)


def paged_decoding(form, table=((4, 1), (0, 3), (2, 5)), pages=6, dtype=torch.bfloat16):
    """Equals the reference in fp32."""
    held = kernels.Held(torch.tensor([17, 20, 32]), torch.tensor(table).int(), (17, 20, 32))
    q, *cache = R(3, 4, 8), R(pages, 16, 2, 8, seed=1), R(pages, 16, 2, 8, seed=2)
    with torch.no_grad():
        mine = form(*(x.to(dtype) for x in (q, *cache)), held)
        want = module("decode").reference(q, *cache, held)
    torch.testing.assert_close(mine.float(), want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_from_pages_equals_the_reference(dtype):
    paged_decoding(module("decode").npu, dtype=dtype)


def test_rows_that_share_more_pages_than_the_fused_op_takes_are_decoded():
    paged_decoding(module("decode").npu, ((4, 1), (4, 3), (4, 3)), 5)


def written(form):
    """Equals what the reference writes."""
    new = (R(3, 2, 8, grad=False), R(3, 2, 8, seed=1, grad=False))
    slots = torch.tensor([6, 0, 4])
    caches = [[torch.zeros(2, 4, 2, 8) for _ in "kv"] for _ in range(2)]
    for write, cache in zip((form, module("write_kv").reference), caches, strict=True):
        write(*cache, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in new), slots)
    assert all(map(torch.equal, *caches)) and int((caches[0][0] != 0).sum()) == 48


def test_keys_and_values_are_written_as_the_reference_writes_them():
    written(module("write_kv").npu)


class Twins:
    """A group of two ranks that hold the same."""

    def size(self):
        return 2

    def rank(self):
        return 1

    def _get_backend(self, device):
        assert device == torch.device("npu")
        return self

    def get_hccl_comm_name(self, rank):
        assert rank == 1
        return "twins"


@pytest.mark.parametrize("kind", ["column", "row"])
def test_fused_matmul_and_collective_equal_their_formulas(kind, monkeypatch):
    op, group = module("parallel_linear"), Twins()
    monkeypatch.setattr(op, "choose", lambda x, reference, npu: npu)
    monkeypatch.setattr(op, "all_gather", lambda x, group: x.repeat(2, 1))
    x = R(4, 256, dtype=torch.bfloat16)
    w = (R(512, 256, seed=1, grad=False) / 16).bfloat16().requires_grad_()
    form = op.column_linear if kind == "column" else op.row_linear
    mine = form(x, w, group)
    g = R(*mine.shape, seed=3, dtype=torch.bfloat16, grad=False)
    got = (mine, *torch.autograd.grad(mine, (x, w), g))
    a, b, g = (z.detach().float() for z in (x, w, g))
    if kind == "column":  # both ranks hold g: the first rank's share of the sum over them
        want = (a @ b.t()).repeat(2, 1), 2 * (g @ b)[:4], g.t() @ a.repeat(2, 1)
    else:
        want = 2 * (a @ b.t())[:2], g.repeat(2, 1) @ b, g.repeat(2, 1).t() @ a
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=2**-6, atol=0.15)


C = config.Llava(
    config.Vision(image=8, patch=4, width=8, blocks=3, heads=2, ffn=12),
    config.Llama(vocab=24, width=16, blocks=3, heads=4, kv_heads=2, ffn=10, theta=30.0),
)
OPS = (
    "add_rms_norm", "attention", "cross_entropy", "decode", "gelu", "quick_gelu", "rms_norm", "rotary", "swiglu",
    "write_kv",
)  # fmt: skip


@pytest.fixture
def on_npu(monkeypatch):
    """Every operation takes its NPU form, on CPU tensors."""

    def start():
        for name in OPS:
            monkeypatch.setattr(module(name), "choose", lambda x, reference, **fused: fused["npu"])
        monkeypatch.setattr("llava_fn.cache.empty_cache", lambda like, *shape: like.new_zeros(shape))

    return start


@pytest.fixture(scope="module")
def params():
    rng, shapes = torch.Generator().manual_seed(3), spec.init(llava.spec(C), 0)
    return tree.rebuild(shapes, [torch.randn(x.shape, generator=rng) * 0.5 for x in tree.values(shapes)])


def samples():
    rng, out = torch.Generator().manual_seed(1), []
    for j, n in enumerate((9, 7, 9)):
        ids = (1, *[IMAGE] * 4, *torch.randint(3, 24, (n,), generator=rng).tolist())
        pixels = torch.randint(0, 256, (1, 3, 8, 8), generator=rng, dtype=torch.uint8)
        out.append(Sample(str(j), ids, (False,) * (len(ids) - 3) + (True,) * 3, pixels))
    return out


@pytest.mark.parametrize("recompute", [False, True])
def test_model_in_npu_form_has_the_loss_and_gradients_of_the_reference(params, on_npu, recompute):
    task = train.Task(tree.split(params, lambda path: True)[1], C, train.optim.Optim(), 10)
    if recompute:
        task = dataclasses.replace(task, run=llava.execution(recompute=True))
    results = []
    for start in (lambda: None, on_npu):
        start()
        (value, _), grads = value_and_grad(train.loss)(params, collate(samples()), 1, 0.1, task)
        results.append((value, *tree.values(grads)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_greedy_continuation_in_npu_form_is_that_of_the_reference(params, on_npu):
    want = decode.greedy(Model(params, C), samples(), -1, 8)
    on_npu()
    assert decode.greedy(Model(params, C), samples(), -1, 8) == want and len({tuple(x) for x in want}) == 3


def test_the_emulations_keep_the_signatures_of_the_real_ops():
    for name in (name for name in vars(emulation) if name.startswith("npu_")):
        arguments = getattr(torch.ops.npu, name).default._schema.arguments
        code = getattr(emulation, name).__code__
        mine = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        assert list(mine) == [a.name for a in arguments][: len(mine)], name
