"""The Triton kernel of int8_linear on a CPU, by Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from wheels import fetch, give_up

ROOT = Path(__file__).parents[2]
int8_linear = import_module("llava_fn.kernels.int8_linear")  # the package has the function of this name
PROGRAM = """
import torch
from llava_fn.kernels.int8_linear import cuda

torch.manual_seed(0)
for shape, n, k in [((), 40, 96), ((3,), 16, 256), ((2, 9), 33, 300), ((64,), 64, 520)]:
    x = torch.randn(*shape, k).half()  # in bf16 the interpreter multiplies the bits
    codes, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n, 1) + 0.1
    want = x.double() @ (codes.double() * scale.double()).t()
    error = (cuda(x, codes, scale) - want).abs().max() / want.abs().max()
    assert cuda(x, codes, scale).shape == (*shape, n) and error < 2**-10, (shape, n, k, float(error))
"""


@pytest.mark.slow
def test_the_kernel_equals_the_whole_weight_in_the_interpreter():
    """In fp16. Not seen: what Triton compiles for a card."""
    if importlib.util.find_spec("triton"):
        where = []
    elif sys.platform != "linux":
        give_up("Triton has wheels for Linux alone")
    else:
        where = [str(fetch("triton", "triton"))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *where]), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_product_says_what_to_do():
    codes, scale = torch.ones(4, 32, dtype=torch.int8), torch.ones(4, 1)
    with pytest.raises(ValueError, match="needs Triton, which does not work .*LLAVA_FN_KERNELS=reference"):
        int8_linear.cuda(torch.ones(2, 32).bfloat16(), codes, scale)
    for x in (torch.ones(65, 32).bfloat16(), torch.ones(2, 32), torch.ones(0, 32).bfloat16()):
        assert torch.equal(int8_linear.cuda(x, codes, scale), int8_linear.reference(x, codes, scale))
    with pytest.raises(ValueError, match="the int8 product needs contiguous codes"):
        int8_linear.cuda(torch.ones(2, 16).bfloat16(), codes[:, ::2], scale)
