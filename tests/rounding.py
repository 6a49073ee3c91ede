"""How far two computations of the same numbers, in another order, may be apart on any machine."""

import torch

ROUNDINGS = 64  # of the largest number; a mistake in the code is some thousand times that


def same_but_rounded(a: torch.Tensor, b: torch.Tensor, scale: float | None = None) -> None:
    """AssertionError if an element differs by more than ROUNDINGS times the rounding of `scale`.

    scale: the largest magnitude in b unless given. A tensor that is zero but for rounding takes that of its sums.
    """
    scale = scale if scale is not None else b.abs().max().item() if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=ROUNDINGS * torch.finfo(b.dtype).eps * scale)
