"""Which form of an operation runs; the limits of the fused forms; parity on every device that is there."""

import ast
import runpy
import sys
import types
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_fn import kernels
from llava_fn.kernels import Segments, check, dispatch
from llava_fn.kernels.varlen import varlen_attn

ROOT = Path(__file__).parents[2]
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
DEVICES = [torch.device("cpu"), *([ACCELERATOR] if ACCELERATOR else [])]


def module(name: str):
    return import_module(f"llava_fn.kernels.{name}")


def R(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("case", check.cases(check.SMALL), ids=lambda c: c.name)
def test_form_of_the_device_equals_the_reference(case, device, dtype):
    found = check.errors(case, case.form("chosen"), device, dtype)
    limit = max(case.rounds, check.LIMITS[str(dtype).removeprefix("torch.")])
    assert len(found) == 1 + case.gradients and max(found) <= limit


@pytest.fixture
def flash_on_the_host():
    """torch's flash attention, which no CPU has, by its description: ends of segments, causal anchored bottom right."""

    def varlen(q, k, v, starts_q, starts_k, max_q, max_k, causal=False, scale=None, window=None, gqa=False):
        assert list(window) == ([-1, 0] if causal else [-1, -1]) and scale is None
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert gqa == (q.shape[1] != k.shape[1] and "enable_gqa" in signature(varlen_attn).parameters)  # torch 2.11
        sizes = [starts.diff().tolist() for starts in (starts_q, starts_k)]
        assert [max_q, max_k] == [max(n) for n in sizes] and starts_q[0] == starts_k[0] == 0
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        out = []
        for a, b, c in zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True):
            scores = torch.einsum("tnh,snh->nts", a, b) * q.shape[2] ** -0.5
            hidden = torch.ones(len(a), len(b)).triu(len(b) - len(a) + 1).bool() & causal
            out.append(torch.einsum("nts,snh->tnh", scores.masked_fill(hidden, -torch.inf).softmax(-1), c))
        return torch.cat(out), q.new_empty(0), q.new_empty(0)

    if varlen_attn.__module__ == "llava_fn.kernels.varlen":
        with pytest.raises(ValueError, match="has no varlen_attn; install torch 2.11 or newer"):
            varlen_attn()
        pytest.skip(f"torch {torch.__version__} has no flash attention over segments")
    library = torch.library.Library("torch_attn", "IMPL")
    library.impl("_varlen_attn", varlen, "AutogradCPU")
    yield
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["attention, causal", "attention, last rows", "attention, full"])
def test_cuda_form_of_attention_equals_the_reference(flash_on_the_host, name, dtype):
    case = {c.name: c for c in check.cases(check.SMALL)}[name]
    found = check.errors(case, case.form("cuda"), DEVICES[0], dtype)
    assert max(found) <= check.LIMITS[str(dtype).removeprefix("torch.")]


def test_the_librarys_layer_norm_equals_the_reference():
    case = {c.name: c for c in check.cases(check.SMALL)}["LayerNorm"]
    assert max(check.errors(case, case.form("native"), DEVICES[0], torch.float32)) <= check.LIMITS["float32"]
    assert check.errors(case, case.form("native"), DEVICES[0], torch.bfloat16)[0] <= check.LIMITS["bfloat16"]


def test_check_finds_a_wrong_form():
    case = {c.name: c for c in check.cases(check.SMALL)}["RMSNorm"]

    def half(x, gain, eps):
        return module("rms_norm").reference(x, gain, eps) / 2

    assert check.errors(case, half, DEVICES[0], torch.float32)[0] == pytest.approx(0.5)


def test_rows_of_the_check_are_a_table_and_say_which_form_is_wrong(monkeypatch):
    cases = check.cases(check.SMALL)
    rows = [check.measure(x, x, DEVICES[0], dtype, 1) for dtype in (torch.float32, torch.bfloat16) for x in cases]
    lines = check.show(rows).splitlines()
    assert len(lines) == 2 + 2 * 16 and lines[0].split(" | ")[1] == "dtype" and not any("NO" in x for x in lines)
    monkeypatch.setitem(check.LIMITS, "bfloat16", 1e-9)
    assert not check.measure(cases[0], cases[0], DEVICES[0], torch.bfloat16, 1)["ok"]


