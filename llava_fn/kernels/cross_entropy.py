"""Cross-entropy of rows that carry a label; rows without one never get here."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in fp32. logits: r v, targets: int64[r] in [0, v) -> fp32[r]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
