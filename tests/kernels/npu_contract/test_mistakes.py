"""Mistakes planted in the source of llava_fn/kernels, each of which a real NPU would take without a word, go red."""

import types

import emulation
import pytest
import torch
from test_numerics import HELD, R, compare, int8_product, module, paged_decoding, written

MISTAKES = {  # what went wrong -> (file, text, the mistake in its place, case of test_numerics.py)
    "the mask inverted": ("attention", ".triu(1)", ".tril()", "causal attention"),
    "the mask left out, sparse_mode 3 kept": (
        "attention", "hidden(q.device) if causal else None", "None", "causal attention",
    ),
    "causal anchored top left": ("attention", "sparse_mode=3 if", "sparse_mode=2 if", "causal attention"),
    "a mask where all is to be seen": ("attention", "if causal else None", "", "full attention"),
    "full attention with a causal mode and mask": (
        "attention", "hidden(q.device) if causal else None", "hidden(q.device)", "full attention",
    ),
    "the scale left out": ("attention", "scale=h**-0.5, ", "", "causal attention"),
    "lengths instead of ends": (
        "attention", "[list(accumulate(lengths)) for", "[list(lengths) for", "causal attention",
    ),
    "a leading 0": ("attention", "list(accumulate(lengths))", "[0, *accumulate(lengths)]", "causal attention"),
    "ends of queries and keys swapped": (
        "attention", "actual_seq_qlen=ends[0], actual_seq_kvlen=ends[1]",
        "actual_seq_qlen=ends[1], actual_seq_kvlen=ends[0]", "causal attention",
    ),
    "heads of the keys": ("attention", "v.contiguous(), n,", "v.contiguous(), k.shape[1],", "causal attention"),
    "keys and values swapped": (
        "attention", "k.contiguous(), v.contiguous()", "v.contiguous(), k.contiguous()", "causal attention",
    ),
    "a strided tensor": ("attention", "q.contiguous()", "q", "attention of strided rows"),
    "the tuple not taken apart": ("attention", "    )[0]  # fmt: skip", "    )[1]  # fmt: skip", "causal attention"),
    "eps dropped": ("rms_norm", "(x, gain, eps)[0]", "(x, gain)[0]", "RMSNorm"),
    "rstd for y": ("rms_norm", "(x, gain, eps)[0]", "(x, gain, eps)[1].expand_as(x)", "RMSNorm"),
    "eps dropped in the fused sum": ("add_rms_norm", '(x, y, gain, eps)\n', '(x, y, gain)\n', "add and RMSNorm"),
    "sum and norm swapped": (
        "add_rms_norm", "normed, scale, total = npu_op", "total, scale, normed = npu_op", "add and RMSNorm",
    ),
    "the sum's gradient forgotten": ("add_rms_norm", "        d = d + d_total\n", "", "add and RMSNorm"),
    "the gradient at x instead of the sum": (
        "add_rms_norm", "ctx.save_for_backward(total,", "ctx.save_for_backward(inputs[0],", "add and RMSNorm",
    ),
    "GPT-J's rotary layout": ("rotary", '"half")[0]', '"interleave")[0]', "rotary"),
    "cos and sin swapped": ("rotary", "[None], cos, sin, ", "[None], sin, cos, ", "rotary"),
    "gate and up swapped, few rows": (
        "swiglu", "npu_products(linear(x, w_gate), linear(x, w_up))",
        "npu_products(linear(x, w_up), linear(x, w_gate))", "SwiGLU, few rows",
    ),
    "gate and up swapped, many rows": (
        "swiglu", "torch.cat([w_gate, w_up])",
        "torch.cat([w_up, w_gate])", "SwiGLU, many rows",
    ),
    "gate and up joined along the rows": (
        "swiglu", "torch.cat([gate, up], -1)",
        "torch.cat([gate, up], 0)", "SwiGLU, few rows",
    ),
    "tanh for erf": ("gelu", 'approximate="none")\n', 'approximate="tanh")\n', "erf GELU"),
    "mean of the losses": ("cross_entropy", 'reduction="none")[0]', 'reduction="mean")[0]', "cross-entropy"),
    "log-probabilities for losses": (
        "cross_entropy", 'reduction="none")[0]',
        'reduction="none")[1][:, 0]', "cross-entropy",
    ),
    "the decoding mask inverted": ("decode", ">= held.lengths", "< held.lengths", "fp32 decoding"),
    "the decoding mask one too long": ("decode", ">= held.lengths", "> held.lengths", "fp32 decoding"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def ops():
    library = emulation.register()
    yield
    library._destroy()


def with_mistake(name: str, right: str, wrong: str) -> types.ModuleType:
    """The module with one edit to its source."""
    path = module(name).__file__
    with open(path) as file:
        source = file.read()
    before, found, after = source.rpartition(right)  # the NPU form stands after the reference
    assert found, f"{name}.py no longer says {right!r}: adapt the mistake"
    changed = types.ModuleType(f"{name}_with_a_mistake")
    changed.__dict__["__name__"] = f"llava_fn.kernels.{name}"
    exec(compile(before + wrong + after, path, "exec"), changed.__dict__)
    return changed


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_goes_red(mistake):
    name, right, wrong, case = MISTAKES[mistake]
    compare(with_mistake(name, right, right).npu, module(name).reference, case)  # the same edit without the mistake
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        compare(with_mistake(name, right, wrong).npu, module(name).reference, case)


@pytest.mark.parametrize(
    "right, wrong",
    [("codes.t()", "codes"), (", scale.t().to(x.dtype)", ", scale.t()"), ("scale.t().to", "scale.t().square().to")],
)
def test_planted_mistake_in_the_int8_product_goes_red(right, wrong):
    with pytest.raises((AssertionError, RuntimeError)):
        mine = int8_product(with_mistake("int8_linear", right, wrong).npu)
        torch.testing.assert_close(mine, int8_product(module("int8_linear").reference), rtol=2**-6, atol=2.0)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("actual_seq_lengths_kv=seen, ", ""),
        ("seen = list(held.numbers or ())", "seen = held.lengths.cumsum(0).tolist()"),
        ("seen = list(held.numbers or ())", "seen = (held.lengths - 1).clamp(min=1).tolist()"),
        ("num_heads=n, ", ""),
        ("num_key_value_heads=m, ", ""),
        ('input_layout="BSND"', 'input_layout="BNSD"'),
        (", scale=h**-0.5,\n        input", ",\n        input"),
    ],
)
def test_planted_mistake_in_bf16_decoding_goes_red(right, wrong):
    args = [x.bfloat16() for x in (R(3, 4, 8), R(3, 9, 2, 8, seed=1), R(3, 9, 2, 8, seed=2))]
    changed = with_mistake("decode", right, wrong)
    with torch.no_grad(), pytest.raises((AssertionError, ValueError)):
        mine, want = changed.npu(*args, HELD), module("decode").reference(*args, HELD)
        torch.testing.assert_close(mine, want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("block_table=table, ", ""),
        ("block_size=0 if table is None else s", "block_size=0"),
        ("k.flatten(2), v.flatten(2)", "k, v"),
        ("actual_seq_lengths_kv=seen, ", ""),
        ("sum(-(-x // s) for x in seen) > len(k)", "False"),
    ],
)
def test_planted_mistake_in_decoding_from_pages_goes_red(right, wrong):
    with pytest.raises((AssertionError, RuntimeError, KeyError)):
        for rows in ((((4, 1), (0, 3), (2, 5)), 6), (((4, 1), (4, 3), (4, 3)), 5)):
            paged_decoding(with_mistake("decode", right, wrong).npu, *rows)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("k.contiguous(), v.contiguous(), k_cache", "v.contiguous(), k.contiguous(), k_cache"),
        ("k.contiguous(), v.contiguous(), k_cache", "k, v, k_cache"),
        ("slots, cache_mode", "slots + 1, cache_mode"),
        (', cache_mode="Norm"', ""),
    ],
)
def test_planted_mistake_in_writing_keys_and_values_goes_red(right, wrong):
    with pytest.raises((AssertionError, RuntimeError)):
        written(with_mistake("write_kv", right, wrong).npu)