def test_device_alone_chooses(monkeypatch):
    forms = {name: lambda: None for name in ("reference", "npu", "cuda")}
    with FakeTensorMode():
        assert dispatch.choose(torch.empty(1, device="cuda"), **forms) is forms["cuda"]
        assert dispatch.choose(torch.empty(1), **forms) is forms["reference"]
        monkeypatch.setattr(dispatch, "FORCED", True)
        assert dispatch.choose(torch.empty(1, device="cuda"), **forms) is forms["reference"]


def test_environment_forces_the_reference_and_nothing_else(monkeypatch):
    assert [dispatch.forced(e) for e in ({}, {"LLAVA_FN_KERNELS": ""}, {"LLAVA_FN_KERNELS": "reference"})] == [0, 0, 1]
    with pytest.raises(ValueError, match="LLAVA_FN_KERNELS='fast': must be reference"):
        dispatch.forced({"LLAVA_FN_KERNELS": "fast"})
    monkeypatch.setenv("LLAVA_FN_KERNELS", "reference")
    assert runpy.run_path(dispatch.__file__)["FORCED"] and not dispatch.FORCED


def test_environment_and_torch_npu_are_read_in_one_place_of_kernels():
    for path in sorted((ROOT / "llava_fn").rglob("*.py")):
        names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        text = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        place = path.relative_to(ROOT / "llava_fn").as_posix()
        reads = ("kernels/dispatch.py", "data/workers.py")  # the second sets a variable for its workers
        assert "environ" not in names or place in reads or place.startswith(("launch/", "bringup/")), place
        imported = "torch_npu" in text
        named = ("kernels/dispatch.py", "kernels/check.py", "bringup/versions.py")
        assert not imported or place in named or place.startswith("launch/"), place


