"""Mistakes that an NPU would take without a word, or that would make it wait, are seen on tensors without memory."""

import importlib

import pytest
import torch
from record import Log
from test_fake import BF16, SMALL, E, params
from test_fake_answers import OPTIONS, WORDS, prompts

from llava_fn import kernels
from llava_fn.generate import decode, sampling
from llava_fn.generate.types import Model
from llava_fn.kernels import Segments

MANY = Segments.of([1] * 1030)
attention, swiglu = (importlib.import_module(f"llava_fn.kernels.{name}") for name in ("attention", "swiglu"))


def answer() -> Log:
    """Steps of decoding with every option, seen."""
    m, d = Model(params(SMALL, BF16), SMALL), OPTIONS["all"]
    state = decode.prefill(m, prompts(m), m.cache(2, 1024), WORDS)
    with Log() as log:
        list(decode.steps(m, state, d, [1, 2]))
    return log


def old_draw(scores, uniform):
    total = scores.softmax(-1).cumsum(-1).cummax(-1).values
    return (total > (uniform * total[:, -1])[:, None]).int().argmax(-1)


def test_what_ascend_950_lacks_is_seen(fake, monkeypatch):
    monkeypatch.setattr(sampling, "draw", old_draw)
    monkeypatch.setattr(decode, "at", lambda x, columns: x.gather(1, columns[:, None])[:, 0])
    assert answer().cards["950"] == {"aten::cummax", "aten::gather"}


def test_a_double_on_the_device_is_seen(fake, monkeypatch):
    monkeypatch.setattr(decode, "at", lambda x, columns: sampling.at(x.double(), columns).float())
    with pytest.raises(AssertionError, match="torch.float64"):
        answer()


def test_copies_and_waits_are_seen(fake, monkeypatch):
    monkeypatch.setattr(sampling, "to_device", lambda x, device: x.to(device))
    monkeypatch.setattr(decode, "at", lambda x, columns: x[:, int(columns[0])])
    log = answer()
    assert log.copies and set(log.waits) == {"aten::_local_scalar_dense"}


def strided_halves(gate, up):
    joined = torch.cat([gate, up], -1)
    return kernels.dispatch.npu_op("npu_swiglu")(torch.stack([joined, joined], -1)[..., 0])


MISTAKES = {  # -> (module, name, what stands in its place; None: nothing), the call, what is said
    "more than 1,024 segments": (
        (attention, "SEGMENTS", 2048), lambda: attention.npu(*[E(1030, 2, 64)] * 3, MANY, True), "1,024 segments",
    ),
    "a mask left out": (
        (attention, "hidden", lambda device: None), lambda: attention.npu(*[E(1030, 2, 64)] * 3, MANY, True),
        "sparse_mode 2 or 3 with",
    ),
    "lengths instead of ends": (
        (attention, "accumulate", list), lambda: attention.npu(*[E(9, 2, 64)] * 3, Segments.of([5, 4]), True),
        "ends on the host",
    ),
    "a strided tensor": (
        (swiglu, "npu_products", strided_halves), lambda: swiglu.npu_products(E(9, 32), E(9, 32)), "not contiguous",
    ),
    "two dtypes": (
        None, lambda: torch.ops.npu.npu_add_rms_norm(E(9, 8), E(9, 8), E(8).float()), "not of one dtype",
    ),
    "an op that nobody looked up": (None, lambda: E(9, 8).cumprod(-1), "aten::cumprod has no row"),
    "another dtype": (None, lambda: torch.ops.npu.npu_fast_gelu(E(9, 8, dtype=torch.int64)), "input is int64"),
    "too many dims": (None, lambda: torch.ops.npu.npu_rms_norm(E(*[1] * 8, 8), E(8)), "9 dims, not 1 to 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_call_beyond_its_limits_is_seen(fake, monkeypatch, name):
    patch, call, said = MISTAKES[name]
    if patch:
        monkeypatch.setattr(*patch)
    with pytest.raises(AssertionError, match=said), Log():
        call()
