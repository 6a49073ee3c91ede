"""The choice of an operation's implementation, by the tensor's device.

For debugging, LLAVA_FN_KERNELS=reference in the environment, read once when this module is imported, selects the
reference of every operation on every device. A failure that then disappears comes from a fused kernel.
This is the only module of kernels/ that reads the environment or imports torch_npu.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

NPU_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)  # a missing CANN library raises any of these


def forced(environ: Mapping[str, str]) -> bool:
    """Whether LLAVA_FN_KERNELS selects the references. ValueError for any value but "reference"."""
    value = environ.get("LLAVA_FN_KERNELS", "")
    if value not in ("", "reference"):
        raise ValueError(f"LLAVA_FN_KERNELS={value!r}: must be reference, to debug; or unset it")
    return value == "reference"


FORCED = forced(os.environ)


def choose(x: Tensor, reference: Callable, **fused: Callable) -> Callable:
    """The form in `fused` that is named like x's device type, or else the reference."""
    return reference if FORCED else fused.get(x.device.type, reference)


def in_transform() -> bool:
    """Whether a transform of torch.func is under way, which only plain operations go through."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def require(condition: bool, op: str, limit: str) -> None:
    """ValueError unless the condition holds. limit: what the fused op needs and what it was given.

    Checked before the call, because for many inputs the kernels return a wrong result without an error.
    """
    if not condition:
        raise ValueError(
            f"{op} needs {limit}. Change the input, or run the plain PyTorch form with LLAVA_FN_KERNELS=reference"
        )


def require_float(op: str, x: Tensor) -> None:
    """ValueError unless x is of a dtype that the NPU's floating-point ops take."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    require(x.dtype in floats, op, f"float16, bfloat16 or float32, not {x.dtype}")


def npu_op(name: str) -> Callable:
    """The function of torch_npu with this name. ValueError if torch_npu cannot be imported or lacks the function."""
    try:
        module = importlib.import_module("torch_npu")
    except NPU_ERRORS as error:
        raise ValueError(
            f"torch_npu does not work ({type(error).__name__}: {error}); run `source set_env.sh` of the CANN toolkit "
            "in this shell and see that torch_npu belongs to the installed torch"
        ) from error
    if not hasattr(module, name):
        version = getattr(module, "__version__", "(half installed: it has no version)")
        raise ValueError(f"torch_npu {version} has no {name}; install the one that belongs to the installed torch")
    return getattr(module, name)
