"""torch's flash attention over segments, on CUDA alone. torch has it from 2.10 on; older ones serve NPUs and CPUs."""

from typing import NoReturn

import torch


def _missing(*args: object, **kwargs: object) -> NoReturn:
    raise ValueError(
        f"attention on CUDA: torch {torch.__version__} has no varlen_attn; install torch 2.11 or newer, or run the "
        "plain PyTorch form with LLAVA_FN_KERNELS=reference"
    )


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = _missing
