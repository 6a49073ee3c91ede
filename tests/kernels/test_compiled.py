"""The compiled forms, on a CPU: inductor makes C++ of them here, and Triton on a card."""

from importlib import import_module

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from llava_fn.kernels import compiled, rotary_tables


def R(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3).to(dtype)


def tables(n):
    return rotary_tables(torch.arange(n) + 2, 8, 1e4)


FORMS = {  # module, name of the reference, arguments for n rows
    "rotary": ("rotary", "reference", lambda n, t: (R(n, 3, 8, dtype=t), *tables(n))),
    "rotary, strided": ("rotary", "reference", lambda n, t: (R(n, 5, 8, dtype=t)[:, :3], *tables(n))),
    "RMSNorm": ("rms_norm", "reference", lambda n, t: (R(n, 24, dtype=t), R(24, seed=1, dtype=t), 1e-5)),
    "add and RMSNorm": (
        "add_rms_norm", "reference", lambda n, t: (R(n, 24, dtype=t), R(n, 24, seed=2, dtype=t), R(24, seed=1), 1e-5),
    ),
    "silu times up": ("swiglu", "gated", lambda n, t: (R(n, 24, dtype=t), R(n, 24, seed=1, dtype=t))),
    "silu times up, joined": ("swiglu", "gated_halves", lambda n, t: (R(n, 48, dtype=t),)),
}  # fmt: skip


def values_and_gradients(fn, args, grad):
    args = [
        a.detach().requires_grad_(grad) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]
    with torch.set_grad_enabled(grad):
        out = fn(*args)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [a for a in args if isinstance(a, torch.Tensor)]
    return [*out, *(torch.autograd.grad(sum((x.float() ** 2).sum() for x in out), wanted) if grad else ())]


def check(form, dtype, backend, calls, monkeypatch):
    """A form, for each of the calls with so many rows and with gradients or without, equals its reference."""
    monkeypatch.setattr(compiled, "by_inductor", lambda fn: torch.compile(fn, fullgraph=True, backend=backend))
    module, name, make = FORMS[form]
    reference = getattr(import_module(f"llava_fn.kernels.{module}"), name)
    torch._dynamo.reset()
    call = compiled.compiled(reference)
    limit = {torch.float32: 2**-20, torch.bfloat16: 2**-6}[dtype]  # bf16: inductor rounds less often
    for n, grad in calls:
        for got, want in zip(*(values_and_gradients(f, make(n, dtype), grad) for f in (call, reference)), strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            assert (got - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_serves_all_numbers_of_rows_and_another_one_row(form, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    check(form, torch.float32, counter, [(n, grad) for grad in (True, False) for n in (5, 2, 9, 1)], monkeypatch)
    assert counter.frame_count == 4  # with gradients and without, many rows and one


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_what_inductor_makes_equals_the_reference(form, monkeypatch):
    check(form, torch.bfloat16, "inductor", [(5, True), (9, True), (1, False)], monkeypatch)


def test_on_a_card_without_triton_the_form_says_so(monkeypatch):
    monkeypatch.setattr(compiled, "has_triton", lambda: False)
    x = type("Card", (), {"device": torch.device("cuda")})()
    with pytest.raises(ValueError, match="the CUDA form of rotary needs Triton.*LLAVA_FN_KERNELS=reference"):
        import_module("llava_fn.kernels.rotary").cuda(x, None, None)


def test_within_transforms_of_functions_the_reference_runs(monkeypatch):
    def never(fn):
        raise AssertionError("compiled")

    monkeypatch.setattr(compiled, "by_inductor", never)
    gated = import_module("llava_fn.kernels.swiglu").cuda_products
    x, y = R(4, 3), R(4, 3, seed=1)
    assert torch.func.vmap(gated)(x, y).shape == (4, 3)
    torch.func.grad(lambda x: gated(x, y).sum())(x)
    with pytest.raises(AssertionError, match="compiled"):
        gated(x, y)


def test_widths_are_constants_of_a_graph(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled, "by_inductor", lambda fn: torch.compile(fn, fullgraph=True, backend=counter))
    torch._dynamo.reset()
    call = compiled.compiled(import_module("llava_fn.kernels.rotary").reference)
    for heads in range(3, 13):  # more than torch's own limit of graphs
        for n in (4, 6):
            call(R(n, heads, 8), *tables(n))
    assert counter.frame_count == 10
