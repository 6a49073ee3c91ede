"""In a process of its own, started by tests/kernels/test_npu_contract.py: importing torch_npu changes torch."""

import os
import warnings
from pathlib import Path

import pytest
import stub
import torch

WHEEL = Path(os.environ["LLAVA_FN_TORCH_NPU"])  # the unpacked wheel of this torch's line; on PYTHONPATH too
stub.load(WHEEL / "torch_npu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_npu  # noqa: F401

    torch.npu._lazy_init()

from record import RealHost  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from llava_fn.kernels.attention import hidden  # noqa: E402


@pytest.fixture
def fake():
    """Tensors without memory on an NPU that is not there: shapes, dtypes, devices and autograd are the real ones."""
    hidden.cache_clear()
    with FakeTensorMode() as mode, RealHost(mode):
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="npu") begins on the host
        yield
        torch._C._set_only_lift_cpu_tensors(lifts)
    hidden.cache_clear()