@pytest.mark.parametrize(
    "content, said",
    [
        ("raise ImportError('libhccl.so: cannot open shared object file')", r"does not work \(ImportError: libhccl"),
        ("raise RuntimeError('no runtime')", r"does not work \(RuntimeError: no runtime\)"),
        ("__version__ = '2.13.0'", "torch_npu 2.13.0 has no npu_rms_norm"),
        ("", r"half installed: it has no version\) has no npu_rms_norm"),
    ],
)
def test_torch_npu_that_does_not_work_is_said_clearly(tmp_path, monkeypatch, content, said):
    (tmp_path / "torch_npu.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    try:
        with pytest.raises(ValueError, match=said):
            module("rms_norm").npu(R(2, 8), R(8), 1e-5)
    finally:
        sys.modules.pop("torch_npu", None)


def attend(q, k, v, lengths=(3,)):
    return module("attention").npu(q, k, v, Segments.of(lengths), True)


def decode(q, k, v, lengths=(2,), table=None):
    table = None if table is None else torch.tensor([table], dtype=torch.int32)
    return module("decode").npu(q, k, v, kernels.Held(torch.tensor(lengths), table, lengths or None))


def write_kv(k, v, cache=None):
    cache = torch.zeros(2, 3, 2, 8, dtype=B) if cache is None else cache
    return module("write_kv").npu(cache, cache, k, v, torch.tensor([0]))


B, F64, I64 = torch.bfloat16, torch.float64, torch.int64
CACHE = R(1, 4, 2, 8, dtype=B)
INT8 = (torch.ones(3, 8, dtype=torch.int8), torch.ones(3, 1))


def norm(name):
    return lambda *x: module(name).npu(*x, 1e-5)


def linear(x, b, ranks=2):
    return module("parallel_linear").check("npu_mm_reduce_scatter_base", x, b, ranks)


def flash(x):
    return module("attention").cuda(x, x, x, Segments.of([3]), True)


PAIR = types.SimpleNamespace(size=lambda: 2)


def gather(x, b):
    return module("parallel_linear").gather_matmul_npu(x, b, PAIR)


def scatter(x, b):
    return module("parallel_linear").matmul_scatter_npu(x, b, PAIR)


LONG = R(1, 262_145, 1, 8, dtype=B)
BIG = torch.empty(2**20, 128, 2, 8, dtype=B, device="meta")
LIMITS = [  # (call, arguments, what is said): all of it before torch_npu is touched
    (
        attend,
        (R(3, 2, 8, dtype=F64),) * 3,
        "npu_fusion_attention needs float16, bfloat16 or float32, not torch.f",
    ),
    (attend, (R(3, 2, 8), R(3, 2, 8, dtype=B), R(3, 2, 8)), "one dtype"),
    (attend, (R(3, 2, 770),) * 3, "heads of at most 768, not 770"),
    (attend, (R(3, 257, 2),) * 3, "at most 256 query heads, not 257"),
    (attend, (torch.empty(2**20 + 1, 1, 1, device="meta"),) * 3 + ((2**20 + 1,),), "at most 1048576 rows"),
    (decode, (R(1, 4, 8, dtype=F64), CACHE, CACHE), "float16, bfloat16 or float32"),
    (decode, (R(1, 4, 8, dtype=torch.float16), CACHE, CACHE), "one dtype"),
    (decode, (R(1, 4, 8, dtype=B), CACHE.mT.contiguous().mT, CACHE), "a contiguous cache"),
    (decode, (R(1, 4, 8, dtype=B), CACHE, CACHE, (5,)), "lengths from 1 to 4, not .5."),
    (decode, (R(1, 4, 8, dtype=B), CACHE, CACHE, (0,)), "lengths from 1 to 4, not .0."),
    (decode, (R(1, 4, 4, dtype=B), CACHE[..., :4], CACHE[..., :4]), "heads of 8, 16 .. 512, not 4"),
    (decode, (R(1, 130, 8, dtype=B), CACHE, CACHE), "64 to a KV head, not 130 with 2 KV heads"),
    (decode, (R(1, 258, 8), CACHE.float(), CACHE.float()), "at most 256 heads"),
    (decode, (R(1, 4, 8, dtype=B).requires_grad_(), CACHE, CACHE), "it gives no gradient, silently"),
    (norm("rms_norm"), (R(2, 8, dtype=B), R(8, dtype=torch.float16)), "gain in x's dtype or float32"),
    (norm("rms_norm"), (R(2, 8), R(4)), "gain of x's last dim"),
    (norm("rms_norm"), (R(2, 8, dtype=F64), R(8)), "float16, bfloat16 or float32"),
    (norm("add_rms_norm"), (R(2, 8), R(1, 8), R(8)), "x and y of one shape"),
    (norm("add_rms_norm"), (R(2, 8), R(2, 8), R(4)), "gain of x's last dim"),
    (norm("add_rms_norm"), (R(2, 8, dtype=B), R(2, 8, dtype=B), R(8)), "x, y and gain of one dtype"),
    (module("layer_norm").native, (R(2, 8, dtype=B), R(8), R(8), 1e-5), "x, gain and bias of one dtype"),
    (module("rotary").npu, (R(2, 3, 8, dtype=F64), R(2, 1, 8), R(2, 1, 8)), "npu_rotary_mul needs float16"),
    (module("rotary").npu, (R(2, 3, 8), R(2, 1, 4), R(2, 1, 4)), r"tables of \(2, 1, 8\)"),
    (module("rotary").npu, (R(2, 3, 7), R(2, 1, 7), R(2, 1, 7)), "an even head size below 896, not 7"),
    (module("rotary").npu, (R(2, 1000, 2), R(2, 1, 2), R(2, 1, 2)), "fewer than 1000 heads"),
    (module("rotary").npu, (R(2, 3, 8), R(2, 1, 8).requires_grad_(), R(2, 1, 8)), "tables that do not require"),
    (module("swiglu").npu, (R(0, 8), R(4, 8), R(4, 8)), "at least one row"),
    (module("swiglu").npu, (R(2, 8), R(4, 8), R(5, 8)), "two equal halves"),
    (module("swiglu").npu, (R(2, 8, dtype=F64), R(4, 8), R(4, 8)), "npu_swiglu needs float16"),
    (module("int8_linear").npu, (R(2, 8, dtype=F64), *INT8), "float16 or bfloat16, not torch.float64"),
    (module("int8_linear").npu, (R(2, 4, dtype=B), *INT8), r"rows of 8 values, not x of \(2, 4\)"),
    (module("int8_linear").npu, (R(0, 8, dtype=B), *INT8), r"rows of 8 values, not x of \(0, 8\)"),
    (module("int8_linear").npu, (R(2, 8, dtype=B), INT8[0].new_empty(65_536, 8), INT8[1]), "65535, not 65536 by 8"),
    (module("int8_linear").npu, (R(2, 3, dtype=B), INT8[0].t(), INT8[1]), "contiguous codes, not transposed"),
    (module("int8_linear").npu, (R(2, 8, dtype=B).requires_grad_(), *INT8), "it gives no gradient, silently"),
    (module("quick_gelu").npu, (R(2, dtype=F64),), "npu_fast_gelu needs float16"),
    (module("gelu").npu, (R(2, dtype=F64),), "npu_gelu needs float16"),
    (module("cross_entropy").npu, (R(0, 4), torch.empty(0, dtype=I64)), "1 to 200000 rows, not 0"),
    (module("cross_entropy").npu, (R(2, 4), torch.tensor([1])), "one a row"),
    (module("cross_entropy").npu, (R(2, 4), torch.tensor([1, 2], dtype=torch.int32)), "int64 targets"),
    (flash, (R(3, 2, 8, dtype=F64),), "varlen_attn needs float16 or bfloat16, not torch.float64"),
    (flash, (R(3, 2, 12, dtype=B),), "heads of 8, 16 .. 256, not 12"),
    (flash, (R(3, 2, 264, dtype=B),), "heads of 8, 16 .. 256, not 264"),
    (decode, (R(1, 1, 8, dtype=B), LONG, LONG), "a cache of at most 262144 keys a row, not 262145"),
    (decode, (R(1, 4, 8, dtype=B), CACHE, CACHE, ()), "lengths on the host"),
    (decode, (R(1, 4, 8, dtype=B), CACHE, CACHE, (2,), (0,)), "pages of 16, 32 .. 512 tokens, not 4"),
    (
        decode,
        (R(1, 4, 8, dtype=B), BIG, BIG, (2,), (0,)),
        "2..16 a token, not 2147483648 and 16",
    ),
    (write_kv, (R(1, 2, 8, dtype=F64),) * 2, "float16, bfloat16 or float32"),
    (write_kv, (R(1, 2, 8),) * 2, "one dtype"),
    (write_kv, (R(1, 2, 8, dtype=B),) * 2 + (torch.zeros(2, 2, 3, 8, dtype=B).transpose(1, 2),), "a contiguous cache"),
    (write_kv, (R(1, 2, 8, dtype=B).requires_grad_(),) * 2, "it gives no gradient, silently"),
    (scatter, (R(3, 256, dtype=B), R(256, 8, dtype=B)), "tokens that divide over 2 ranks, not 3"),
    (gather, (R(2, 8, dtype=B), R(8, 8, dtype=B)), "npu_all_gather_base_mm needs k from 256"),
    (scatter, (R(2, 8, dtype=B), R(8, 8, dtype=B)), "npu_mm_reduce_scatter_base needs k from 256"),
    (linear, (R(4, 256, dtype=B), R(256, 8, dtype=torch.float16)), "one dtype, not torch.bfloat16 and torch.float16"),
    (linear, (R(4, 255, dtype=B), R(255, 8, dtype=B)), "k from 256 to 65534, not 255"),
    (linear, (R(4, 256), R(256, 8)), "float16 or bfloat16, not torch.float32"),
    (linear, (R(256, 4, dtype=B).t(), R(256, 8, dtype=B)), "not a transposed or sliced one"),
    (linear, (R(4, 256, dtype=B), R(256, 8, dtype=B), 3), "2, 4, 8, 16 or 32 ranks, not 3"),
    (linear, (R(4, 256, dtype=B), R(8, 256, dtype=B)), "m k and k n"),
]


@pytest.mark.parametrize("call, args, said", LIMITS, ids=lambda x: x if isinstance(x, str) else "")
def test_what_a_fused_op_cannot_take_is_refused_before_the_call(call, args, said):
    with pytest.raises(ValueError, match=said):
        call(*args)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 key heads"):
        kernels.attention(R(3, 3, 4), R(3, 2, 4), R(3, 2, 4), Segments.of([3]), True)


def test_patch_embedding_is_the_convolution():
    pixels, weight = R(2, 3, 8, 12), R(5, 3, 4, 4, seed=1)
    want = torch.nn.functional.conv2d(pixels, weight, stride=4).flatten(2).mT
    torch.testing.assert_close(kernels.patch_embedding(pixels, weight.flatten(1), 4), want)


def test_reference_adamw_is_the_fused_one():
    one, two = ([R(4, 3, seed=j) for j in range(3)] + [R(4, 3, seed=3).square()] for _ in "ab")
    c = kernels.Coefficients(0.1, 0.8, 0.9, 1e-3, 0.2)
    for form, leaves in ((module("adamw").reference, one), (module("adamw").fused, two)):
        for step in (1, 2):
            form(*([x] for x in leaves), step, c)
    torch.testing.assert_close(one, two)


def test_adamw_refuses_other_dtypes_than_fp32():
    x = [R(2, dtype=B)]
    with pytest.raises(ValueError, match="float32 alone, not torch.bfloat16"):
        kernels.adamw(x, x, x, x, 1, kernels.Coefficients(0.1, 0.8, 0.9, 1e-3, 0.2))
