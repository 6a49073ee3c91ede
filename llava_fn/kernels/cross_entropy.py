"""Cross-entropy of labelled rows.

Contract: logits: r v, targets: int64[r] in [0, v) -> -log softmax(logits)[target], fp32[r], computed in fp32.
There is no ignore_index: npu_cross_entropy_loss does not support a negative one and would read the usual -100 as a
class. The caller drops unlabelled rows before the head instead, which also saves their logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fn.kernels.dispatch import choose, npu_op, require
from llava_fn.kernels.precision import at_least_fp32


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: r v, targets: int64[r] in [0, v) -> fp32[r]; see the module's contract."""
    return choose(logits, reference, npu=npu)(logits, targets)


def reference(logits: Tensor, targets: Tensor) -> Tensor:
    """torch's cross-entropy of fp32 logits."""
    return F.cross_entropy(at_least_fp32(logits), targets, reduction="none")


def npu(logits: Tensor, targets: Tensor) -> Tensor:
    """npu_cross_entropy_loss, one loss a row, in the dtype of its input: hence fp32 logits."""
    rows = len(logits)
    require(1 <= rows <= 200_000, "npu_cross_entropy_loss", f"1 to 200000 rows, not {rows}")
    require(
        targets.dtype == torch.int64 and targets.shape == (rows,), "npu_cross_entropy_loss",
        f"int64 targets, one a row, not {targets.dtype} of {tuple(targets.shape)} for {rows} rows",
    )  # fmt: skip
    return npu_op("npu_cross_entropy_loss")(logits.float(), targets, reduction="none")[0]
